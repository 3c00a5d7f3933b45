#include <fcntl.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "pipeline/checkpoint_reader.h"
#include "pipeline/checkpoint_writer.h"
#include "pipeline/output_directory.h"
#include "tests/pipeline/capture_log.h"
#include "tests/pipeline/expect_error.h"
#include "tests/pipeline/temporary_directory.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::CaptureLog;
using testing::contents;
using testing::expect_error;
using testing::TemporaryDirectory;

constexpr const char* kIndex = "model.safetensors.index.json";
constexpr const char* kFirstOfOne = "model-00001-of-00001.safetensors";

std::set<std::string> names_in(const fs::path& directory) {
    std::set<std::string> names;
    for (const auto& entry : fs::recursive_directory_iterator(directory)) {
        if (!entry.is_directory() && entry.path().parent_path() != directory / ".quantmill")
            names.insert(entry.path().lexically_relative(directory).string());
    }
    return names;
}

// Bytes that depend on name and position, so that a misplaced tensor shows.
std::string pattern(const StoredTensor& tensor) {
    std::mt19937 random(static_cast<unsigned>(std::hash<std::string>{}(tensor.name)));
    std::string bytes(tensor.bytes(), '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    return bytes;
}

std::vector<StoredTensor> random_tensors(std::mt19937& random, std::size_t count) {
    const std::vector<std::string> dtypes = {"I32", "F16", "BF16", "F32", "U8", "F8_E4M3", "I64"};
    std::vector<StoredTensor> tensors(count);
    for (std::size_t i = 0; i < count; ++i) {
        tensors[i].name = fmt::format("model.layers.{}.\"é\".weight", i);
        tensors[i].dtype = dtypes[random() % dtypes.size()];
        for (std::size_t n = random() % 3; n > 0; --n) {
            tensors[i].shape.push_back(static_cast<std::int64_t>(random() % 40));
        }
    }
    return tensors;
}

void write_all(CheckpointWriter& writer, const std::vector<OutputShard>& shards) {
    for (const OutputShard& shard : shards) {
        for (const StoredTensor& tensor : shard.tensors) {
            if (writer.owns(tensor.name)) {
                writer.write(tensor.name, pattern(tensor).data(), tensor.bytes());
            }
        }
    }
}

TEST(LayoutShards, OneShard) {
    const auto shards = layout_shards({{"a", "F16", {3}}, {"b", "I32", {2, 2}}}, 1'000'000);
    ASSERT_EQ(shards.size(), 1U);
    EXPECT_EQ(shards[0].file_name, kFirstOfOne);
    EXPECT_EQ(shards[0].header.size() % 8, 0U);
    EXPECT_EQ(shards[0].bytes, shards[0].header.size() + 22);
    const json header = json::parse(shards[0].header.substr(8));
    EXPECT_EQ(header.at("__metadata__"), json::parse(R"({"format":"pt"})"));
    // The wider element comes first, so that both are aligned.
    EXPECT_EQ(header.at("b").at("data_offsets"), json({0, 16}));
    EXPECT_EQ(header.at("a").at("data_offsets"), json({16, 22}));
}

TEST(LayoutShards, NamesAndNumbers) {
    std::vector<StoredTensor> tensors;
    for (int i = 0; i < 12; ++i) tensors.push_back({std::to_string(i), "U8", {1000}});
    const auto shards = layout_shards(tensors, 1);  // each is larger than that, so each gets a file
    ASSERT_EQ(shards.size(), 12U);
    EXPECT_EQ(shards[0].file_name, "model-00001-of-00012.safetensors");
    EXPECT_EQ(shards[11].file_name, "model-00012-of-00012.safetensors");
    EXPECT_EQ(shards[11].tensors.at(0).name, "11");
    EXPECT_TRUE(layout_shards({}, 100).empty());
}

TEST(LayoutShards, KeepsOrderLimitAndAlignment) {
    const unsigned seed = std::random_device{}();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937 random(seed);
    for (int round = 0; round < 50; ++round) {
        const auto tensors = random_tensors(random, random() % 60 + 1);
        const std::uint64_t limit = random() % 20'000 + 500;
        const auto shards = layout_shards(tensors, limit);
        std::size_t next = 0;
        for (const OutputShard& shard : shards) {
            EXPECT_TRUE(shard.bytes <= limit || shard.tensors.size() == 1) << shard.bytes;
            std::set<std::string> expected;
            std::set<std::string> found;
            for (const StoredTensor& tensor : shard.tensors) {
                expected.insert(tensors.at(next++).name);
                found.insert(tensor.name);
                EXPECT_EQ(8 * tensor.begin % safetensors_bits(tensor.dtype).value_or(1), 0U);
            }
            EXPECT_EQ(found, expected);
            const auto header = parse_safetensors_header(std::string_view(shard.header).substr(8),
                                                         shard.bytes, shard.file_name);
            EXPECT_EQ(header.tensors.size(), shard.tensors.size());
        }
        EXPECT_EQ(next, tensors.size());
        const auto again = layout_shards(tensors, limit);
        for (std::size_t i = 0; i < shards.size(); ++i) EXPECT_EQ(again.at(i).header, shards[i].header);
    }
}

TEST(MakeIndexJson, ListsEveryTensor) {
    const auto shards = layout_shards({{"a", "U8", {600}}, {"b", "F32", {200}}, {"c", "I8", {0}}}, 1200);
    ASSERT_EQ(shards.size(), 2U);
    EXPECT_EQ(json::parse(make_index_json(shards)), json::parse(R"({"metadata":{"total_size":1400},
        "weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors",
                      "c":"model-00002-of-00002.safetensors"}})"));
    const auto doubled = std::vector<OutputShard>{shards[0], shards[0]};
    EXPECT_THROW(make_index_json(doubled), InternalError);
}

