#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <random>

#include "kernels/make_backend.h"
#include "pipeline/gptq_format.h"
#include "tests/pipeline/expect_error.h"

namespace quantmill {
namespace {

using nlohmann::json;
using testing::expect_error;

// Bit `position` of a stream of little-endian 32-bit words, one word every `stride`.
bool bit_of(const std::vector<std::byte>& bytes, std::size_t first_word, std::size_t stride,
            std::size_t position) {
    const std::size_t word = first_word + position / 32 * stride;
    const auto byte = static_cast<unsigned>(bytes.at(4 * word + position % 32 / 8));
    return (byte >> (position % 8) & 1U) != 0;
}

// Code k of a stream, gathered bit by bit: bits [k·b, (k + 1)·b), the lowest first.
int code_of(const std::vector<std::byte>& bytes, std::size_t first_word, std::size_t stride, std::size_t k,
            int bits) {
    int code = 0;
    for (int i = 0; i < bits; ++i) {
        const std::size_t position = k * static_cast<std::size_t>(bits) + static_cast<std::size_t>(i);
        code |= static_cast<int>(bit_of(bytes, first_word, stride, position)) << i;
    }
    return code;
}

struct Contents {
    std::vector<std::uint8_t> codes, zeros;  // [R, C], [R, G]
    std::vector<std::uint16_t> scales;       // [R, G]
};

class GptqFormatTest : public ::testing::Test {
protected:
    GptqFormatTest() : backend_(make_backend("cpu", 0)), seed_(std::random_device{}()), random_(seed_) {}

    QuantizedLinear random_linear(std::int64_t rows, std::int64_t columns, const QuantizationGrid& grid) {
        QuantizedLinear linear(*backend_, rows, columns, grid);
        Contents contents;
        const auto max_code = static_cast<unsigned>(grid.max_code());
        for (std::int64_t i = 0; i < rows * columns; ++i)
            contents.codes.push_back(static_cast<std::uint8_t>(random_() & max_code));
        for (std::int64_t i = 0; i < rows * grid.groups(columns); ++i) {
            contents.zeros.push_back(
                static_cast<std::uint8_t>(grid.sym ? (max_code + 1) / 2 : random_() & max_code));
            contents.scales.push_back(static_cast<std::uint16_t>(0x0400U + random_() % 0x7000U));
        }
        backend_->copy_from_host(contents.codes.data(), linear.codes);
        backend_->copy_from_host(contents.zeros.data(), linear.zeros);
        backend_->copy_from_host(contents.scales.data(), linear.scales);
        std::ranges::shuffle(linear.g_idx, random_);  // as desc_act leaves it
        return linear;
    }

    Contents download(const QuantizedLinear& linear) {
        const auto fetch = [this](const Tensor& tensor, auto& values) {
            values.resize(static_cast<std::size_t>(tensor.shape().count()));
            backend_->copy_to_host(tensor, values.data());
        };
        Contents contents;
        fetch(linear.codes, contents.codes);
        fetch(linear.zeros, contents.zeros);
        fetch(linear.scales, contents.scales);
        return contents;
    }

    std::map<std::string, std::vector<std::byte>> encode(const QuantizedLinear& linear, std::int64_t begin,
                                                         std::int64_t end, GptqFormat format) {
        std::map<std::string, std::vector<std::byte>> tensors;
        const auto lane = backend_->make_copy_lane();
        const EncodedLinear encoded(*backend_, *lane, linear, begin, end);
        encoded.write("p", format, [&](const std::string& name, const void* data, std::size_t bytes) {
            const auto* first = static_cast<const std::byte*>(data);
            tensors.emplace(name, std::vector<std::byte>(first, first + bytes));
        });
        return tensors;
    }

