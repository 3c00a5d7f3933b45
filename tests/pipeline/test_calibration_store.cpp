#include <gtest/gtest.h>
#include <hdf5.h>

#include <functional>

#include "pipeline/calibration_store.h"
#include "pipeline/files.h"
#include "tests/pipeline/capture_log.h"
#include "tests/pipeline/expect_error.h"
#include "tests/pipeline/temporary_directory.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using testing::CaptureLog;
using testing::expect_error;
using testing::TemporaryDirectory;

// What a store file holds; the defaults are valid, a test breaks one of them.
struct Content {
    std::vector<std::int32_t> ids = {1, 2, 3, -1, 4, -1, -1, -1, 5, 6, 7, 9};  // [3, 4]
    std::vector<hsize_t> ids_shape = {3, 4};
    std::vector<std::int32_t> lengths = {3, 1, 4};
    std::vector<hsize_t> lengths_shape = {3};
    hid_t ids_type = H5T_STD_I32LE;
    std::int64_t vocab_size = 10;
    std::string tokenizer = "of nobody";
    bool fixed_text = false;
    std::string left_out;  // a data set or attribute
};

void write_data_set(hid_t file, const char* name, hid_t type, const std::vector<hsize_t>& shape,
                    const std::vector<std::int32_t>& data) {
    const hid_t space = H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr);
    const hid_t set = H5Dcreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    ASSERT_GE(H5Dwrite(set, H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, data.data()), 0);
    H5Dclose(set);
    H5Sclose(space);
}

void write_attribute(hid_t file, const char* name, hid_t type, const void* value) {
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t attribute = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    ASSERT_GE(H5Awrite(attribute, type, value), 0);
    H5Aclose(attribute);
    H5Sclose(space);
}

void write_text(hid_t file, const char* name, const std::string& text, bool fixed) {
    const hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, fixed ? text.size() : H5T_VARIABLE);
    H5Tset_strpad(type, fixed ? H5T_STR_NULLPAD : H5T_STR_NULLTERM);
    const char* pointer = text.c_str();
    write_attribute(file, name, type,
                    fixed ? static_cast<const void*>(pointer) : static_cast<const void*>(&pointer));
    H5Tclose(type);
}

