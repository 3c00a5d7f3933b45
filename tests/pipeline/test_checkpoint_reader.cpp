#include <gtest/gtest.h>
#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>

#include <cmath>
#include <limits>
#include <random>
#include <sstream>
#include <thread>

#include "kernels/half.h"
#include "pipeline/checkpoint_reader.h"
#include "tests/pipeline/capture_log.h"
#include "tests/pipeline/expect_error.h"
#include "tests/pipeline/temporary_directory.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::CaptureLog;
using testing::expect_error;
using testing::TemporaryDirectory;

// Byte `position` of the tensor `number` of a file: all differ.
char byte_of(std::size_t number, std::size_t position) {
    return static_cast<char>('A' + 20 * number + position);
}

std::string bytes_of(std::size_t number, std::size_t begin, std::size_t end) {
    std::string bytes;
    for (std::size_t position = begin; position < end; ++position) bytes += byte_of(number, position);
    return bytes;
}

std::string file_of(std::vector<StoredTensor> tensors) {
    std::string bytes = make_safetensors_header(tensors, {{"format", "pt"}});
    for (std::size_t i = 0; i < tensors.size(); ++i) bytes += bytes_of(i, 0, tensors[i].bytes());
    return bytes;
}

std::string index_json(const std::map<std::string, std::string>& weight_map, json total_size = 34) {
    return json{{"metadata", {{"total_size", std::move(total_size)}}}, {"weight_map", weight_map}}.dump();
}

constexpr const char* kIndex = "model.safetensors.index.json";

class Checkpoint : public ::testing::Test {
protected:
    // Two shards of 10 and 24 bytes with a correct index.
    void SetUp() override {
        directory_.write("config.json", R"({"model_type":"llama","hidden_size":4})");
        directory_.write("one.safetensors", file_of({{"norm", "BF16", {5}}}));
        directory_.write("two.safetensors", file_of({{"up", "F32", {2, 2}}, {"down", "F16", {4, 1}}}));
        write_index({{"norm", "one.safetensors"}, {"up", "two.safetensors"}, {"down", "two.safetensors"}});
    }
    void write_index(const std::map<std::string, std::string>& weight_map) {
        directory_.write(kIndex, index_json(weight_map));
    }
    void expect_refused(const std::vector<std::string>& parts) {
        expect_error<BadInput>([&] { CheckpointReader(directory_.path()); }, parts);
    }
    TemporaryDirectory directory_;
};

TEST_F(Checkpoint, ReadsShardsThroughTheIndex) {
    const CheckpointReader reader(directory_.path());
    EXPECT_EQ(reader.directory(), directory_.path());
    EXPECT_EQ(reader.config().at("hidden_size"), 4);
    EXPECT_EQ(reader.tensors().size(), 3U);
    EXPECT_EQ(reader.total_bytes(), 34U);
    EXPECT_EQ(reader.files(),
              (std::vector<fs::path>{directory_ / "one.safetensors", directory_ / "two.safetensors"}));
    EXPECT_TRUE(reader.contains("up"));
    EXPECT_FALSE(reader.contains("gate"));
    EXPECT_EQ(reader.find("up").dtype, "F32");
    EXPECT_EQ(reader.find("up", {2, 2}).bytes(), 16U);
    EXPECT_EQ(reader.file_of("down"), directory_ / "two.safetensors");
    EXPECT_EQ(reader.file_of("norm"), directory_ / "one.safetensors");

    std::string bytes(16, '?');
    reader.read("up", bytes.data());
    EXPECT_EQ(bytes, bytes_of(0, 0, 16));
    reader.read("down", 6, bytes.data(), 2);
    EXPECT_EQ(bytes, bytes_of(1, 6, 8) + bytes_of(0, 2, 16));
    reader.read("norm", 10, bytes.data(), 0);
}

TEST_F(Checkpoint, ReadsASingleFile) {
    fs::remove(directory_ / kIndex);
    fs::rename(directory_ / "two.safetensors", directory_ / "model.safetensors");
    const CheckpointReader reader(directory_.path());
    EXPECT_EQ(reader.tensors().size(), 2U);
    EXPECT_EQ(reader.files(), std::vector<fs::path>{directory_ / "model.safetensors"});
    EXPECT_EQ(reader.total_bytes(), 24U);
}

