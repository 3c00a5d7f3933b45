#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/half.h"

namespace quantmill::bench {

enum class Unit { flop, byte };

struct Case {
    std::string name;
    std::string shape;
    double work;  // of one run, in units
    Unit unit;
    double error;      // against the reference
    double tolerance;  // of the error
};

// Runs cases on one GPU, one line each: error against a reference, median time by events, rate and share
// of what this GPU reaches in a copy of 4 GB or a bf16 product of order 8192, measured at the start.
class CudaBench {
public:
    CudaBench(int argc, char** argv, const std::string& description) {
        CLI::App app(description);
        app.add_flag("--csv", csv_, "comma-separated values");
        app.add_option("--repetitions", repetitions_, "timed runs of each case")->capture_default_str();
        app.add_option("--only", only_, "cases whose name or shape contains this");
        try {
            app.parse(argc, argv);
        } catch (const CLI::ParseError& error) {
            std::exit(app.exit(error));
        }
        cuda::check(cudaEventCreate(&start_), "cudaEventCreate");
        cuda::check(cudaEventCreate(&stop_), "cudaEventCreate");
        measure_peaks();
        if (csv_) {
            fmt::print("name,shape,error,ms,rate,unit,share\n");
        } else {
            fmt::print(
                "{}\ncopy {:.2f} TB/s, bf16 product {:.0f} TFLOP/s\n{:<16} {:<34} {:>9} {:>10} {:>16} "
                "{:>6}\n",
                backend_.description(), peak_bytes_ / 1e12, peak_flops_ / 1e12, "name", "shape", "error",
                "median ms", "rate", "peak");
        }
    }

    CudaBackend& backend() { return backend_; }
    bool wanted(const std::string& name, const std::string& shape) const {
        return only_.empty() || name.find(only_) != std::string::npos ||
               shape.find(only_) != std::string::npos;
    }

    // prepare stands outside the time.
    void measure(
        const Case& what, const std::function<void()>& run, const std::function<void()>& prepare = [] {}) {
        const double seconds = median_seconds(run, prepare);
        const double rate = what.work / seconds;
        const double peak = what.unit == Unit::flop ? peak_flops_ : peak_bytes_;
        const bool right = what.error <= what.tolerance;
        failed_ = failed_ || !right;
        const char* unit = what.unit == Unit::flop ? "TFLOP/s" : "GB/s";
        const double shown = what.unit == Unit::flop ? rate / 1e12 : rate / 1e9;
        if (csv_) {
            fmt::print("{},\"{}\",{:.1e},{:.4f},{:.1f},{},{:.3f}\n", what.name, what.shape, what.error,
                       seconds * 1e3, shown, unit, rate / peak);
        } else {
            fmt::print("{:<16} {:<34} {:>9.1e} {:>10.3f} {:>8.1f} {:<7} {:>5.0f}%{}\n", what.name, what.shape,
                       what.error, seconds * 1e3, shown, unit, 100 * rate / peak, right ? "" : "  WRONG");
        }
        std::fflush(stdout);
    }

    int status() const { return failed_ ? 1 : 0; }

    // --- Operands: numbers spread evenly over ±scale, a function of seed and place. ---