class Store : public ::testing::Test {
protected:
    Store() { request_.vocab_size = 10; }
    void TearDown() override {
        // Nothing that the reader opened may stay open, whatever was wrong with the file.
        EXPECT_EQ(H5Fget_obj_count(static_cast<hid_t>(H5F_OBJ_ALL), H5F_OBJ_ALL), 0);
    }
    fs::path path() const { return directory_ / "calib.h5"; }
    void write(const Content& content) const {
        const hid_t file = H5Fcreate(path().c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
        const auto wanted = [&](const char* name) { return content.left_out != name; };
        if (wanted("/input_ids")) {
            write_data_set(file, "/input_ids", content.ids_type, content.ids_shape, content.ids);
        }
        if (wanted("/lengths")) {
            write_data_set(file, "/lengths", H5T_STD_I32LE, content.lengths_shape, content.lengths);
        }
        if (wanted("vocab_size")) write_attribute(file, "vocab_size", H5T_NATIVE_INT64, &content.vocab_size);
        if (wanted("tokenizer")) write_text(file, "tokenizer", content.tokenizer, content.fixed_text);
        if (wanted("source")) write_text(file, "source", "a test", content.fixed_text);
        H5Fclose(file);
    }
    void expect_refused(const std::vector<std::string>& parts) {
        expect_error<BadInput>([&] { load_calibration_store(path(), request_); }, parts);
    }
    void expect_refused(const Content& content, const std::vector<std::string>& parts) {
        write(content);
        expect_refused(parts);
    }

    TemporaryDirectory directory_;
    CalibrationRequest request_;
    CaptureLog log_;
};

using Sequences = std::vector<std::vector<std::int32_t>>;

TEST_F(Store, ReadsEverything) {
    write({});
    const CalibrationStore store = load_calibration_store(path(), request_);
    EXPECT_EQ(store.sequences, (Sequences{{1, 2, 3}, {4}, {5, 6, 7, 9}}));
    EXPECT_EQ(store.sequence_length, 4);
    EXPECT_EQ(store.vocab_size, 10);
    EXPECT_EQ(store.tokenizer, "of nobody");
    EXPECT_EQ(store.source, "a test");
}

TEST_F(Store, ReadsOtherEncodings) {
    Content content;
    content.ids_type = H5T_STD_I32BE;
    content.fixed_text = true;
    write(content);
    const CalibrationStore store = load_calibration_store(path(), request_);
    EXPECT_EQ(store.sequences, (Sequences{{1, 2, 3}, {4}, {5, 6, 7, 9}}));
    EXPECT_EQ(store.tokenizer, "of nobody");
    EXPECT_EQ(store.source, "a test");
}

TEST_F(Store, CutsToTheRequest) {
    write({});
    request_.sequences = 2;
    request_.sequence_length = 2;
    EXPECT_EQ(load_calibration_store(path(), request_).sequences, (Sequences{{1, 2}, {4}}));
    request_.sequences = 3;
    request_.sequence_length = 100;
    EXPECT_EQ(load_calibration_store(path(), request_).sequences, (Sequences{{1, 2, 3}, {4}, {5, 6, 7, 9}}));
}

TEST_F(Store, ReadsManySequences) {
    constexpr std::size_t kRows = 1000;
    Content content;
    content.ids_shape = {kRows, 3};
    content.lengths_shape = {kRows};
    content.vocab_size = request_.vocab_size = 2000;
    content.ids.clear();
    content.lengths.clear();
    Sequences expected;
    for (std::int32_t row = 0; row < static_cast<std::int32_t>(kRows); ++row) {
        const std::int32_t length = row % 3 + 1;
        content.lengths.push_back(length);
        expected.emplace_back();
        for (std::int32_t i = 0; i < 3; ++i) {
            content.ids.push_back(i < length ? row + i : -1);
            if (i < length) expected.back().push_back(row + i);
        }
    }
    write(content);
    EXPECT_EQ(load_calibration_store(path(), request_).sequences, expected);
    request_.sequences = 700;
    expected.resize(700);
    EXPECT_EQ(load_calibration_store(path(), request_).sequences, expected);
}

TEST_F(Store, NotHdf5) {
    expect_refused({"calib.h5"});  // missing
    directory_.write("calib.h5", "plain text");
    expect_refused({"calib.h5", "not a readable HDF5 file", "calibrate.py"});
    directory_.write("calib.h5", "");
    expect_refused({"not a readable HDF5 file"});
    fs::remove(path());
    fs::create_directory(path());
    expect_refused({"calib.h5", "not a regular file"});
}

TEST_F(Store, TruncatedAtAnyPlace) {
    write({});
    const std::string whole = testing::contents(path());
    for (std::size_t size = 0; size < whole.size(); size += 97) {
        directory_.write("calib.h5", whole.substr(0, size));
        expect_refused({"calib.h5"});
    }
}

TEST_F(Store, MissingParts) {
    for (const char* name : {"/input_ids", "/lengths", "vocab_size", "tokenizer", "source"}) {
        Content content;
        content.left_out = name;
        expect_refused(content, {"calib.h5", name});
    }
}

TEST_F(Store, WrongTypes) {
    for (const hid_t type : {H5T_STD_I64LE, H5T_STD_U32LE, H5T_IEEE_F32LE, H5T_STD_I16LE}) {
        Content content;
        content.ids_type = type;
        expect_refused(content, {"/input_ids", "int32"});
    }
}

TEST_F(Store, DataSetThatIsAGroup) {
    Content content;
    content.left_out = "/lengths";
    write(content);
    const hid_t file = H5Fopen(path().c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    H5Gclose(H5Gcreate2(file, "/lengths", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    H5Fclose(file);
    expect_refused({"/lengths"});
}

TEST_F(Store, AttributesOfTheWrongKind) {
    Content content;
    content.left_out = "vocab_size";
    write(content);
    hid_t file = H5Fopen(path().c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    write_text(file, "vocab_size", "10", false);
    H5Fclose(file);
    expect_refused({"vocab_size", "integer"});
    content.left_out = "tokenizer";
    write(content);
    file = H5Fopen(path().c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    write_attribute(file, "tokenizer", H5T_NATIVE_INT64, &content.vocab_size);
    H5Fclose(file);
    expect_refused({"tokenizer", "string"});
}

TEST_F(Store, WrongShapes) {
    Content content;
    content.ids_shape = {12};
    expect_refused(content, {"/input_ids", "1 dimensions"});
    content.ids_shape = {3, 2, 2};
    expect_refused(content, {"/input_ids", "3 dimensions"});
    content.ids_shape = {4, 3};
    expect_refused(content, {"/lengths", "4 rows"});
    content.ids_shape = {3, 4};
    content.lengths_shape = {3, 1};
    expect_refused(content, {"/lengths"});
    content = {};
    content.ids_shape = {0, 4};
    content.lengths_shape = {0};
    expect_refused(content, {"no sequences"});
}

TEST_F(Store, WrongLengths) {
    Content content;
    content.lengths = {3, 0, 4};
    expect_refused(content, {"sequence 1", "length 0", "[1, 4]"});
    content.lengths = {3, 1, 5};
    expect_refused(content, {"sequence 2", "length 5"});
    content.lengths = {-3, 1, 4};
    expect_refused(content, {"sequence 0", "length -3"});
    content.lengths = {2, 1, 4};
    expect_refused(content, {"sequence 0", "id 3", "position 2", "-1"});
    content.lengths = {4, 1, 4};
    expect_refused(content, {"sequence 0", "position 3", "id -1"});
}

TEST_F(Store, IdsOutOfRange) {
    Content content;
    content.ids[9] = 10;
    expect_refused(content, {"sequence 2", "position 1", "id 10", "vocabulary of 10"});
    content.ids[9] = -2;
    expect_refused(content, {"sequence 2", "position 1", "id -2"});
    request_.sequences = 2;  // the bad one is not asked for
    EXPECT_EQ(load_calibration_store(path(), request_).sequences.size(), 2U);
}

TEST_F(Store, Vocabulary) {
    Content content;
    content.vocab_size = 11;
    expect_refused(content, {"11 ids", "model's of 10"});
    content.vocab_size = 0;
    expect_refused(content, {"0 ids"});
    content.vocab_size = 9;  // models pad their embeddings
    write(content);
    EXPECT_NO_THROW(load_calibration_store(path(), request_));
}

TEST_F(Store, BadRequests) {
    write({});
    request_.sequences = 4;
    expect_refused({"3 sequences", "asks for 4"});
    request_.sequences = 0;
    expect_refused({"calibration.sequences is 0"});
    request_.sequences = -1;
    expect_refused({"calibration.sequences is -1"});
    request_.sequences = 3;
    request_.sequence_length = 0;
    expect_refused({"calibration.sequence_length is 0"});
}

TEST_F(Store, AnotherTokenizer) {
    request_.tokenizer_json = directory_.write("tokenizer.json", "{}");
    Content content;
    content.tokenizer = sha256_of_file(request_.tokenizer_json);
    write(content);
    EXPECT_NO_THROW(load_calibration_store(path(), request_));
    EXPECT_EQ(log_.text(), "");
    directory_.write("tokenizer.json", "{} ");
    expect_refused({"calib.h5", "another tokenizer", content.tokenizer,
                    sha256_of_file(request_.tokenizer_json), "calibration.allow_tokenizer_mismatch: true"});
    request_.allow_tokenizer_mismatch = true;
    EXPECT_EQ(load_calibration_store(path(), request_).sequences.size(), 3U);
    EXPECT_NE(log_.text().find("another tokenizer"), std::string::npos);
}

TEST_F(Store, ModelWithoutTokenizer) {
    write({});
    request_.tokenizer_json = directory_ / "tokenizer.json";
    EXPECT_EQ(load_calibration_store(path(), request_).sequences.size(), 3U);
    EXPECT_NE(log_.text().find("tokenizer.json is not there"), std::string::npos);
}

TEST_F(Store, KeepsHdf5Quiet) {
    directory_.write("calib.h5", "plain text");
    H5E_auto2_t before = nullptr;
    void* data = nullptr;
    H5Eget_auto2(H5E_DEFAULT, &before, &data);
    ::testing::internal::CaptureStderr();
    expect_refused({"HDF5"});
    EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
    H5E_auto2_t after = nullptr;
    H5Eget_auto2(H5E_DEFAULT, &after, &data);
    EXPECT_EQ(after, before);
}

}  // namespace
}  // namespace quantmill