TEST_F(Checkpoint, FollowsSymbolicLinks) {
    const TemporaryDirectory cache;
    for (const char* name : {"config.json", "one.safetensors", "two.safetensors", kIndex}) {
        const fs::path blob = cache / (std::string("blob-") + name);
        fs::rename(directory_ / name, blob);
        fs::create_symlink(blob, directory_ / name);
    }
    EXPECT_EQ(CheckpointReader(directory_.path()).tensors().size(), 3U);
    fs::create_directory_symlink(directory_.path(), cache / "snapshot");
    EXPECT_EQ(CheckpointReader(cache / "snapshot").tensors().size(), 3U);
}

TEST_F(Checkpoint, ReadsFromManyThreads) {
    const CheckpointReader reader(directory_.path());
    std::vector<std::thread> threads;
    std::atomic<int> wrong = 0;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            std::string bytes(16, '?');
            for (int round = 0; round < 200; ++round) {
                reader.read("up", bytes.data());
                if (bytes != bytes_of(0, 0, 16)) ++wrong;
                reader.read("down", bytes.data());
                if (bytes.substr(0, 8) != bytes_of(1, 0, 8)) ++wrong;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
}

TEST_F(Checkpoint, MissingTensorAndWrongShape) {
    const CheckpointReader reader(directory_.path());
    expect_error<BadInput>([&] { reader.find("gate"); }, {directory_.path().string(), "'gate'"});
    expect_error<BadInput>([&] { reader.file_of("gate"); }, {"'gate'"});
    expect_error<BadInput>([&] { reader.find("up", {4, 1}); },
                           {"two.safetensors", "'up'", "[2, 2]", "[4, 1]"});
    EXPECT_THROW(reader.find("up", {2, 2, 1}), BadInput);
    char byte = 0;
    expect_error<InternalError>([&] { reader.read("up", 16, &byte, 1); }, {"'up'", "16"});
    expect_error<InternalError>([&] { reader.read("up", 17, &byte, 0); }, {"'up'"});
    expect_error<InternalError>([&] { reader.read("up", 1, &byte, ~std::size_t{0}); }, {"'up'"});
}

TEST_F(Checkpoint, DirectoryOrConfigMissing) {
    expect_error<BadInput>([&] { CheckpointReader(directory_ / "none"); }, {"none", "Hugging Face"});
    expect_error<BadInput>([&] { CheckpointReader(directory_ / "config.json"); }, {"no directory"});
    fs::remove(directory_ / "config.json");
    expect_refused({directory_.path().string(), "no config.json"});
}

TEST_F(Checkpoint, BrokenConfig) {
    directory_.write("config.json", "{\"hidden_size\": }");
    expect_refused({"config.json", "not valid JSON", "line 1"});
    directory_.write("config.json", "[1]");
    expect_refused({"config.json", "not a JSON object"});
}

TEST_F(Checkpoint, NoWeights) {
    fs::remove(directory_ / kIndex);
    directory_.write("pytorch_model.bin", "x");
    expect_refused({directory_.path().string(), kIndex, "model.safetensors", "converted to safetensors"});
}

TEST_F(Checkpoint, IndexAndASingleFileOfOthers) {
    directory_.write("model.safetensors", file_of({{"norm", "BF16", {5}}}));
    expect_refused({"both", "model.safetensors"});
}

TEST_F(Checkpoint, IndexOfASingleFile) {
    fs::rename(directory_ / "one.safetensors", directory_ / "model.safetensors");
    write_index({{"norm", "model.safetensors"}});
    EXPECT_EQ(CheckpointReader(directory_.path()).tensors().size(), 1U);
}

TEST_F(Checkpoint, MissingShard) {
    fs::remove(directory_ / "one.safetensors");
    expect_refused({kIndex, "one.safetensors", "incomplete"});
    fs::create_symlink(directory_ / "gone", directory_ / "one.safetensors");
    expect_refused({"one.safetensors", "incomplete"});
}

TEST_F(Checkpoint, TruncatedShard) {
    fs::resize_file(directory_ / "two.safetensors", fs::file_size(directory_ / "two.safetensors") - 1);
    expect_refused({"two.safetensors", "truncated"});
    fs::resize_file(directory_ / "two.safetensors", 4);
    expect_refused({"two.safetensors"});
}

TEST_F(Checkpoint, ShardTruncatedAfterOpening) {
    const CheckpointReader reader(directory_.path());
    fs::resize_file(directory_ / "two.safetensors", fs::file_size(directory_ / "two.safetensors") - 1);
    std::string bytes(8, '?');
    expect_error<BadInput>([&] { reader.read("down", bytes.data()); }, {"two.safetensors", "truncated"});
}

TEST_F(Checkpoint, MissingIndexEntry) {
    write_index({{"norm", "one.safetensors"}, {"up", "two.safetensors"}});
    expect_refused({"'down'", "two.safetensors", "missing from", kIndex});
}

TEST_F(Checkpoint, IndexEntryWithoutTensor) {
    write_index({{"norm", "one.safetensors"},
                 {"up", "two.safetensors"},
                 {"down", "two.safetensors"},
                 {"gate", "two.safetensors"}});
    expect_refused({"'gate'", "two.safetensors", kIndex});
}

TEST_F(Checkpoint, IndexNamesTheWrongShard) {
    write_index({{"norm", "two.safetensors"}, {"up", "one.safetensors"}, {"down", "two.safetensors"}});
    expect_refused({"'norm'", "two.safetensors"});
}

TEST_F(Checkpoint, DoubledTensor) {
    directory_.write("one.safetensors", file_of({{"norm", "BF16", {5}}, {"up", "F32", {2, 2}}}));
    expect_refused({"'up'", "one.safetensors", "two.safetensors"});
}

TEST_F(Checkpoint, BrokenIndex) {
    directory_.write(kIndex, "{");
    expect_refused({kIndex, "not valid JSON"});
    directory_.write(kIndex, "{}");
    expect_refused({kIndex, "weight_map"});
    directory_.write(kIndex, R"({"weight_map":["a"]})");
    expect_refused({kIndex, "weight_map"});
    directory_.write(kIndex, R"({"weight_map":{}})");
    expect_refused({kIndex, "weight_map is empty"});
    directory_.write(kIndex, R"({"weight_map":{"norm":1}})");
    expect_refused({kIndex, "'norm'"});
}

TEST_F(Checkpoint, IndexMustStayInTheDirectory) {
    const TemporaryDirectory other;
    other.write("one.safetensors", file_of({{"norm", "BF16", {5}}}));
    const std::string sibling = other.path().filename().string();
    for (const std::string& name :
         {"../" + sibling + "/one.safetensors", (other / "one.safetensors").string(),
          "sub/../../" + sibling + "/one.safetensors", std::string()}) {
        write_index({{"norm", name}});
        expect_refused({kIndex, "'" + name + "'"});
    }
}

TEST_F(Checkpoint, AWrongTotalSizeIsOnlyAWarning) {
    {
        const CaptureLog log;
        const CheckpointReader reader(directory_.path());
        EXPECT_EQ(log.text(), "");
    }
    for (const json& total : {json(33), json(33.0), json(1e300), json(-1)}) {
        directory_.write(
            kIndex,
            index_json({{"norm", "one.safetensors"}, {"up", "two.safetensors"}, {"down", "two.safetensors"}},
                       total));
        const CaptureLog log;
        EXPECT_EQ(CheckpointReader(directory_.path()).total_bytes(), 34U);
        EXPECT_NE(log.text().find("total_size"), std::string::npos) << total;
    }
    directory_.write(kIndex, R"({"metadata":null,"weight_map":{"norm":"one.safetensors"}})");
    EXPECT_EQ(CheckpointReader(directory_.path()).total_bytes(), 10U);
}

template <class T, class Make>
void expect_found_anywhere(const std::string& dtype, Make make) {
    const unsigned seed = std::random_device{}();
    SCOPED_TRACE(fmt::format("{}, seed {}", dtype, seed));
    std::mt19937 random(seed);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()}) {
        for (int round = 0; round < 20; ++round) {
            const auto rows = static_cast<std::int64_t>(random() % 200 + 1);
            const auto columns = static_cast<std::int64_t>(random() % 100 + 1);
            std::vector<T> data(static_cast<std::size_t>(rows * columns));
            for (T& value : data) value = make(static_cast<float>(random() % 1000) - 500.0F);
            const StoredTensor tensor{"w", dtype, {rows, columns}};
            EXPECT_NO_THROW(require_finite(tensor, data.data(), "f.safetensors"));
            const std::size_t position = random() % data.size();
            data[position] = make(bad);
            const auto width = static_cast<std::size_t>(columns);
            expect_error<BadInput>([&] { require_finite(tensor, data.data(), "f.safetensors"); },
                                   {"f.safetensors", "'w'", fmt::format("holds {} at", bad),
                                    fmt::format("row {}, column {}:", position / width, position % width)});
        }
    }
}