    static float noise(std::uint64_t seed, std::int64_t index) {
        std::uint64_t z = (seed << 40U) + static_cast<std::uint64_t>(index) * 0x9E3779B97F4A7C15U;
        z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
        z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
        return static_cast<float>(static_cast<std::int64_t>(z >> 40U) - (1 << 23)) * 0x1p-23F;
    }
    template <class Value>
    static std::vector<float> generate(std::int64_t count, Value value) {
        std::vector<float> values(static_cast<std::size_t>(count));
#pragma omp parallel for schedule(static)
        for (std::int64_t i = 0; i < count; ++i) values[i] = value(i);
        return values;
    }
    Tensor put(const std::vector<float>& values, Shape shape, DType dtype = DType::f32) {
        Tensor tensor = backend_.empty(shape, DType::f32, "operand");
        backend_.copy_from_host(values.data(), tensor);
        if (dtype == DType::f32) return tensor;
        Tensor converted = backend_.empty(shape, dtype, "operand");
        backend_.convert(tensor, converted);
        return converted;
    }
    Tensor random(Shape shape, DType dtype, float scale = 1.0F) {
        const std::uint64_t seed = ++seed_;
        return put(generate(shape.count(), [&](std::int64_t i) { return scale * noise(seed, i); }), shape,
                   dtype);
    }
    // The same numbers on the CPU backend, in fp32.
    Tensor on_cpu(ConstTensorView view) {
        Tensor tensor = cpu_.empty(view.shape(), DType::f32, "reference");
        cpu_.copy_from_host(get(view).data(), tensor);
        return tensor;
    }
    CpuBackend& cpu() { return cpu_; }
    // The largest |actual − expected| / (|expected| + floor).
    double difference(ConstTensorView actual, const Tensor& expected, float floor) {
        const std::vector<float> values = get(actual);
        const auto* reference = expected.view().data<float>();
        double worst = 0.0;
        for (std::size_t i = 0; i < values.size(); ++i) {
            const double error = std::abs(double{values[i]} - double{reference[i]});
            worst = std::max(worst, std::isnan(error) ? INFINITY : error / (std::abs(reference[i]) + floor));
        }
        return worst;
    }
    Tensor empty(Shape shape, DType dtype) { return backend_.empty(shape, dtype, "result"); }
    std::vector<float> get(ConstTensorView view) {
        if (view.dtype() != DType::f32) {
            Tensor converted = empty(view.shape(), DType::f32);
            backend_.convert(view, converted);
            return get(converted);
        }
        std::vector<float> values(static_cast<std::size_t>(view.shape().count()));
        backend_.copy_to_host(view, values.data());
        return values;
    }

private:
    double median_seconds(const std::function<void()>& run, const std::function<void()>& prepare) {
        prepare();
        run();
        std::vector<float> milliseconds;
        for (int i = 0; i < repetitions_; ++i) {
            prepare();
            cuda::check(cudaEventRecord(start_, backend_.stream()), "cudaEventRecord");
            run();
            cuda::check(cudaEventRecord(stop_, backend_.stream()), "cudaEventRecord");
            cuda::check(cudaEventSynchronize(stop_), "cudaEventSynchronize");
            float elapsed = 0.0F;
            cuda::check(cudaEventElapsedTime(&elapsed, start_, stop_), "cudaEventElapsedTime");
            milliseconds.push_back(elapsed);
        }
        std::sort(milliseconds.begin(), milliseconds.end());
        return milliseconds[milliseconds.size() / 2] * 1e-3;
    }

    void measure_peaks() {
        constexpr std::int64_t kOrder = 8192;
        constexpr std::int64_t kBytes = std::int64_t{1} << 32;
        const Tensor x = random({kOrder, kOrder}, DType::bf16);
        const Tensor y = random({kOrder, kOrder}, DType::bf16);
        Tensor z = empty({kOrder, kOrder}, DType::bf16);
        peak_flops_ =
            2.0 * std::pow(kOrder, 3) / median_seconds([&] { backend_.linear(x, y, {}, z); }, [] {});
        Tensor source = empty({kBytes}, DType::u8);
        Tensor target = empty({kBytes}, DType::u8);
        peak_bytes_ = 2.0 * kBytes / median_seconds([&] { backend_.copy(source, target); }, [] {});
    }

    bool csv_ = false;
    int repetitions_ = 9;
    std::string only_;
    bool failed_ = false;
    CudaBackend backend_{0};
    CpuBackend cpu_{4};
    cudaEvent_t start_ = nullptr, stop_ = nullptr;
    double peak_flops_ = 0.0, peak_bytes_ = 0.0;
    std::uint64_t seed_ = 0;
};

// Runs a benchmark's body; errors end the process with their message and exit code.
template <class Body>
int run_cuda_bench(int argc, char** argv, const std::string& description, Body body) {
    try {
        CudaBench bench(argc, argv, description);
        body(bench);
        return bench.status();
    } catch (const Error& error) {
        fmt::print(stderr, "{}\n", error.what());
        return static_cast<int>(error.code());
    }
}

}  // namespace quantmill::bench
