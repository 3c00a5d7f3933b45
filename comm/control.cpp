#include "comm/control.h"

#include <cstdio>
#include <cstdlib>

#include "comm/launcher.h"
#include "comm/mpi_control.h"

namespace quantmill {

namespace {

// One process, no MPI: every collective has its own contribution as the result.
class LoneControl final : public Control {
public:
    int rank() const override { return 0; }
    int size() const override { return 1; }
    int local_rank() const override { return 0; }
    int local_size() const override { return 1; }
    const std::string& host() const override { return host_; }

    void barrier() override {}
    std::string broadcast(const std::string& message, int) override { return message; }
    std::vector<std::string> all_gather(const std::string& message) override { return {message}; }
    std::vector<double> all_sum(const std::vector<double>& values) override { return values; }
    std::vector<std::int64_t> all_max(const std::vector<std::int64_t>& values) override { return values; }
    void broadcast_bytes(void*, std::size_t, int) override {}
    void all_sum_int64(std::int64_t*, std::size_t) override {}
    void sum_int64_to(std::int64_t*, std::size_t, int) override {}

    std::unique_ptr<Control> split(int) override { return std::make_unique<LoneControl>(); }
    std::unique_ptr<Transfer> start_send_bytes(const void*, std::size_t, int peer) override { no_peer(peer); }
    std::unique_ptr<Transfer> start_receive_bytes(void*, std::size_t, int peer) override { no_peer(peer); }
    bool has_mail() const override { return false; }
    bool post(const std::string&, int peer) override { no_peer(peer); }
    std::optional<Mail> next_mail() override { return std::nullopt; }
    void drop_mail() override {}

    [[noreturn]] void abort(ExitCode code) override {
        std::fflush(nullptr);
        std::_Exit(static_cast<int>(code));
    }

private:
    [[noreturn]] static void no_peer(int peer) {
        throw InternalError("a message between rank 0 and rank {} of a single process", peer);
    }

    std::string host_ = host_name();
};

}  // namespace

std::unique_ptr<Control> make_lone_control() { return std::make_unique<LoneControl>(); }

std::unique_ptr<Control> make_control(bool use_mpi, bool whole_allocation) {
    std::unique_ptr<Control> control;
    if (use_mpi) {
        control = make_mpi_control({});
    } else {
        control = make_lone_control();
    }
    require_launched_processes_in_world(control->size(), whole_allocation);
    return control;
}

}  // namespace quantmill
