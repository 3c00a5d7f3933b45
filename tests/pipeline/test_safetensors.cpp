#include <fmt/ranges.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <random>

#include "pipeline/safetensors.h"
#include "tests/pipeline/expect_error.h"
#include "tests/pipeline/temporary_directory.h"

namespace quantmill {
namespace {

using nlohmann::json;
using testing::expect_error;
using testing::TemporaryDirectory;

std::string little_endian(std::uint64_t value) {
    std::string bytes;
    for (int i = 0; i < 8; ++i) bytes += static_cast<char>(value >> (8 * i));
    return bytes;
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return fmt::format(R"({{"dtype":"{}","shape":{},"data_offsets":{}}})", dtype, shape, offsets);
}

SafetensorsHeader parse(const std::string& text, std::uint64_t data_size) {
    return parse_safetensors_header(text, 8 + text.size() + data_size, "x.safetensors");
}

void expect_refused(const std::string& text, std::uint64_t data_size, const std::vector<std::string>& parts) {
    SCOPED_TRACE(text);
    expect_error<BadInput>([&] { parse(text, data_size); }, parts);
}

std::int64_t peak_memory_kib() {
    struct rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
}

TEST(SafetensorsHeader, GivesTensorsInTheOrderOfTheirData) {
    const std::string text = R"( {"__metadata__":{"format":"pt","by":"me"},"b":)" +
                             entry("BF16", "[2,3]", "[4,16]") + R"(,"s":)" + entry("F32", "[]", "[0,4]") +
                             R"(,"z":)" + entry("I64", "[0,7]", "[16,16]") + "}  ";
    const SafetensorsHeader header = parse(text, 16);
    const std::uint64_t data = 8 + text.size();
    EXPECT_EQ(header.data_begin, data);
    EXPECT_EQ(header.metadata, (std::map<std::string, std::string>{{"by", "me"}, {"format", "pt"}}));
    ASSERT_EQ(header.tensors.size(), 3U);
    EXPECT_EQ(header.tensors[0].name, "s");
    EXPECT_EQ(header.tensors[0].count(), 1);
    EXPECT_TRUE(header.tensors[0].shape.empty());
    EXPECT_EQ(header.tensors[1].name, "b");
    EXPECT_EQ(header.tensors[1].dtype, "BF16");
    EXPECT_EQ(header.tensors[1].shape, (std::vector<std::int64_t>{2, 3}));
    EXPECT_EQ(header.tensors[1].begin, data + 4);
    EXPECT_EQ(header.tensors[1].end, data + 16);
    EXPECT_EQ(header.tensors[1].bytes(), 12U);
    EXPECT_EQ(header.tensors[2].name, "z");
    EXPECT_EQ(header.tensors[2].count(), 0);
    EXPECT_EQ(header.tensors[2].begin, data + 16);
}

TEST(SafetensorsHeader, DecodesNames) {
    const std::string text = R"({"a\"\u00e9\ud83e\udd99/":)" + entry("U8", "[1]", "[0,1]") + "}";
    EXPECT_EQ(parse(text, 1).tensors.at(0).name, "a\"é🦙/");
}

// The corpus test checks every verdict; here the reasons, which must name file, tensor and numbers.
TEST(SafetensorsHeader, RefusalsSayWhatIsWrong) {
    const auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
        return "{\"wte\":" + entry(dtype, shape, offsets) + "}";
    };
    expect_refused(one("F32", "[1]", "[4,0]"), 4, {"x.safetensors", "'wte'", "ends at 0", "begin at 4"});
    expect_refused(one("F32", "[2]", "[0,8]"), 4, {"'wte'", "byte 8", "has 4", "truncated"});
    expect_refused(one("F32", "[1]", "[0,4]"), 8, {"byte 4", "has 8"});
    expect_refused(one("F32", "[2,3]", "[0,4]"), 4, {"'wte'", "F32", "[2, 3]", "4 bytes"});
    expect_refused(one("F32", "[1]", "[4,8]"), 8, {"'wte'", "begins at byte 4", "ends at 0"});
    expect_refused(one("F31", "[1]", "[0,4]"), 4, {"'wte'", "'F31'"});
    expect_refused(one("F32", "[-1]", "[0,4]"), 4, {"'wte'", "shape"});
    expect_refused(one("F32", "[1]", "[0.5,4]"), 4, {"'wte'", "data_offsets", "unsigned"});
    expect_refused(one("F32", "[1]", "[0]"), 4, {"'wte'", "data_offsets"});
    expect_refused(R"({"a":1,"a":2})", 0, {"'a'"});
    expect_refused("{\"a\":" + entry("U8", "[1]", "[0,1]") + ",\"a\":" + entry("U8", "[1]", "[1,2]") + "}", 2,
                   {"'a'", "twice"});
    expect_refused("{\"a\":" + entry("U8", "[2]", "[0,2]") + ",\"b\":" + entry("U8", "[2]", "[1,3]") + "}", 3,
                   {"'b'", "overlaps"});
    expect_refused("{", 0, {"x.safetensors", "not valid JSON"});
    expect_refused("{\"\xFF\":0}", 0, {"not valid JSON", "UTF-8"});
    expect_refused(R"({"__metadata__":{"k":1}})", 0, {"'k'", "not a string"});
}

