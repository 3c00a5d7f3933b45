// What the ways between the GPUs of this host carry: copies of 1 GiB from device memory to device memory by
// the copy engines, one way and both ways at the same time, median of 7. The measure for bench_communicator.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/error.h"
#include "pipeline/stopwatch.h"

namespace {

using namespace quantmill;
using cuda::check;

constexpr std::size_t kBytes = std::size_t{1} << 30U;

// The memory and the stream of one GPU.
struct Side {
    int device;
    void* source = nullptr;
    void* target = nullptr;
    cudaStream_t stream = nullptr;

    Side(int own, int peer) : device(own) {
        check(cudaSetDevice(device), "cudaSetDevice");
        const cudaError_t status = cudaDeviceEnablePeerAccess(peer, 0);
        if (status != cudaErrorPeerAccessAlreadyEnabled && status != cudaErrorPeerAccessUnsupported) {
            check(status, "cudaDeviceEnablePeerAccess");
        }
        static_cast<void>(cudaGetLastError());
        check(cudaMalloc(&source, kBytes), "cudaMalloc");
        check(cudaMalloc(&target, kBytes), "cudaMalloc");
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    }
    ~Side() {
        cudaFree(source);
        cudaFree(target);
        cudaStreamDestroy(stream);
    }
    Side(const Side&) = delete;
    Side& operator=(const Side&) = delete;

    void send(const Side& to) const {
        check(cudaMemcpyPeerAsync(to.target, to.device, source, device, kBytes, stream),
              "cudaMemcpyPeerAsync");
    }
};

double median_seconds(const Side& a, const Side& b, bool both_ways) {
    std::vector<double> seconds;
    for (int i = 0; i < 8; ++i) {
        const Stopwatch watch;
        a.send(b);
        if (both_ways) b.send(a);
        for (const Side* side : {&a, &b}) check(cudaStreamSynchronize(side->stream), "cudaStreamSynchronize");
        if (i > 0) seconds.push_back(watch.seconds());
    }
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
}

}  // namespace

int main() {
    try {
        int devices = 0;
        check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
        if (devices < 2) fmt::print("one GPU has no links to others\n");
        for (int peer = 1; peer < devices; ++peer) {
            int direct = 0;
            check(cudaDeviceCanAccessPeer(&direct, 0, peer), "cudaDeviceCanAccessPeer");
            const Side a(0, peer), b(peer, 0);
            const double one = median_seconds(a, b, false), both = median_seconds(a, b, true);
            fmt::print("GPU 0 and {}, {}: one way {:.1f} GB/s, both ways {:.1f} GB/s each\n", peer,
                       direct != 0 ? "direct" : "through the host", kBytes / one * 1e-9,
                       kBytes / both * 1e-9);
        }
        return 0;
    } catch (const Error& error) {
        fmt::print(stderr, "{}\n", error.what());
        return static_cast<int>(error.code());
    }
}
