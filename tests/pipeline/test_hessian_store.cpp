#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>

#include "pipeline/fingerprint.h"
#include "pipeline/hessian_store.h"
#include "tests/pipeline/expect_error.h"
#include "tests/pipeline/tiny_checkpoint.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using testing::expect_error;
using testing::TemporaryDirectory;

class HessianStoreTest : public ::testing::Test {
protected:
    HessianStore store(const HessianOrigin& origin) const { return {directory_ / "store", graph_, origin}; }

    std::vector<StoredHessian> random_block() {
        std::vector<StoredHessian> stages;
        for (const Stage& stage : graph_.stages) {
            const std::int64_t n = stage.group.columns();
            StoredHessian& hessian = stages.emplace_back();
            for (std::int64_t i = 0; i < n; ++i) {
                hessian.exponents.push_back(static_cast<std::int32_t>(random_() % 60) - 30);
            }
            for (std::int64_t i = 0; i < n * (n + 1) / 2; ++i) {
                hessian.sum.push_back(static_cast<std::int64_t>(random_()));
            }
        }
        return stages;
    }

    fs::path block(int number) const { return directory_ / fmt::format("store/block-{:05}.h5", number); }

    TemporaryDirectory directory_;
    ModelGraph graph_ = build_model_graph(testing::tiny_config("LlamaForCausalLM"), "config.json");
    HessianOrigin origin_{"tiny", "aaaa", "bbbb", 3, 70};
    std::mt19937_64 random_{std::random_device{}()};
};

TEST_F(HessianStoreTest, ReadsWhatWasWritten) {
    const HessianStore store = this->store(origin_);
    store.require_no_other();
    EXPECT_FALSE(fs::exists(directory_ / "store"));
    store.prepare();
    std::vector<std::vector<StoredHessian>> blocks;
    for (int b = 0; b < graph_.blocks; ++b) {
        blocks.push_back(random_block());
        store.write_block(b, blocks.back());
    }
    store.require_complete();
    std::uint64_t bytes = 0;
    for (int b = 0; b < graph_.blocks; ++b) bytes += fs::file_size(block(b));
    EXPECT_LE(store.bytes(), bytes);
    EXPECT_LE(bytes - store.bytes(), 40'000U * static_cast<unsigned>(graph_.blocks));  // what HDF5 adds
    store.prepare();  // again: a job that is repeated
    for (int b = 0; b < graph_.blocks; ++b) {
        EXPECT_FALSE(fs::exists(block(b).string() + ".partial"));
        for (std::size_t s = 0; s < graph_.stages.size(); ++s) {
            const StoredHessian read = store.read(b, s);
            EXPECT_EQ(read.exponents, blocks[static_cast<std::size_t>(b)][s].exponents);
            EXPECT_EQ(read.sum, blocks[static_cast<std::size_t>(b)][s].sum);
        }
    }
}

TEST_F(HessianStoreTest, SaysWhatDiffers) {
    store(origin_).prepare();
    for (int b = 0; b < graph_.blocks; ++b) store(origin_).write_block(b, random_block());
    const auto refused = [&](const HessianOrigin& origin, const std::vector<std::string>& parts) {
        expect_error<BadInput>([&] { store(origin).require_complete(); }, parts);
        expect_error<BadInput>([&] { store(origin).prepare(); }, parts);
        expect_error<BadInput>([&] { store(origin).require_no_other(); }, parts);
    };
    refused({"other", "cccc", "bbbb", 3, 70},
            {"block-00000.h5", "of another model: tiny (weights aaaa), the job's is other"});
    refused(
        {"tiny", "aaaa", "dddd", 2, 50},
        {"of other calibration tokens: 3 sequences with 70 tokens (bbbb), the job's are 2 with 50 (dddd)"});
    refused({"other", "cccc", "dddd", 3, 70}, {"another model", "; ", "other calibration tokens"});
}

TEST_F(HessianStoreTest, UnfinishedAndBrokenStoresAreRefused) {
    expect_error<BadInput>([&] { store(origin_).require_complete(); }, {"2 of 2 blocks are missing"});
    store(origin_).prepare();
    store(origin_).write_block(0, random_block());
    expect_error<BadInput>([&] { store(origin_).require_complete(); },
                           {"1 of 2 blocks are missing, block-00001.h5 first"});
    const std::string whole = testing::contents(block(0));
    directory_.write("store/block-00000.h5", whole.substr(0, whole.size() / 2));
    expect_error<BadInput>([&] { store(origin_).require_complete(); }, {"block-00000.h5", "make it again"});
    directory_.write("store/block-00000.h5", "not HDF5 at all");
    expect_error<BadInput>([&] { store(origin_).require_complete(); }, {"block-00000.h5", "make it again"});

    // A flipped bit is found, unless nobody reads it.
    const auto stages = random_block();
    store(origin_).write_block(0, stages);
    const std::string fresh = testing::contents(block(0));
    int found = 0;
    for (int round = 0; round < 40; ++round) {
        std::string broken = fresh;
        broken[broken.size() / 2 + random_() % (broken.size() / 2)] ^= static_cast<char>(1U << random_() % 8);
        directory_.write("store/block-00000.h5", broken);
        try {
            for (std::size_t s = 0; s < stages.size(); ++s)
                EXPECT_EQ(store(origin_).read(0, s).sum, stages[s].sum);
        } catch (const BadInput& error) {
            ++found;
            EXPECT_NE(std::string(error.what()).find("block-00000.h5"), std::string::npos) << error.what();
        }
    }
    EXPECT_GT(found, 20);
}

TEST(Fingerprint, ChangesWithWeightsConfigurationAndTokens) {
    TemporaryDirectory directory;
    auto config = testing::tiny_config("LlamaForCausalLM");
    testing::write_tiny_checkpoint(directory, config);
    const auto fingerprint = [&] { return fingerprint_of_model(CheckpointReader(directory.path())); };
    const std::string first = fingerprint();
    EXPECT_EQ(first.size(), 64U);
    EXPECT_EQ(fingerprint(), first);
    std::string weights = testing::contents(directory / "model.safetensors");
    weights[weights.size() - 3] ^= 1;
    directory.write("model.safetensors", weights);
    const std::string second = fingerprint();
    EXPECT_NE(second, first);
    config["rope_theta"] = 5e5;
    directory.write("config.json", config.dump());
    EXPECT_NE(fingerprint(), second);

    EXPECT_EQ(fingerprint_of_tokens({{1, 2}, {3}}), fingerprint_of_tokens({{1, 2}, {3}}));
    EXPECT_NE(fingerprint_of_tokens({{1, 2}, {3}}), fingerprint_of_tokens({{1}, {2, 3}}));
}

}  // namespace
}  // namespace quantmill