// Several writers, as on several ranks, each in its own order: the files must read back through our reader.
TEST(CheckpointWriter, WhatIsWrittenReadsBack) {
    const unsigned seed = std::random_device{}();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937 random(seed);
    for (int round = 0; round < 10; ++round) {
        const TemporaryDirectory directory;
        const auto tensors = random_tensors(random, 40);
        const auto shards = layout_shards(tensors, 5000);
        std::vector<std::size_t> even;
        std::vector<std::size_t> odd;
        for (std::size_t i = 0; i < shards.size(); ++i) (i % 2 == 0 ? even : odd).push_back(i);
        CheckpointWriter first(directory.path(), shards, even);
        CheckpointWriter second(directory.path(), shards, odd);
        auto shuffled = shards;
        for (auto& shard : shuffled) std::shuffle(shard.tensors.begin(), shard.tensors.end(), random);
        write_all(first, shuffled);
        write_all(second, shuffled);
        first.finish();
        second.finish();
        directory.write("config.json", "{}");
        directory.write(kIndex, make_index_json(shards));

        const CheckpointReader reader(directory.path());
        EXPECT_EQ(reader.tensors().size(), tensors.size());
        for (const StoredTensor& tensor : tensors) {
            const StoredTensor& found = reader.find(tensor.name, tensor.shape);
            EXPECT_EQ(found.dtype, tensor.dtype);
            std::string bytes(found.bytes(), '?');
            reader.read(tensor.name, bytes.data());
            EXPECT_EQ(bytes, pattern(found)) << tensor.name;
        }
        for (const OutputShard& shard : shards) {
            EXPECT_EQ(fs::file_size(directory / shard.file_name), shard.bytes);
        }
    }
}

