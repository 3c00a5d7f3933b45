#pragma once

#include <cblas.h>
#include <fmt/format.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/process_environment.h"
#include "kernels/make_backend.h"

namespace quantmill::bench {

// What one run of an operation does: floating-point operations or bytes moved.
enum class Unit { flop, byte };

struct Case {
    std::string name;
    std::string shape;
    double work;  // of one run, in units
    Unit unit;
    double error;      // against the reference, relative
    double tolerance;  // of the error
};

// Runs cases on the CPU backend and prints one line each: rate and share of what the machine reaches at
// the same moment, which is OpenBLAS's own multi-threaded sgemm of order 2048, or a parallel copy. Both
// are timed in turns with the case, so that other load on the machine hits both alike.
class Bench {
public:
    Bench(int argc, char** argv, const std::string& description) {
        CLI::App app(description);
        app.add_flag("--csv", csv_, "comma-separated values");
        app.add_option("--repetitions", repetitions_, "timed runs of each case")->capture_default_str();
        app.add_option("--only", only_, "cases whose name or shape contains this");
        try {
            app.parse(argc, argv);
        } catch (const CLI::ParseError& error) {
            std::exit(app.exit(error));
        }
        backend_ = make_backend("cpu", 0);
        matrix_.assign(kOrder * kOrder, 0.5F);
        product_.resize(kOrder * kOrder);
        source_.assign(kCopy, 1.0F);
        target_.resize(kCopy);
        if (csv_) {
            fmt::print("name,shape,error,ms,rate,unit,share\n");
        } else {
            fmt::print("{}\n{:<22} {:<26} {:>9} {:>10} {:>16} {:>6}\n", backend_->description(), "name",
                       "shape", "error", "median ms", "rate", "peak");
        }
    }

    Backend& backend() { return *backend_; }
    bool wanted(const std::string& name, const std::string& shape) const {
        return only_.empty() || name.find(only_) != std::string::npos ||
               shape.find(only_) != std::string::npos;
    }

    void measure(const Case& what, const std::function<void()>& run) {
        std::vector<double> seconds;
        std::vector<double> peak_seconds;
        run();
        const auto peak = [&] { what.unit == Unit::flop ? multiply() : copy(); };
        peak();
        for (int i = 0; i < repetitions_; ++i) {
            // Short cases run several times a turn: a turn is about as long as the peak's.
            peak_seconds.push_back(time(peak, 1));
            const double once = seconds.empty() ? time(run, 1) : seconds.back();
            const int times = std::clamp(static_cast<int>(peak_seconds.back() / once), 1, 1000);
            seconds.push_back(time(run, times));
        }
        const double peak_work = what.unit == Unit::flop ? 2.0 * std::pow(kOrder, 3) : 8.0 * kCopy;
        print(what, median(seconds), peak_work / median(peak_seconds));
        failed_ = failed_ || !(what.error <= what.tolerance);
    }

    // The process's exit status: 1 when a result was wrong.
    int status() const { return failed_ ? 1 : 0; }

    // --- Operands. ---

    Tensor normal(Shape shape, float deviation = 1.0F) {
        std::normal_distribution<float> distribution(0.0F, deviation);
        Tensor tensor = backend_->empty(shape, DType::f32, "operand");
        auto* data = tensor.view().data<float>();
        for (std::int64_t i = 0; i < shape.count(); ++i) data[i] = distribution(random_);
        return tensor;
    }
    Tensor empty(Shape shape, DType dtype = DType::f32) { return backend_->empty(shape, dtype, "result"); }
    std::int64_t integer(std::int64_t below) {
        return std::uniform_int_distribution<std::int64_t>(0, below - 1)(random_);
    }

private:
    static constexpr int kOrder = 2048;
    static constexpr std::int64_t kCopy = 1 << 25;  // floats, far more than caches hold

    // OpenBLAS with threads of its own.
    void multiply() {
        openblas_set_num_threads(threads_);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, kOrder, kOrder, kOrder, 1.0F, matrix_.data(),
                    kOrder, matrix_.data(), kOrder, 0.0F, product_.data(), kOrder);
        openblas_set_num_threads(1);
        omp_set_num_threads(threads_);  // an OpenMP build changes it with its own
    }

    void copy() {
#pragma omp parallel for schedule(static)
        for (std::int64_t i = 0; i < kCopy; ++i) target_[i] = source_[i];
    }

    template <class Run>
    static double time(const Run& run, int times) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < times; ++i) run();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / times;
    }

    static double median(std::vector<double> values) {
        std::sort(values.begin(), values.end());
        return values[values.size() / 2];
    }

    void print(const Case& what, double seconds, double peak) const {
        const double rate = what.work / seconds;
        const char* unit = what.unit == Unit::flop ? "GFLOP/s" : "GB/s";
        const char* verdict = what.error <= what.tolerance ? "" : "  WRONG";
        if (csv_) {
            fmt::print("{},\"{}\",{:.1e},{:.3f},{:.1f},{},{:.3f}\n", what.name, what.shape, what.error,
                       seconds * 1e3, rate / 1e9, unit, rate / peak);
        } else {
            fmt::print("{:<22} {:<26} {:>9.1e} {:>10.3f} {:>8.1f} {:<7} {:>5.0f}%{}\n", what.name, what.shape,
                       what.error, seconds * 1e3, rate / 1e9, unit, 100 * rate / peak, verdict);
        }
        std::fflush(stdout);
    }

    bool csv_ = false;
    int repetitions_ = 11;
    std::string only_;
    bool failed_ = false;
    std::unique_ptr<Backend> backend_;
    int threads_ = omp_get_max_threads();
    std::mt19937 random_{42};
    std::vector<float> matrix_;
    std::vector<float> product_;
    std::vector<float> source_;
    std::vector<float> target_;
};

// Runs a benchmark's body; errors end the process with their message and exit code.
template <class Body>
int run_bench(int argc, char** argv, const std::string& description, Body body) {
    settle_process_environment(argv);
    try {
        Bench bench(argc, argv, description);
        body(bench);
        return bench.status();
    } catch (const Error& error) {
        fmt::print(stderr, "{}\n", error.what());
        return static_cast<int>(error.code());
    }
}

}  // namespace quantmill::bench
