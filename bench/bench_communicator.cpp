// What ranks exchange for a block of Llama-3-70B, through the Communicator: checks each result, then prints
// time, algbw and busbw as nccl-tests defines them: algbw, the bytes of the whole tensor over the time of the
// slowest rank; busbw, what each link carries at least in a ring: algbw times 2·(n−1)/n for a sum over all, 1
// for a sum on one rank, a broadcast or a transfer, (n−1)/n for a gather. The time is from a barrier of the
// ranks to the result on the device, call and synchronization included.
//   mpirun -n 2 bench_communicator --backend cpu --divide 16
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <functional>

#include "comm/communicator.h"
#include "kernels/make_backend.h"
#include "pipeline/stopwatch.h"

namespace {

using namespace quantmill;

struct Options {
    std::string backend = "auto", communicator = "auto";
    std::int64_t divide = 1;
    int repetitions = 7;
    bool csv = false;
};

class CommunicatorBench {
public:
    CommunicatorBench(const Options& options, Control& control)
        : options_(options),
          control_(control),
          backend_(make_backend(options.backend, control.local_rank(), control.local_size())),
          communicator_(make_communicator(options.communicator, control, *backend_)) {
        if (control.rank() != 0) return;
        if (options.csv) {
            fmt::print("operation,bytes,ms,algbw,busbw,correct\n");
            return;
        }
        fmt::print("{} rank(s), {}, {}\n{:<36}{:>12}{:>11}{:>9}{:>9}\n", control.size(),
                   communicator_->name(), backend_->description(), "operation", "bytes", "median ms", "algbw",
                   "busbw");
    }

    void sum(const std::string& name, std::int64_t columns) {
        Tensor tensor = filled(columns * (columns + 1) / 2 / options_.divide, DType::i64, 3);
        communicator_->all_sum(tensor);
        const bool correct = all_are<std::int64_t>(tensor, 3 * std::int64_t{control_.size()});
        measure("sum of " + name, tensor, 2.0 * (control_.size() - 1) / control_.size(), correct,
                [&] { communicator_->all_sum(tensor); });
    }
    void sum_on_one(const std::string& name, std::int64_t columns) {
        const int root = control_.size() - 1;
        Tensor tensor = filled(columns * (columns + 1) / 2 / options_.divide, DType::i64, 3);
        communicator_->sum_to(tensor, root);
        const bool correct =
            control_.rank() != root || all_are<std::int64_t>(tensor, 3 * std::int64_t{control_.size()});
        measure("sum on one rank of " + name, tensor, 1.0, correct,
                [&] { communicator_->sum_to(tensor, root); });
    }
    // From each even rank to the next one.
    void transfer(const std::string& name, std::int64_t bytes) {
        const int peer = control_.rank() ^ 1;
        Tensor tensor = filled(bytes / options_.divide, DType::u8, control_.rank() % 2 == 0 ? 9 : 0);
        const auto run = [&] {
            if (peer >= control_.size()) return;
            const auto moved = control_.rank() < peer ? communicator_->start_send(tensor, peer)
                                                      : communicator_->start_receive(tensor, peer);
            moved->wait();
        };
        run();
        measure("passing " + name, tensor, 1.0, all_are<std::uint8_t>(tensor, 9), run);
    }
    void broadcast(const std::string& name, std::int64_t bytes) {
        const int root = control_.size() - 1;
        Tensor tensor = filled(bytes / options_.divide, DType::u8, control_.rank() == root ? 7 : 0);
        communicator_->broadcast(tensor, root);
        measure("broadcast of " + name, tensor, 1.0, all_are<std::uint8_t>(tensor, 7),
                [&] { communicator_->broadcast(tensor, root); });
    }
    void gather(const std::string& name, std::int64_t rows, std::int64_t columns) {
        rows /= options_.divide;
        std::vector<RowRange> ranges;
        for (int rank = 0; rank < control_.size(); ++rank) {
            ranges.push_back({rows * rank / control_.size(), rows * (rank + 1) / control_.size()});
        }
        Tensor tensor = filled(rows * columns, DType::u8, 0);
        const TensorView table = tensor.view().reshaped({rows, columns});
        const RowRange& mine = ranges[static_cast<std::size_t>(control_.rank())];
        const std::vector<std::uint8_t> five(static_cast<std::size_t>(mine.count() * columns), 5);
        backend_->copy_from_host(five.data(), table.rows(mine.begin, mine.end));
        communicator_->all_gather_rows(table, ranges);
        measure("gathering " + name, tensor, (control_.size() - 1.0) / control_.size(),
                all_are<std::uint8_t>(tensor, 5), [&] { communicator_->all_gather_rows(table, ranges); });
    }
    int status() const { return failed_ ? 1 : 0; }

private:
    Tensor filled(std::int64_t count, DType dtype, std::uint8_t value) {
        Tensor tensor = backend_->empty({count}, dtype, "a message");
        std::vector<std::byte> bytes(tensor.view().size_bytes());
        for (std::size_t i = 0; i < bytes.size(); i += size_of(dtype)) bytes[i] = std::byte{value};
        backend_->copy_from_host(bytes.data(), tensor);
        return tensor;
    }
    template <class T>
    bool all_are(const Tensor& tensor, T value) {
        std::vector<T> values(static_cast<std::size_t>(tensor.shape().count()));
        backend_->copy_to_host(tensor, values.data());
        return std::all_of(values.begin(), values.end(), [value](T v) { return v == value; });
    }
    void measure(const std::string& name, const Tensor& tensor, double bus_share, bool correct,
                 const std::function<void()>& run) {
        std::vector<double> seconds;
        for (int i = 0; i < options_.repetitions; ++i) {
            control_.barrier();
            const Stopwatch watch;
            run();
            backend_->synchronize();
            seconds.push_back(
                static_cast<double>(control_.all_max({std::llround(watch.seconds() * 1e9)}).front()) * 1e-9);
        }
        correct = control_.all_max({correct ? 0 : 1}).front() == 0;
        failed_ = failed_ || !correct;
        if (control_.rank() != 0) return;
        std::sort(seconds.begin(), seconds.end());
        const double median = seconds[seconds.size() / 2];
        const double rate = static_cast<double>(tensor.view().size_bytes()) / median * 1e-9;
        const char* row =
            options_.csv ? "{},{},{:.3f},{:.2f},{:.2f},{}\n" : "{:<36}{:>12}{:>11.3f}{:>9.2f}{:>9.2f}  {}\n";
        const char* verdict = correct ? (options_.csv ? "yes" : "") : (options_.csv ? "no" : "WRONG");
        fmt::print(fmt::runtime(row), name, tensor.view().size_bytes(), median * 1e3, rate, rate * bus_share,
                   verdict);
    }