TEST(RequireFinite, FindsNanAndInfinityAnywhere) {
    expect_found_anywhere<float>("F32", [](float value) { return value; });
    expect_found_anywhere<double>("F64", [](float value) { return static_cast<double>(value); });
    expect_found_anywhere<Half>("F16", [](float value) { return to_half(value); });
    expect_found_anywhere<BFloat16>("BF16", [](float value) { return to_bfloat16(value); });
}

TEST(RequireFinite, NamesTheFirst) {
    std::vector<float> data(10'000, 0.0F);
    data[9'999] = data[5'000] = std::nanf("");
    expect_error<BadInput>([&] { require_finite({"w", "F32", {100, 100}}, data.data(), "f"); },
                           {"row 50, column 0:"});
    expect_error<BadInput>([&] { require_finite({"w", "F32", {10'000}}, data.data(), "f"); },
                           {"index [5000]"});
    expect_error<BadInput>([&] { require_finite({"w", "F32", {10, 10, 100}}, data.data(), "f"); },
                           {"index [5, 0, 0]"});
}

TEST(RequireFinite, NamesThePlaceInTheTensorOfAPiece) {
    std::vector<float> data(10'000, 0.0F);
    data[5'003] = std::nanf("");
    const StoredTensor tensor{"w", "F32", {100, 100}};
    const auto check = [&](std::size_t first, std::size_t count) {
        require_finite(tensor, first * sizeof(float), &data[first], count * sizeof(float), "f");
    };
    check(0, 5'003);
    check(5'004, 4'996);
    expect_error<BadInput>([&] { check(5'003, 1); }, {"row 50, column 3:"});
    expect_error<BadInput>([&] { check(4'000, 6'000); }, {"row 50, column 3:"});
}

// Every bit pattern of the 16-bit types against the C library's classification.
TEST(RequireFinite, AgreesWithTheLibraryOnEveryPattern) {
    for (std::uint32_t bits = 0; bits < 65536; ++bits) {
        const Half half{static_cast<std::uint16_t>(bits)};
        const BFloat16 bfloat{static_cast<std::uint16_t>(bits)};
        const auto finite = [](const std::string& dtype, const void* data) {
            try {
                require_finite({"w", dtype, {}}, data, "f");
                return true;
            } catch (const BadInput&) {
                return false;
            }
        };
        ASSERT_EQ(finite("F16", &half), std::isfinite(to_float(half))) << bits;
        ASSERT_EQ(finite("BF16", &bfloat), std::isfinite(to_float(bfloat))) << bits;
    }
}

TEST(RequireFinite, LeavesOtherTypesAlone) {
    const std::vector<std::uint8_t> ones(64, 0xFF);
    for (const char* dtype : {"I32", "U8", "I64", "F8_E4M3", "BOOL"}) {
        EXPECT_NO_THROW(require_finite({"w", dtype, {8}}, ones.data(), "f"));
    }
    EXPECT_NO_THROW(require_finite({"w", "F32", {0, 4}}, nullptr, "f"));
    EXPECT_THROW(require_finite({"w", "F32", {16}}, ones.data(), "f"), BadInput);
    // Data of a file need not be aligned.
    EXPECT_THROW(require_finite({"w", "F32", {15}}, ones.data() + 1, "f"), BadInput);
}

}  // namespace
}  // namespace quantmill