TEST(CheckpointWriter, AShardAppearsWithItsLastTensor) {
    const TemporaryDirectory directory;
    const auto shards = layout_shards({{"a", "U8", {3}}, {"b", "U8", {2}}, {"z", "U8", {0}}}, 10'000);
    CheckpointWriter writer(directory.path(), shards, {0});
    EXPECT_TRUE(writer.owns("a"));
    EXPECT_FALSE(writer.owns("c"));
    writer.write("b", "45", 2);
    writer.write("a", "123", 3);
    EXPECT_EQ(names_in(directory.path()), std::set<std::string>{std::string(kFirstOfOne) + ".partial"});
    expect_error<InternalError>([&] { writer.finish(); }, {"1 output tensors", "z"});
    writer.write("z", nullptr, 0);
    EXPECT_EQ(names_in(directory.path()), std::set<std::string>{kFirstOfOne});
    writer.finish();
    EXPECT_EQ(contents(directory / kFirstOfOne), shards[0].header + "12345");
}

TEST(CheckpointWriter, WritesPieces) {
    const TemporaryDirectory directory;
    const auto shards = layout_shards({{"a", "U8", {5}}}, 10'000);
    CheckpointWriter writer(directory.path(), shards, {0});
    writer.write_piece("a", 0, "12", 2);
    expect_error<InternalError>([&] { writer.write_piece("a", 3, "4", 1); }, {"'a'", "2 of 5"});
    expect_error<InternalError>([&] { writer.write_piece("a", 0, "1", 1); }, {"'a'"});
    expect_error<InternalError>([&] { writer.write_piece("a", 2, "3456", 4); }, {"'a'"});
    expect_error<InternalError>([&] { writer.write("a", "12345", 5); }, {"'a'"});
    writer.write_piece("a", 2, "345", 3);
    writer.finish();
    expect_error<InternalError>([&] { writer.write_piece("a", 5, "", 0); }, {"'a'"});
    EXPECT_EQ(contents(directory / kFirstOfOne), shards[0].header + "12345");
}

TEST(CheckpointWriter, RefusesWrongTensors) {
    const TemporaryDirectory directory;
    const auto shards = layout_shards({{"a", "U8", {600}}, {"b", "U8", {600}}}, 1000);
    CheckpointWriter writer(directory.path(), shards, {1});
    const std::string data(600, 'x');
    expect_error<InternalError>([&] { writer.write("a", data.data(), 600); }, {"'a'", "owns"});
    expect_error<InternalError>([&] { writer.write("c", data.data(), 600); }, {"'c'"});
    expect_error<InternalError>([&] { writer.write("b", data.data(), 599); }, {"'b'", "600", "599"});
    writer.write("b", data.data(), 600);
    expect_error<InternalError>([&] { writer.write("b", data.data(), 600); }, {"'b'"});
    writer.finish();
}

TEST(CheckpointWriter, LeavesNothingWhenAbandoned) {
    const TemporaryDirectory directory;
    const auto shards = layout_shards({{"a", "U8", {3}}, {"b", "U8", {2}}}, 10'000);
    {
        CheckpointWriter writer(directory.path(), shards, {0});
        writer.write("a", "123", 3);
    }
    EXPECT_TRUE(fs::is_empty(directory.path()));
}

TEST(CheckpointWriter, TensorsAreWrittenByManyThreads) {
    const TemporaryDirectory directory;
    std::mt19937 random(7);
    const auto shards = layout_shards(random_tensors(random, 200), 20'000);
    std::vector<std::size_t> all(shards.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
    CheckpointWriter writer(directory.path(), shards, all);
    std::atomic<std::size_t> next = 0;
    std::vector<StoredTensor> tensors;
    for (const auto& shard : shards) {
        tensors.insert(tensors.end(), shard.tensors.begin(), shard.tensors.end());
    }
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            for (std::size_t j = next++; j < tensors.size(); j = next++) {
                writer.write(tensors[j].name, pattern(tensors[j]).data(), tensors[j].bytes());
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    writer.finish();
    for (const auto& shard : shards) {
        std::string expected = shard.header;
        for (const StoredTensor& tensor : shard.tensors) expected += pattern(tensor);
        EXPECT_TRUE(contents(directory / shard.file_name) == expected) << shard.file_name;
    }
}

TEST(CheckpointWriter, AFullDiskShowsBeforeTheFirstTensor) {
    const TemporaryDirectory directory;
    if (::mount("tmpfs", directory.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
        GTEST_SKIP() << "cannot mount a small tmpfs here: " << std::strerror(errno);
    }
    const auto shards = layout_shards({{"a", "U8", {600'000}}, {"b", "U8", {600'000}}}, 700'000);
    ASSERT_EQ(shards.size(), 2U);
    expect_error<InfrastructureError>(
        [&] { CheckpointWriter(directory.path(), shards, {0, 1}); },
        {"model-00002-of-00002.safetensors", std::strerror(ENOSPC), "bytes were wanted", "are free"});
    EXPECT_TRUE(fs::is_empty(directory.path()));
    ::umount(directory.path().c_str());
}

TEST(CheckpointWriter, ShardsMustBeInPlaceAtTheEnd) {
    const TemporaryDirectory directory;
    const auto shards = layout_shards({{"a", "U8", {3}}}, 10'000);
    CheckpointWriter writer(directory.path(), shards, {0});
    writer.write("a", "123", 3);
    writer.finish();
    fs::resize_file(directory / kFirstOfOne, shards[0].bytes - 1);
    expect_error<InfrastructureError>([&] { writer.finish(); },
                                      {kFirstOfOne, std::to_string(shards[0].bytes), "another program"});
    fs::remove(directory / kFirstOfOne);
    expect_error<InfrastructureError>([&] { writer.finish(); }, {kFirstOfOne, "is gone"});
}

TEST(PrepareOutput, OneRunAtATime) {
    const TemporaryDirectory directory;
    auto first = prepare_output_directory(directory.path(), false, {}, {kFirstOfOne, kIndex});
    directory.write(kFirstOfOne, "written by the first");
    char host[256] = {};
    ASSERT_EQ(::gethostname(host, sizeof host - 1), 0);
    for (const bool overwrite : {false, true}) {
        expect_error<BadInput>(
            [&] { prepare_output_directory(directory.path(), overwrite); },
            {directory.path().string(), "another run", fmt::format("process {} on {}", ::getpid(), host)});
    }
    EXPECT_EQ(contents(directory / kFirstOfOne), "written by the first");
    directory.write(kIndex, "{}");
    first.reset();
    EXPECT_EQ(contents(directory / ".quantmill/lock"), "");
    expect_error<BadInput>([&] { prepare_output_directory(directory.path(), false); }, {"finished"});
    EXPECT_NE(prepare_output_directory(directory.path(), true), nullptr);
}

TEST(PrepareOutput, MakesTheDirectoryAndItsMarker) {
    const TemporaryDirectory directory;
    prepare_output_directory(directory / "deep/out", false);
    EXPECT_TRUE(fs::is_directory(directory / "deep/out/.quantmill"));
    prepare_output_directory(directory / "deep/out", false);  // begun, not finished: goes on
    fs::create_directory(directory / "empty");
    prepare_output_directory(directory / "empty", false);
    EXPECT_TRUE(fs::is_directory(directory / "empty/.quantmill"));
}

TEST(PrepareOutput, RefusesWhatIsNotOurs) {
    const TemporaryDirectory directory;
    directory.write("out/thesis.tex", "years of work");
    expect_error<BadInput>([&] { prepare_output_directory(directory / "out", false); },
                           {(directory / "out").string(), "not empty", "--overwrite"});
    for (const bool overwrite : {false, true}) {
        directory.write("out/quantize_config.json", R"({"meta":{"quantizer":["gptqmodel:7.7.0"]}})");
        EXPECT_THROW(prepare_output_directory(directory / "out", overwrite), BadInput);
        directory.write("out/quantize_config.json", "quantmill");
        EXPECT_THROW(prepare_output_directory(directory / "out", overwrite), BadInput);
    }
    EXPECT_FALSE(fs::exists(directory / "out/.quantmill"));
    directory.write("file", "");
    expect_error<BadInput>([&] { prepare_output_directory(directory / "file", true); }, {"no directory"});
}

TEST(PrepareOutput, RefusesAFinishedCheckpointOfOurs) {
    const TemporaryDirectory directory;
    const auto refused = [&] {
        expect_error<BadInput>([&] { prepare_output_directory(directory.path(), false); },
                               {"finished checkpoint", "--overwrite"});
    };
    directory.write(".quantmill/journal", "");
    directory.write(kIndex, "{}");
    directory.write(kFirstOfOne, "weights");
    refused();
    fs::remove_all(directory / ".quantmill");
    directory.write("quantize_config.json", R"({"meta":{"quantizer":["quantmill:0.1.0"]}})");
    refused();
    EXPECT_EQ(contents(directory / kFirstOfOne), "weights");
}

TEST(PrepareOutput, CleansWhatAnUnfinishedRunLeft) {
    const TemporaryDirectory directory;
    directory.write(".quantmill/journal", "state");
    directory.write("model-00001-of-00003.safetensors", "");
    directory.write("model-00002-of-00003.safetensors.partial", "");
    directory.write("model.safetensors.index.json.partial", "");
    directory.write("config.json", "");
    directory.write("quantize_config.json.partial", "");
    directory.write("tokenizer.json", "kept");
    directory.write("notes.partial", "kept");
    directory.write("my-model.safetensors", "kept");
    directory.write("sub/model-00001-of-00003.safetensors", "kept");
    prepare_output_directory(directory.path(), false);
    EXPECT_EQ(names_in(directory.path()),
              (std::set<std::string>{"tokenizer.json", "notes.partial", "my-model.safetensors",
                                     "sub/model-00001-of-00003.safetensors"}));
}

TEST(PrepareOutput, OverwriteRemovesOnlyWhatARunWrites) {
    const TemporaryDirectory directory;
    directory.write("thesis.tex", "years of work");
    directory.write("pytorch_model.bin", "kept");
    directory.write("model.safetensors", "");
    directory.write(kFirstOfOne, "");
    directory.write(kIndex, "");
    directory.write("config.json", "");
    directory.write("quantize_config.json", R"({"meta":{"quantizer":["quantmill:0.1.0"]}})");
    prepare_output_directory(directory.path(), true);
    EXPECT_EQ(names_in(directory.path()), (std::set<std::string>{"thesis.tex", "pytorch_model.bin"}));
    EXPECT_TRUE(fs::is_directory(directory / ".quantmill"));
}

TEST(PrepareOutput, OverwriteRefusesAStrangersModel) {
    for (const char* name : {"model.safetensors", kFirstOfOne, kIndex, "config.json", "quantize_config.json",
                             "model-00002-of-00003.safetensors.partial"}) {
        const TemporaryDirectory directory;
        directory.write("thesis.tex", "years of work");
        directory.write(name, "of somebody else");
        expect_error<BadInput>([&] { prepare_output_directory(directory.path(), true); },
                               {directory.path().string(), "did not write", name});
        EXPECT_EQ(contents(directory / name), "of somebody else");
        EXPECT_FALSE(fs::exists(directory / ".quantmill"));
        fs::remove(directory / name);
        prepare_output_directory(directory.path(), true);
        EXPECT_EQ(contents(directory / "thesis.tex"), "years of work");
    }
}

TEST(PrepareOutput, RemovesWhatTheLastRunWroteAndNothingElse) {
    const TemporaryDirectory source;
    const TemporaryDirectory output;
    source.write("chat_template.jinja", "old");
    source.write("more/notes.txt", "old");
    source.write("LICENSE", "the model's");
    output.write("thesis.tex", "years of work");
    output.write("LICENSE", "the user's");
    const std::vector<std::string> files = {kFirstOfOne, kIndex, "config.json", "report.json"};
    const auto run = [&] {
        prepare_output_directory(output.path(), true, source.path(), files);
        copy_companion_files(source.path(), output.path());
        for (const std::string& file : files) output.write(file, "result");
    };
    run();
    output.write("report.json.partial", "");
    output.write("more/mine.txt", "kept");
    for (const char* name : {"chat_template.jinja", "more/notes.txt", "LICENSE"}) fs::remove(source / name);
    prepare_output_directory(output.path(), true, source.path(), {});
    // LICENSE was there before the first run, which only replaced it.
    EXPECT_EQ(names_in(output.path()), (std::set<std::string>{"thesis.tex", "LICENSE", "more/mine.txt"}));
    fs::remove(output / "more/mine.txt");
    source.write("more/notes.txt", "new");
    run();
    prepare_output_directory(output.path(), true, source.path(), {});
    EXPECT_FALSE(fs::exists(output / "more"));

    // Our marker makes nobody else's weights ours.
    output.write(kFirstOfOne, "of somebody else");
    expect_error<BadInput>([&] { prepare_output_directory(output.path(), true); },
                           {"did not write", kFirstOfOne});
}

TEST(PrepareOutput, RemovesNothingOutside) {
    const TemporaryDirectory directory;
    directory.write("precious", "kept");
    directory.write("out/.quantmill/files.json",
                    nlohmann::json({"../precious", (directory / "precious").string(), 3}).dump());
    prepare_output_directory(directory / "out", true);
    EXPECT_EQ(contents(directory / "precious"), "kept");
}

TEST(PrepareOutput, ReclaimsWhatItRemoves) {
    const TemporaryDirectory directory;
    EXPECT_EQ(reclaimed_bytes(directory / "none"), 0U);
    directory.write(kFirstOfOne, std::string(1'000'000, 'x'));
    EXPECT_EQ(reclaimed_bytes(directory.path()), 0U);  // not ours, so it stays
    directory.write(".quantmill/lock", "");
    directory.write("thesis.tex", std::string(1'000'000, 'x'));
    EXPECT_GE(reclaimed_bytes(directory.path()), 1'000'000U);
    EXPECT_LT(reclaimed_bytes(directory.path()), 1'200'000U);  // whole blocks of the file system
    fs::create_hard_link(directory / kFirstOfOne, directory / "kept");
    EXPECT_EQ(reclaimed_bytes(directory.path()), 0U);
}

TEST(PrepareOutput, NeverTouchesTheModel) {
    const TemporaryDirectory directory;
    directory.write("model/model.safetensors", "precious");
    fs::create_directory_symlink(directory / "model", directory / "link");
    for (const char* output : {"model", "link", "model/out", "link/out", "model/../link"}) {
        expect_error<BadInput>(
            [&] { prepare_output_directory(directory / output, true, directory / "model"); },
            {"model directory"});
    }
    EXPECT_EQ(contents(directory / "model/model.safetensors"), "precious");
    prepare_output_directory(directory / "model-W4", false, directory / "model");
    prepare_output_directory(directory.path(), true, directory / "model");  // above it is fine
    EXPECT_EQ(contents(directory / "model/model.safetensors"), "precious");
}

TEST(PrepareOutput, UnwritableDirectory) {
    const TemporaryDirectory directory;
    fs::create_directory(directory / "out");
    fs::permissions(directory.path(), fs::perms::owner_all | fs::perms::others_exec | fs::perms::others_read);
    fs::permissions(directory / "out", fs::perms::owner_read | fs::perms::owner_exec |
                                           fs::perms::others_read | fs::perms::others_exec);
    const bool root = ::geteuid() == 0;
    if (root) {
        ASSERT_EQ(::seteuid(65534), 0);  // permissions do not bind root
    } else {
        fs::permissions(directory.path(), fs::perms::owner_read | fs::perms::owner_exec);
    }
    expect_error<BadInput>([&] { prepare_output_directory(directory / "out", false); },
                           {(directory / "out").string(), std::strerror(EACCES)});
    expect_error<BadInput>([&] { prepare_output_directory(directory / "new/out", false); },
                           {(directory / "new/out").string(), std::strerror(EACCES)});
    if (root) {
        ASSERT_EQ(::seteuid(0), 0);
    } else {
        fs::permissions(directory.path(), fs::perms::owner_all);
    }
}

TEST(CopyCompanions, CopiesByExclusion) {
    const TemporaryDirectory source;
    const TemporaryDirectory output;
    const std::set<std::string> copied = {"tokenizer.json",
                                          "tokenizer_config.json",
                                          "tokenizer.model",
                                          "chat_template.jinja",
                                          "LICENSE",
                                          "generation_config.json",
                                          "modeling_custom.py",
                                          "special parser.txt",
                                          ".gitattributes",
                                          "vocab.txt",
                                          "preprocessor_config.json",
                                          "1_Pooling/config.json",
                                          "1_Pooling/README.md",
                                          "original/params.json",
                                          "merges.txt",
                                          "quantize_config.json.txt",
                                          "figures/plot.png"};
    const std::set<std::string> left = {"config.json",
                                        "quantize_config.json",
                                        "quantization_config.json",
                                        "recipe.yaml",
                                        "recipe.yml",
                                        "README.md",
                                        "model.safetensors",
                                        "model-00001-of-00002.safetensors",
                                        "pytorch_model.bin",
                                        "model.safetensors.index.json",
                                        "pytorch_model.bin.index.json",
                                        "weights.pt",
                                        "original/consolidated.00.pth",
                                        "consolidated.safetensors",
                                        "model-Q4_0.GGUF",
                                        "onnx/model.onnx",
                                        "onnx/model.onnx_data",
                                        "flax_model.msgpack",
                                        "tf_model.h5",
                                        "rust_model.ot",
                                        "sub/model.safetensors",
                                        "backup.tar.gz",
                                        "all.zip",
                                        ".git/HEAD",
                                        ".cache/huggingface/x",
                                        "tokenizer.json.partial"};
    for (const auto& names : {copied, left}) {
        for (const std::string& name : names) source.write(name, "content of " + name);
    }
    std::uint64_t bytes = 0;
    for (const std::string& name : copied) bytes += contents(source / name).size();
    EXPECT_EQ(companion_bytes(source.path()), bytes);
    copy_companion_files(source.path(), output.path());
    EXPECT_EQ(names_in(output.path()), copied);
    for (const std::string& name : copied) EXPECT_EQ(contents(output / name), "content of " + name);
    EXPECT_FALSE(fs::exists(output / "onnx"));
}

TEST(CopyCompanions, FollowsLinksAndEndsAtLoops) {
    const TemporaryDirectory cache;
    const TemporaryDirectory source;
    const TemporaryDirectory output;
    cache.write("blob", "tokens");
    cache.write("shared/a.txt", "a");
    fs::create_symlink(cache / "blob", source / "tokenizer.json");
    fs::create_directory_symlink(cache / "shared", source / "extra");
    fs::create_directory_symlink(source.path(), cache / "shared/loop");
    fs::create_symlink(cache / "gone", source / "vocab.json");
    EXPECT_EQ(companion_bytes(source.path()), std::strlen("tokens") + std::strlen("a"));
    const CaptureLog log;
    copy_companion_files(source.path(), output.path());
    EXPECT_EQ(names_in(output.path()), (std::set<std::string>{"tokenizer.json", "extra/a.txt"}));
    EXPECT_TRUE(fs::is_regular_file(fs::symlink_status(output / "tokenizer.json")));
    EXPECT_EQ(contents(output / "tokenizer.json"), "tokens");
    EXPECT_NE(log.text().find("vocab.json"), std::string::npos);
}

TEST(CopyCompanions, ReplacesOlderCopiesAndLargeFiles) {
    const TemporaryDirectory source;
    const TemporaryDirectory output;
    std::string large;
    large.resize(10'000'000, 'x');
    large.back() = 'y';
    source.write("tokenizer.json", large);
    output.write("tokenizer.json", "old");
    output.write("mine.txt", "kept");
    copy_companion_files(source.path(), output.path());
    EXPECT_TRUE(contents(output / "tokenizer.json") == large);
    EXPECT_EQ(contents(output / "mine.txt"), "kept");
    expect_error<BadInput>([&] { copy_companion_files(source / "none", output.path()); }, {"none"});
}

}  // namespace
}  // namespace quantmill
