// Ranks over NCCL, each with its GPU, of which the last never comes to a sum: "kill" and "stop" send it that
// signal, "throw" lets it fail. The others say how long they waited for what, abort and end all.
#include <csignal>
#include <cstdio>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "kernels/make_backend.h"

int main(int, char** argv) {
    using namespace quantmill;
    const std::string how = argv[1];
    const auto control = make_control(true);
    try {
        const auto backend = make_backend("cuda", control->local_rank(), control->local_size());
        const auto communicator = make_communicator("nccl", *control, *backend);
        const auto other = make_communicator("nccl", *control, *backend);
        const std::vector<std::int64_t> ones(1'000'000, 1);
        Tensor sum = backend->empty({static_cast<std::int64_t>(ones.size())}, DType::i64, "sum");
        Tensor passed = backend->empty({1000}, DType::i64, "a message");
        backend->copy_from_host(ones.data(), sum);
        communicator->all_sum(sum);
        const int rank = control->rank(), last = control->size() - 1;
        std::unique_ptr<Transfer> transfer;
        if (rank == last) other->start_send(passed, 0)->wait();
        if (rank == 0) other->start_receive(passed, last)->wait();
        if (rank == last) {
            if (how == "kill") std::raise(SIGKILL);
            if (how == "stop") std::raise(SIGSTOP);
            throw InfrastructureError("rank {} on {} fails", last, control->host());
        }
        // Another communicator has work on the device then that waits for the lost rank, too.
        if (rank == 0) transfer = other->start_receive(passed, last);
        communicator->all_sum(sum);
        std::puts("a sum without the last rank");
    } catch (const Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
        control->abort(error.code());
    }
    return 0;
}
