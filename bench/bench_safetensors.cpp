// Reading a checkpoint tensor by tensor, beside plain reads of the same files in one piece after the other.
// Writes a checkpoint of bf16 tensors first (or takes --model DIR) and checks what was read.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "kernels/error.h"
#include "pipeline/checkpoint_reader.h"
#include "pipeline/checkpoint_writer.h"

namespace quantmill::bench {
namespace {

namespace fs = std::filesystem;

// The tensor's bytes: a counter that starts elsewhere in each tensor, as finite bf16 numbers.
void fill(std::vector<std::uint16_t>& values, std::size_t count, const std::string& name) {
    auto next = static_cast<std::uint32_t>(std::hash<std::string>{}(name));
    values.resize(count);
    for (std::uint16_t& value : values) value = static_cast<std::uint16_t>(++next & 0x3FFFU);
}

// Blocks like a large model's: matrices of 4096 x 4096 and norms, in shards of 1 GB.
void write_checkpoint(const fs::path& directory, std::uint64_t megabytes) {
    std::vector<StoredTensor> tensors;
    for (std::uint64_t bytes = 0; bytes < megabytes * 1'000'000;) {
        const std::string block = fmt::format("model.layers.{}.", tensors.size());
        tensors.push_back({block + "proj.weight", "BF16", {4096, 4096}});
        tensors.push_back({block + "norm.weight", "BF16", {4096}});
        bytes += 2 * 4096 * 4097;
    }
    const auto shards = layout_shards(tensors, 1'000'000'000);
    std::vector<std::size_t> all(shards.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
    CheckpointWriter writer(directory, shards, all);
    std::vector<std::uint16_t> values;
    for (const StoredTensor& tensor : tensors) {
        fill(values, static_cast<std::size_t>(tensor.count()), tensor.name);
        writer.write(tensor.name, values.data(), values.size() * 2);
    }
    writer.finish();
    write_text(directory / "model.safetensors.index.json", make_index_json(shards));
    write_text(directory / "config.json", "{}");
}

bool is_as_written(const CheckpointReader& reader) {
    std::vector<std::uint16_t> expected;
    std::vector<char> got;
    for (const auto& [name, tensor] : reader.tensors()) {
        fill(expected, static_cast<std::size_t>(tensor.count()), name);
        got.resize(tensor.bytes());
        reader.read(name, got.data());
        if (std::memcmp(got.data(), expected.data(), got.size()) != 0) return false;
    }
    return true;
}

void read_plainly(const std::vector<fs::path>& files, std::vector<char>& buffer) {
    for (const fs::path& path : files) {
        const InputFile file(path);
        for (std::uint64_t offset = 0; offset < file.size();) {
            const std::size_t bytes = std::min<std::uint64_t>(buffer.size(), file.size() - offset);
            file.read(offset, buffer.data(), bytes);
            offset += bytes;
        }
    }
}

// Drops clean pages of the files from the page cache.
void forget(const std::vector<fs::path>& files) {
    for (const fs::path& path : files) {
        const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (descriptor < 0) continue;
        ::fsync(descriptor);
        ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
        ::close(descriptor);
    }
}

double seconds_of(const std::function<void()>& action) {
    const auto start = std::chrono::steady_clock::now();
    action();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The fastest run: what disturbs a read only ever makes it slower.
double best(const std::vector<double>& values) { return *std::min_element(values.begin(), values.end()); }

void measure(const fs::path& directory, int repetitions, bool cold) {
    const CheckpointReader reader(directory);
    const auto files = reader.files();
    const double gigabytes = static_cast<double>(reader.total_bytes()) / 1e9;
    std::uint64_t largest = 0;
    for (const auto& [name, tensor] : reader.tensors()) largest = std::max(largest, tensor.bytes());
    std::vector<char> buffer(std::max<std::uint64_t>(largest, 1));

    std::vector<double> plain;
    std::vector<double> ours;
    std::vector<double> opening;
    std::vector<double> checking;
    for (int i = 0; i < repetitions; ++i) {  // in turns, so that other load hits both alike
        if (cold) forget(files);
        plain.push_back(seconds_of([&] { read_plainly(files, buffer); }));
        if (cold) forget(files);
        double check = 0.0;
        double open = 0.0;
        ours.push_back(seconds_of([&] {
            open = seconds_of([&] { CheckpointReader{directory}; });
            for (const auto& [name, tensor] : reader.tensors()) {
                reader.read(name, buffer.data());
                check += seconds_of([&] { require_finite(tensor, buffer.data(), "benchmark"); });
            }
        }));
        ours.back() -= check;
        opening.push_back(open);
        checking.push_back(check);
    }
    const double plain_rate = gigabytes / best(plain);
    const auto row = [&](const char* what, double rate) {
        fmt::print("{:<44} {:>7.2f} GB/s  {:>4.0f}%\n", what, rate, 100 * rate / plain_rate);
    };
    fmt::print("{:.2f} GB in {} tensors, {} files, page cache {}\n", gigabytes, reader.tensors().size(),
               files.size(), cold ? "dropped before each run" : "warm");
    row("plain pread of whole files", plain_rate);
    row("CheckpointReader, tensor by tensor", gigabytes / best(ours));
    row("looking for NaN and infinities", gigabytes / best(checking));
    fmt::print("{:<44} {:>7.2f} ms\n", "opening: index and headers validated", 1e3 * best(opening));
}

int run(int argc, char** argv) {
    CLI::App app("Reads a checkpoint tensor by tensor, beside plain reads of its files");
    std::string model;
    std::uint64_t megabytes = 1000;
    int repetitions = 7;
    bool cold = false;
    app.add_option("--model", model, "checkpoint directory; default: one is written in $TMPDIR");
    app.add_option("--megabytes", megabytes, "size of the written checkpoint")->capture_default_str();
    app.add_option("--repetitions", repetitions, "timed runs; the fastest counts")->capture_default_str();
    app.add_flag("--cold", cold, "drop the files from the page cache before each run");
    CLI11_PARSE(app, argc, argv);

    if (!model.empty()) {
        measure(model, repetitions, cold);
        return 0;
    }
    std::string name = (fs::temp_directory_path() / "quantmill-bench-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw InfrastructureError("cannot make {}", name);
    write_checkpoint(name, megabytes);
    const bool right = is_as_written(CheckpointReader(name));
    if (right) {
        measure(name, repetitions, cold);
    } else {
        fmt::print(stderr, "what was read is not what was written\n");
    }
    fs::remove_all(name);
    return right ? 0 : 1;
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    try {
        return quantmill::bench::run(argc, argv);
    } catch (const quantmill::Error& error) {
        fmt::print(stderr, "{}\n", error.what());
        return static_cast<int>(error.code());
    }
}