    std::unique_ptr<Backend> backend_;
    unsigned seed_;
    std::mt19937 random_;
};

struct Case {
    QuantizationGrid grid;
    GptqFormat format;
    std::int64_t columns = 96;
};

std::vector<Case> cases() {
    std::vector<Case> result;
    for (const int bits : {2, 3, 4, 8}) {
        for (const bool sym : {true, false}) {
            for (const GptqFormat format : {GptqFormat::v1, GptqFormat::v2}) {
                for (const std::int64_t group_size : {32, 64, 96})
                    result.push_back({{bits, group_size, sym}, format});
            }
        }
    }
    return result;
}

TEST_F(GptqFormatTest, EveryBitIsWhereTheFormatSays) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    for (const auto& [grid, format, columns] : cases()) {
        SCOPED_TRACE(fmt::format("{} bits, group {}, sym {}, {}", grid.bits, grid.group_size, grid.sym,
                                 name_of(format)));
        const std::int64_t all_rows = 96, begin = 32, rows = 64;  // a linear in the middle of its group
        const QuantizedLinear linear = random_linear(all_rows, columns, grid);
        const Contents contents = download(linear);
        const auto groups = static_cast<std::size_t>(grid.groups(columns));
        const auto tensors = encode(linear, begin, begin + rows, format);

        const int offset = format == GptqFormat::v1 ? 1 : 0;
        for (std::size_t r = 0; r < rows; ++r) {
            const std::size_t row = begin + r;
            for (std::size_t c = 0; c < static_cast<std::size_t>(columns); ++c) {
                ASSERT_EQ(code_of(tensors.at("p.qweight"), r, rows, c, grid.bits),
                          contents.codes[row * columns + c]);
            }
            for (std::size_t g = 0; g < groups; ++g) {
                const std::size_t words_per_group = rows * grid.bits / 32;
                const int stored = code_of(tensors.at("p.qzeros"), g * words_per_group, 1, r, grid.bits);
                // v1 holds zero − 1, which wraps inside the field.
                ASSERT_EQ((stored + offset) % (1 << grid.bits), contents.zeros[row * groups + g]);
                std::uint16_t scale = 0;
                std::memcpy(&scale, tensors.at("p.scales").data() + 2 * (g * rows + r), 2);
                ASSERT_EQ(scale, contents.scales[row * groups + g]);
            }
        }
        EXPECT_EQ(std::memcmp(tensors.at("p.g_idx").data(), linear.g_idx.data(), 4 * columns), 0);
        for (const StoredTensor& planned : gptq_tensors("p", rows, columns, grid)) {
            const std::size_t bytes =
                static_cast<std::size_t>(planned.count()) * safetensors_bits(planned.dtype).value_or(0) / 8;
            EXPECT_EQ(tensors.at(planned.name).size(), bytes) << planned.name;
        }
    }
}

TEST_F(GptqFormatTest, DecodeUndoesEncode) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    for (const auto& [grid, format, columns] : cases()) {
        const QuantizedLinear linear = random_linear(64, columns, grid);
        const auto tensors = encode(linear, 0, 64, format);
        const GptqScheme scheme{{grid.bits, grid.group_size == columns ? 0 : grid.group_size, grid.sym},
                                format};
        const QuantizedLinear copy = decode_gptq(*backend_, "p", 64, columns, scheme,
                                                 [&](const std::string& name) { return tensors.at(name); });
        const Contents expected = download(linear), got = download(copy);
        EXPECT_EQ(got.codes, expected.codes);
        EXPECT_EQ(got.zeros, expected.zeros);
        EXPECT_EQ(got.scales, expected.scales);
        EXPECT_EQ(copy.g_idx, linear.g_idx);
    }
}

// The words that every reader of symmetric checkpoints knows.
TEST_F(GptqFormatTest, SymmetricZerosOfVersionOne) {
    for (const auto& [bits, word] : {std::pair{2, 0x55555555U}, {4, 0x77777777U}, {8, 0x7F7F7F7FU}}) {
        const auto tensors = encode(random_linear(32, 32, {bits, 32, true}), 0, 32, GptqFormat::v1);
        std::vector<std::uint32_t> words(tensors.at("p.qzeros").size() / 4);
        std::memcpy(words.data(), tensors.at("p.qzeros").data(), 4 * words.size());
        EXPECT_EQ(words, std::vector<std::uint32_t>(words.size(), word));
    }
}