    const Options& options_;
    Control& control_;
    std::unique_ptr<Backend> backend_;
    std::unique_ptr<Communicator> communicator_;
    bool failed_ = false;
};

int run(const Options& options, Control& control) {
    CommunicatorBench bench(options, control);
    for (const std::int64_t columns : {8192, 28672}) {
        bench.sum(fmt::format("a Hessian of {}", columns), columns);
        bench.sum_on_one(fmt::format("a Hessian of {}", columns), columns);
        bench.broadcast(fmt::format("a factor of {}", columns), columns * columns * 4);
    }
    bench.broadcast("down_proj's weights", std::int64_t{8192} * 28672 * 2);
    bench.gather("gate_up's codes", 57344, 8192);
    if (control.size() > 1) bench.transfer("16384 hidden states", std::int64_t{16384} * 8192 * 2);
    return bench.status();
}

}  // namespace

int main(int argc, char** argv) {
    Options options;
    CLI::App app("What ranks exchange for a block of Llama-3-70B; bandwidths in GB/s");
    app.add_option("--backend", options.backend, "auto, cpu or cuda")->capture_default_str();
    app.add_option("--communicator", options.communicator, "auto, mpi or nccl")->capture_default_str();
    app.add_option("--divide", options.divide, "make all messages that many times smaller")
        ->capture_default_str();
    app.add_option("--repetitions", options.repetitions)->capture_default_str();
    app.add_flag("--csv", options.csv, "comma-separated values");
    CLI11_PARSE(app, argc, argv);
    try {
        const auto control = make_control(under_launcher());
        int status = 1;
        try {
            status = run(options, *control);
        } catch (const Error& error) {
            fmt::print(stderr, "{}\n", error.what());
            control->abort(error.code());  // ends the others, which may wait for this one
        }
        return status;
    } catch (const Error& error) {
        fmt::print(stderr, "{}\n", error.what());
        return static_cast<int>(error.code());
    }
}
