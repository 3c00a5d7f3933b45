#include "pipeline/calibration_store.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "kernels/error.h"
#include "pipeline/files.h"
#include "pipeline/hdf5_handle.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr hsize_t kRowsAtOnce = 256;  // of /input_ids; bounds the read buffer

// The open file with what its messages need.
class StoreFile {
public:
    explicit StoreFile(const fs::path& path) : name_(path.string()), file_(open(path)) {}

    std::vector<hsize_t> extents(const char* data_set) const;
    // Rows [begin, begin + count) along the first axis of an int32 data set.
    void read_rows(const char* data_set, hsize_t begin, hsize_t count, std::int32_t* out) const;
    std::int64_t integer_attribute(const char* name) const;
    std::string text_attribute(const char* name) const;

    template <class... Args>
    [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
        throw BadInput("calibration store {}: {}", name_, fmt::format(format, std::forward<Args>(args)...));
    }
    // Every status of HDF5 passes here.
    template <class Status>
    Status check(Status status, const char* what) const {
        if (status < 0) fail("{}: HDF5 says: {}", what, hdf5_reason());
        return status;
    }

private:
    Handle open(const fs::path& path) const;
    Handle open_data_set(const char* name) const;
    Handle open_attribute(const char* name) const;
    Handle checked(hid_t id, herr_t (*close)(hid_t), const char* what) const {
        return {check(id, what), close};
    }

    std::string name_;
    Handle file_;
};

Handle StoreFile::open(const fs::path& path) const {
    const InputFile readable(path);  // says plainly when it is missing or must not be read
    const Handle access = checked(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, "access properties");
    // Cluster file systems without locks would refuse a plain read.
    check(H5Pset_file_locking(access.get(), 1, 1), "file locking");
    Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose);
    if (!file) {
        fail("this is not a readable HDF5 file ({}): tools/calibrate.py writes one", hdf5_reason());
    }
    return file;
}

Handle StoreFile::open_data_set(const char* name) const {
    if (check(H5Lexists(file_.get(), name, H5P_DEFAULT), name) == 0) {
        fail("it has no data set {}", name);
    }
    Handle set = checked(H5Dopen2(file_.get(), name, H5P_DEFAULT), H5Dclose, name);
    const Handle type = checked(H5Dget_type(set.get()), H5Tclose, name);
    if (H5Tget_class(type.get()) != H5T_INTEGER || H5Tget_size(type.get()) != 4 ||
        H5Tget_sign(type.get()) != H5T_SGN_2) {
        fail("data set {} does not hold int32", name);
    }
    return set;
}

std::vector<hsize_t> StoreFile::extents(const char* data_set) const {
    const Handle set = open_data_set(data_set);
    const Handle space = checked(H5Dget_space(set.get()), H5Sclose, data_set);
    const int rank = check(H5Sget_simple_extent_ndims(space.get()), data_set);
    std::vector<hsize_t> result(static_cast<std::size_t>(rank));
    check(H5Sget_simple_extent_dims(space.get(), result.data(), nullptr), data_set);
    return result;
}

void StoreFile::read_rows(const char* data_set, hsize_t begin, hsize_t count, std::int32_t* out) const {
    const Handle set = open_data_set(data_set);
    const Handle space = checked(H5Dget_space(set.get()), H5Sclose, data_set);
    std::array<hsize_t, H5S_MAX_RANK> start = {begin};
    std::array<hsize_t, H5S_MAX_RANK> size = {};
    const int rank = check(H5Sget_simple_extent_dims(space.get(), size.data(), nullptr), data_set);
    size[0] = count;
    check(H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, start.data(), nullptr, size.data(), nullptr),
          data_set);
    const Handle memory = checked(H5Screate_simple(rank, size.data(), nullptr), H5Sclose, data_set);
    check(H5Dread(set.get(), H5T_NATIVE_INT32, memory.get(), space.get(), H5P_DEFAULT, out), data_set);
}

Handle StoreFile::open_attribute(const char* name) const {
    if (check(H5Aexists(file_.get(), name), name) == 0) fail("it has no attribute {}", name);
    return checked(H5Aopen(file_.get(), name, H5P_DEFAULT), H5Aclose, name);
}

std::int64_t StoreFile::integer_attribute(const char* name) const {
    const Handle attribute = open_attribute(name);
    const Handle type = checked(H5Aget_type(attribute.get()), H5Tclose, name);
    const Handle space = checked(H5Aget_space(attribute.get()), H5Sclose, name);
    if (H5Tget_class(type.get()) != H5T_INTEGER || H5Sget_simple_extent_npoints(space.get()) != 1) {
        fail("attribute {} is not one integer", name);
    }
    std::int64_t value = 0;
    check(H5Aread(attribute.get(), H5T_NATIVE_INT64, &value), name);
    return value;
}

std::string StoreFile::text_attribute(const char* name) const {
    const Handle attribute = open_attribute(name);
    const Handle type = checked(H5Aget_type(attribute.get()), H5Tclose, name);
    const Handle space = checked(H5Aget_space(attribute.get()), H5Sclose, name);
    if (H5Tget_class(type.get()) != H5T_STRING || H5Sget_simple_extent_npoints(space.get()) != 1) {
        fail("attribute {} is not one string", name);
    }
    if (check(H5Tis_variable_str(type.get()), name) > 0) {
        char* text = nullptr;
        check(H5Aread(attribute.get(), type.get(), static_cast<void*>(&text)), name);
        const std::unique_ptr<char, herr_t (*)(void*)> owner(text, &H5free_memory);
        return text == nullptr ? "" : text;
    }
    std::string text(H5Tget_size(type.get()), '\0');
    check(H5Aread(attribute.get(), type.get(), text.data()), name);
    text.resize(std::min(text.find('\0'), text.size()));
    return text;
}