TEST_F(GptqFormatTest, RefusesGroupsOutOfRange) {
    const GptqScheme scheme{{4, 32, true}, GptqFormat::v1};
    for (const std::int32_t bad : {-1, 2}) {
        auto tensors = encode(random_linear(32, 64, scheme.grid), 0, 32, GptqFormat::v1);
        std::memcpy(tensors.at("p.g_idx").data() + 40, &bad, 4);
        expect_error<BadInput>(
            [&] {
                decode_gptq(*backend_, "p", 32, 64, scheme,
                            [&](const std::string& name) { return tensors.at(name); });
            },
            {"p.g_idx", fmt::format("group {}", bad), "0 … 1"});
    }
}

TEST(GptqTensors, NamesTypesAndShapes) {
    const auto tensors = gptq_tensors("m.q", 48, 160, {3, 64, true});  // three groups, the last of 32
    ASSERT_EQ(tensors.size(), 4U);
    const std::vector<std::tuple<std::string, std::string, std::vector<std::int64_t>>> expected = {
        {"m.q.qweight", "I32", {15, 48}},
        {"m.q.qzeros", "I32", {3, 48 * 3 / 32}},
        {"m.q.scales", "F16", {3, 48}},
        {"m.q.g_idx", "I32", {160}}};
    for (std::size_t i = 0; i < 4; ++i) {
        EXPECT_EQ(std::tuple(tensors[i].name, tensors[i].dtype, tensors[i].shape), expected[i]);
    }
}

TEST(GptqObstacle, WhatCannotBeStored) {
    EXPECT_EQ(gptq_obstacle(64, 96, {4, 32, true}, GptqFormat::v1), "");
    EXPECT_EQ(gptq_obstacle(64, 96, {4, 32, false}, GptqFormat::v2), "");
    EXPECT_EQ(gptq_obstacle(8, 96, {4, 32, true}, GptqFormat::v1), "");  // one word of zeros
    EXPECT_NE(gptq_obstacle(64, 100, {4, 32, true}, GptqFormat::v1).find("100 columns"), std::string::npos);
    EXPECT_NE(gptq_obstacle(8, 96, {3, 32, true}, GptqFormat::v2).find("8 rows of 3-bit zeros"),
              std::string::npos);
    EXPECT_NE(gptq_obstacle(64, 96, {4, 32, false}, GptqFormat::v1).find("gptq_v2"), std::string::npos);
}

TEST(GptqScheme, FromQuantizationConfig) {
    const json config{{"quant_method", "gptq"},
                      {"bits", 3},
                      {"group_size", 64},
                      {"sym", false},
                      {"checkpoint_format", "gptq_v2"}};
    const GptqScheme scheme = gptq_scheme_from(config, "config.json");
    EXPECT_EQ(scheme.grid.bits, 3);
    EXPECT_EQ(scheme.grid.group_size, 64);
    EXPECT_FALSE(scheme.grid.sym);
    EXPECT_EQ(scheme.format, GptqFormat::v2);

    const GptqScheme plain =
        gptq_scheme_from({{"quant_method", "gptq"}, {"bits", 4}, {"group_size", -1}}, "config.json");
    EXPECT_EQ(plain.grid.group_size, 0) << "one group a row";
    EXPECT_TRUE(plain.grid.sym);
    EXPECT_EQ(plain.format, GptqFormat::v1) << "what checkpoints of old tools mean";
}

TEST(GptqScheme, RefusesWhatItCannotRead) {
    const json good{{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 64}};
    const std::vector<std::pair<json, std::vector<std::string>>> bad = {
        {{{"quant_method", "awq"}}, {"config.json", "awq", "gptq"}},
        {{{"bits", 5}}, {"config.json", "5 bits", "2 | 3 | 4 | 8"}},
        {{{"bits", "four"}}, {"config.json", "quantization_config"}},
        {{{"group_size", nullptr}}, {"config.json", "quantization_config"}},
        {{{"checkpoint_format", "marlin"}}, {"marlin", "gptq | gptq_v2"}},
    };
    for (const auto& [change, parts] : bad) {
        json config = good;
        config.update(change);
        expect_error<BadInput>([&] { gptq_scheme_from(config, "config.json"); }, parts);
    }
    expect_error<BadInput>([] { gptq_scheme_from(json::object(), "config.json"); },
                           {"config.json", "quant_method"});
}

}  // namespace
}  // namespace quantmill