TEST(SafetensorsHeader, KeepsMessagesShort) {
    const std::string name(1'000'000, 'n');
    try {
        parse("{\"" + name + "\":" + entry("U8", "[1]", "[0,2]") + "}", 2);
        FAIL();
    } catch (const BadInput& error) {
        EXPECT_LT(std::string(error.what()).size(), 1000U);
    }
}

TEST(SafetensorsHeader, EveryTypeHasItsSize) {
    const std::map<std::string, int> bits = {
        {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
        {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
        {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
        {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};
    for (const auto& [dtype, size] : bits) {
        EXPECT_EQ(safetensors_bits(dtype), size) << dtype;
        const std::string text = "{\"t\":" + entry(dtype, "[8]", fmt::format("[0,{}]", size)) + "}";
        EXPECT_EQ(parse(text, static_cast<std::uint64_t>(size)).tensors.at(0).count(), 8) << dtype;
        expect_refused(text, static_cast<std::uint64_t>(size) + 1, {});
    }
    EXPECT_FALSE(safetensors_bits("F3"));
    for (const DType dtype :
         {DType::f64, DType::f32, DType::f16, DType::bf16, DType::i64, DType::i32, DType::u8}) {
        EXPECT_EQ(dtype_from_safetensors(safetensors_name(dtype)), dtype);
        EXPECT_EQ(safetensors_bits(safetensors_name(dtype)), 8 * size_of(dtype));
    }
    EXPECT_EQ(dtype_from_safetensors("BF16"), DType::bf16);
    EXPECT_EQ(dtype_from_safetensors("F16"), DType::f16);
    EXPECT_FALSE(dtype_from_safetensors("F8_E4M3"));
    EXPECT_FALSE(dtype_from_safetensors("bf16"));
}

TEST(SafetensorsHeader, EveryPrefixIsRefused) {
    const std::string text = R"({"__metadata__":{"format":"pt"},"a":)" + entry("BF16", "[2]", "[0,4]") +
                             ",\"b\":" + entry("F32", "[1]", "[4,8]") + "}";
    EXPECT_EQ(parse(text, 8).tensors.size(), 2U);
    for (std::size_t length = 0; length < text.size(); ++length) {
        const std::string cut = text.substr(0, length);
        EXPECT_THROW(parse(cut, 8 + text.size() - length), BadInput) << cut;
    }
}

// Hostile: millions of entries that all lie over one range. Neither time nor memory may explode.
TEST(SafetensorsHeader, MillionsOfEntriesOverOneRange) {
    const auto header = [](std::size_t entries) {
        std::string text = "{";
        for (std::size_t i = 0; i < entries; ++i) {
            text += '"';
            text += std::to_string(i);
            text += R"(":["U8",[4],[0,4]],)";
        }
        text.back() = '}';
        return text;
    };
    const std::string longest = header(3'600'000);
    EXPECT_GT(longest.size(), 95'000'000U);
    std::int64_t before = peak_memory_kib();
    // In four bytes of data only the first two are looked at.
    expect_error<BadInput>([&] { parse(longest, 4); }, {"overlaps"});
    EXPECT_LT(peak_memory_kib() - before, 10'000);
    // With room for all, the ranges must be compared, after one sort.
    const std::string shorter = header(400'000);
    before = peak_memory_kib();
    expect_error<BadInput>([&] { parse(shorter, 1'600'000); }, {"begins at byte 0", "ends at 4"});
    EXPECT_LT(peak_memory_kib() - before, 300'000);
}

TEST(SafetensorsFile, RefusesALengthBeforeAllocating) {
    const TemporaryDirectory directory;
    const std::int64_t before = peak_memory_kib();
    const auto expect_refused_file = [&](const std::string& bytes, const std::string& part) {
        const InputFile file(directory.write("f.safetensors", bytes));
        expect_error<BadInput>([&] { read_safetensors_header(file); }, {"f.safetensors", part});
    };
    expect_refused_file("", "0 bytes");
    expect_refused_file("1234567", "7 bytes");
    expect_refused_file(little_endian(4U << 20U) + "{", "4194304 bytes, 1 are there");
    expect_refused_file(little_endian(100'000'000) + "{}", "100000000");
    expect_refused_file(little_endian(100'000'001) + "{}", "at most 100000000");
    expect_refused_file(little_endian(~std::uint64_t{0}) + "{}", "at most 100000000");
    EXPECT_LT(peak_memory_kib() - before, 50'000);
}

TEST(SafetensorsFile, AcceptsAHeaderOfExactlyTheLimit) {
    const TemporaryDirectory directory;
    std::string bytes = little_endian(100'000'000) + "{}";
    bytes.resize(8 + 100'000'000, ' ');
    EXPECT_TRUE(read_safetensors_header(InputFile(directory.write("f", bytes))).tensors.empty());
    bytes = little_endian(100'000'001) + bytes.substr(8) + " ";
    EXPECT_THROW(read_safetensors_header(InputFile(directory.write("f", bytes))), BadInput);
}

TEST(MakeHeader, IsAPaddedLengthPrefixedJson) {
    std::vector<StoredTensor> tensors = {{"b", "I32", {3}}, {"a\"b", "F16", {2, 3}}, {"e", "BF16", {0}}};
    const std::string bytes = make_safetensors_header(tensors, {{"format", "pt"}});
    ASSERT_EQ(bytes.size() % 8, 0U);
    EXPECT_EQ(bytes.substr(0, 8), little_endian(bytes.size() - 8));
    EXPECT_EQ(bytes[8], '{');
    const json header = json::parse(bytes.substr(8));
    EXPECT_EQ(header, json::parse(R"({"__metadata__":{"format":"pt"},
        "b":{"dtype":"I32","shape":[3],"data_offsets":[0,12]},
        "a\"b":{"dtype":"F16","shape":[2,3],"data_offsets":[12,24]},
        "e":{"dtype":"BF16","shape":[0],"data_offsets":[24,24]}})"));
    EXPECT_EQ(tensors[1].begin, bytes.size() + 12);
    EXPECT_EQ(tensors[1].end, bytes.size() + 24);
}

TEST(MakeHeader, WithoutTensorsOrMetadata) {
    std::vector<StoredTensor> none;
    EXPECT_EQ(make_safetensors_header(none, {}), little_endian(8) + "{}      ");
}

TEST(MakeHeader, RefusesWhatNobodyCouldRead) {
    std::vector<StoredTensor> twice = {{"a", "F16", {1}}, {"a", "F16", {1}}};
    EXPECT_THROW(make_safetensors_header(twice, {}), InternalError);
    std::vector<StoredTensor> reserved = {{"__metadata__", "F16", {1}}};
    EXPECT_THROW(make_safetensors_header(reserved, {}), InternalError);
    std::vector<StoredTensor> unknown = {{"a", "Q4", {1}}};
    EXPECT_THROW(make_safetensors_header(unknown, {}), InternalError);
    std::vector<StoredTensor> half = {{"a", "F4", {3}}};
    EXPECT_THROW(make_safetensors_header(half, {}), InternalError);
    std::vector<StoredTensor> long_name = {{"x", "F16", {1}}};
    long_name[0].name.resize(100'000'000, 'x');
    expect_error<BadInput>([&] { make_safetensors_header(long_name, {}); }, {"100000000", "max_shard_size"});
}

// What is written must read back: names, shapes and types at random.
TEST(MakeHeader, ReadsBack) {
    const unsigned seed = std::random_device{}();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937 random(seed);
    const auto below = [&](std::size_t limit) { return random() % limit; };
    const std::vector<std::string> dtypes = {"F32", "BF16", "I32", "U8", "F8_E4M3", "BOOL", "I64"};
    const std::vector<std::string> pieces = {"a", ".", "weight", "\"", "\\", "\n", "é", "🦙", "{", "\x7f"};
    for (int round = 0; round < 200; ++round) {
        std::vector<StoredTensor> tensors(below(20));
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            tensors[i].name = std::to_string(i);
            for (std::size_t n = below(5); n > 0; --n) tensors[i].name += pieces[below(pieces.size())];
            tensors[i].dtype = dtypes[below(dtypes.size())];
            for (std::size_t n = below(4); n > 0; --n) {
                tensors[i].shape.push_back(static_cast<std::int64_t>(below(5)));
            }
        }
        const std::string bytes = make_safetensors_header(tensors, {{"k\n", "\"v\""}});
        const std::uint64_t size = tensors.empty() ? bytes.size() : tensors.back().end;
        const SafetensorsHeader header = parse_safetensors_header(bytes.substr(8), size, "x");
        EXPECT_EQ(header.metadata.at("k\n"), "\"v\"");
        ASSERT_EQ(header.tensors.size(), tensors.size());
        std::map<std::string, StoredTensor> read;
        for (const StoredTensor& tensor : header.tensors) read[tensor.name] = tensor;
        for (const StoredTensor& tensor : tensors) {
            EXPECT_EQ(read.at(tensor.name).dtype, tensor.dtype);
            EXPECT_EQ(read.at(tensor.name).shape, tensor.shape);
            EXPECT_EQ(read.at(tensor.name).begin, tensor.begin);
            EXPECT_EQ(read.at(tensor.name).end, tensor.end);
        }
    }
}

}  // namespace
}  // namespace quantmill