void check_tokenizer(const StoreFile& file, const CalibrationStore& store,
                     const CalibrationRequest& request) {
    std::error_code ignored;
    if (!fs::exists(request.tokenizer_json, ignored)) {
        spdlog::warn("{} is not there: cannot check that the calibration tokens suit the model",
                     request.tokenizer_json.empty() ? "tokenizer.json" : request.tokenizer_json.string());
        return;
    }
    const std::string expected = sha256_of_file(request.tokenizer_json);
    if (store.tokenizer == expected) return;
    if (request.allow_tokenizer_mismatch) {
        spdlog::warn(
            "the calibration tokens were made with another tokenizer than {}; going on "
            "because calibration.allow_tokenizer_mismatch is set",
            request.tokenizer_json.string());
        return;
    }
    file.fail(
        "its tokens were made with another tokenizer (sha256 '{}') than {} (sha256 {}): tokenize "
        "again with tools/calibrate.py, or set calibration.allow_tokenizer_mismatch: true when "
        "both "
        "give the same ids",
        store.tokenizer, request.tokenizer_json.string(), expected);
}

void check_request(const StoreFile& file, const CalibrationRequest& request, hsize_t available) {
    if (request.sequences && *request.sequences < 1) {
        file.fail("calibration.sequences is {}: at least one is needed", *request.sequences);
    }
    if (request.sequence_length && *request.sequence_length < 1) {
        file.fail("calibration.sequence_length is {}: at least one token is needed",
                  *request.sequence_length);
    }
    if (available == 0) file.fail("it holds no sequences");
    if (request.sequences && static_cast<hsize_t>(*request.sequences) > available) {
        file.fail(
            "it holds {} sequences, calibration.sequences asks for {}: lower it, or write more "
            "with tools/calibrate.py --sequences",
            available, *request.sequences);
    }
}

// One row of the file: ids, then -1 up to its end.
std::vector<std::int32_t> take_sequence(const StoreFile& file, const std::int32_t* row, std::size_t number,
                                        std::size_t length, std::size_t width,
                                        const CalibrationRequest& request) {
    for (std::size_t position = 0; position < width; ++position) {
        const std::int32_t id = row[position];
        if (position < length && (id < 0 || id >= request.vocab_size)) {
            file.fail("sequence {}, position {}: id {} is outside the model's vocabulary of {}", number,
                      position, id, request.vocab_size);
        }
        if (position >= length && id != -1) {
            file.fail("sequence {} has the length {} but id {} at position {}, where -1 should pad it",
                      number, length, id, position);
        }
    }
    if (request.sequence_length) {
        length = std::min(length, static_cast<std::size_t>(*request.sequence_length));
    }
    return {row, row + length};
}

std::vector<std::int32_t> read_lengths(const StoreFile& file, hsize_t rows, hsize_t width) {
    if (file.extents("/lengths") != std::vector<hsize_t>{rows}) {
        file.fail("/lengths must hold one number for each of the {} rows of /input_ids", rows);
    }
    std::vector<std::int32_t> lengths(rows);
    if (rows > 0) file.read_rows("/lengths", 0, rows, lengths.data());
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        if (lengths[i] < 1 || static_cast<hsize_t>(lengths[i]) > width) {
            file.fail("sequence {} has the length {}: it must lie in [1, {}]", i, lengths[i], width);
        }
    }
    return lengths;
}

}  // namespace

CalibrationStore load_calibration_store(const fs::path& path, const CalibrationRequest& request) {
    const QuietErrors quiet;
    const StoreFile file(path);
    const std::vector<hsize_t> extents = file.extents("/input_ids");
    if (extents.size() != 2) file.fail("/input_ids has {} dimensions instead of 2", extents.size());
    const auto [rows, width] = std::pair(extents[0], extents[1]);

    CalibrationStore store;
    store.sequence_length = static_cast<std::int64_t>(width);
    store.vocab_size = file.integer_attribute("vocab_size");
    store.tokenizer = file.text_attribute("tokenizer");
    store.source = file.text_attribute("source");
    check_request(file, request, rows);
    if (store.vocab_size < 1 || store.vocab_size > request.vocab_size) {
        file.fail(
            "its vocabulary of {} ids does not fit the model's of {}: it was made for another "
            "model",
            store.vocab_size, request.vocab_size);
    }
    check_tokenizer(file, store, request);

    const std::vector<std::int32_t> lengths = read_lengths(file, rows, width);
    const hsize_t wanted = request.sequences ? static_cast<hsize_t>(*request.sequences) : rows;
    std::vector<std::int32_t> buffer(std::min(kRowsAtOnce, wanted) * width);
    for (hsize_t begin = 0; begin < wanted; begin += kRowsAtOnce) {
        const hsize_t count = std::min(kRowsAtOnce, wanted - begin);
        file.read_rows("/input_ids", begin, count, buffer.data());
        for (hsize_t i = 0; i < count; ++i) {
            store.sequences.push_back(take_sequence(file, buffer.data() + i * width, begin + i,
                                                    static_cast<std::size_t>(lengths[begin + i]), width,
                                                    request));
        }
    }
    return store;
}

}  // namespace quantmill
