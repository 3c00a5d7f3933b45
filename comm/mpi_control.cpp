#include "comm/mpi_control.h"

#include <mpi.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <numeric>
#include <thread>
#include <utility>

#include "comm/launcher.h"

namespace quantmill {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::duration;
using std::chrono::microseconds;
using std::chrono::milliseconds;

int controls_alive = 0;
std::atomic<Clock::rep> last_poll{Clock::now().time_since_epoch().count()};

std::string mpi_error_text(int status) {
    std::string text(MPI_MAX_ERROR_STRING, '\0');
    int length = 0;
    if (MPI_Error_string(status, text.data(), &length) != MPI_SUCCESS) return "unknown MPI error";
    text.resize(static_cast<std::size_t>(length));
    return text;
}

class MpiControl final : public Control {
public:
    explicit MpiControl(const MpiOptions& options);
    ~MpiControl() override;

    int rank() const override { return rank_; }
    int size() const override { return size_; }
    int local_rank() const override { return local_rank_; }
    int local_size() const override { return local_size_; }
    const std::string& host() const override { return host_; }

    void barrier() override { barrier("a barrier"); }
    std::string broadcast(const std::string& message, int root) override;
    std::vector<std::string> all_gather(const std::string& message) override;
    std::vector<double> all_sum(const std::vector<double>& values) override;
    std::vector<std::int64_t> all_max(const std::vector<std::int64_t>& values) override;
    void broadcast_bytes(void* data, std::size_t bytes, int root) override;
    void all_sum_int64(std::int64_t* data, std::size_t count) override {
        all_reduce(data, count, MPI_SUM, "a sum");
    }
    void sum_int64_to(std::int64_t* data, std::size_t count, int root) override;

    std::unique_ptr<Control> split(int color) override;
    std::unique_ptr<Transfer> start_send_bytes(const void* data, std::size_t bytes, int peer) override;
    std::unique_ptr<Transfer> start_receive_bytes(void* data, std::size_t bytes, int peer) override;

    bool has_mail() const override { return mail_ != MPI_COMM_NULL; }
    bool post(const std::string& text, int peer) override;
    std::optional<Mail> next_mail() override;
    void drop_mail() override;
    [[noreturn]] void abort(ExitCode code) override;

    void check(int status, const std::string& what) const;
    void wait(MPI_Request& request, const std::string& what, Clock::duration busy) const;
    void wait_for_large(MPI_Request& request, const std::string& what) const;

private:
    // A text that was posted and may not have left yet.
    struct Posted {
        std::string text;
        MPI_Request request = MPI_REQUEST_NULL;
    };

    MpiControl(const MpiControl& parent, MPI_Comm communicator);
    void learn_place();
    MPI_Comm duplicate(MPI_Comm source, const std::string& what) const;
    bool poll(MPI_Request& request, const std::string& what, Clock::duration waited) const;
    Clock::duration meet_before(std::size_t bytes, const std::string& what);
    void barrier(const std::string& what);
    void all_reduce(std::int64_t* data, std::size_t count, MPI_Op operation, const std::string& what);
    std::vector<std::size_t> gather_sizes(std::size_t own);
    void find_local_rank();

    MPI_Comm world_ = MPI_COMM_NULL;
    MPI_Comm mail_ = MPI_COMM_NULL;  // of the first Control only, and with full thread support
    std::vector<Posted> posted_;     // to each peer
    std::vector<std::int64_t> posts_, taken_;
    int job_rank_ = 0;  // what messages name
    int rank_ = 0, size_ = 1, local_rank_ = 0, local_size_ = 1;
    std::string host_ = host_name();
    duration<double> timeout_;
    std::size_t max_message_;
    int exceptions_at_start_ = std::uncaught_exceptions();
};

// Long enough for the round trips of a short message on any network.
constexpr Clock::duration kShortWait = microseconds(200);
constexpr std::size_t kLargeMessage = std::size_t{1} << 20U;
// The library's reduction keeps a temporary copy of each message: while that fits a cache, sums are ten
// times faster than in one message of 1 GiB (2 ranks of one host: 3.4 against 0.33 GB/s).
constexpr std::size_t kReductionMessage = std::size_t{2} << 20U;

// Before ranks are known.
void check_start(int status, const char* what) {
    if (status != MPI_SUCCESS) {
        throw InfrastructureError("{}: {} failed: {}", host_name(), what, mpi_error_text(status));
    }
}

void initialise_mpi() {
    int initialised = 0;
    check_start(MPI_Initialized(&initialised), "MPI_Initialized");
    if (initialised != 0) return;
#ifdef OPEN_MPI
    // It would end each of them itself, with other advice than ours.
    if (srun_without_process_interface()) require_launched_processes_in_world(1, false);
#endif
    int provided = MPI_THREAD_SINGLE;
    check_start(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided), "MPI_Init_thread");
    if (provided < MPI_THREAD_FUNNELED) {
        throw InfrastructureError(
            "{}: this MPI library ({}) does not allow threads beside it (MPI_THREAD_FUNNELED); use a "
            "build of it with thread support",
            host_name(), mpi_library());
    }
    check_start(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
}

bool threads_may_call_mpi() {
    int provided = MPI_THREAD_SINGLE;
    check_start(MPI_Query_thread(&provided), "MPI_Query_thread");
    return provided == MPI_THREAD_MULTIPLE;
}

MpiControl::MpiControl(const MpiOptions& options)
    : timeout_(options.timeout > 0 ? options.timeout : wait_timeout()), max_message_(options.max_message) {
    initialise_mpi();
    check(MPI_Comm_rank(MPI_COMM_WORLD, &job_rank_), "MPI_Comm_rank");
    world_ = duplicate(MPI_COMM_WORLD, "all ranks to start");
    if (threads_may_call_mpi()) mail_ = duplicate(MPI_COMM_WORLD, "all ranks to start");
    learn_place();
}

MpiControl::MpiControl(const MpiControl& parent, MPI_Comm communicator)
    : world_(communicator),
      job_rank_(parent.job_rank_),
      timeout_(parent.timeout_),
      max_message_(parent.max_message_) {
    check(MPI_Comm_set_errhandler(world_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    learn_place();
}

void MpiControl::learn_place() {
    check(MPI_Comm_rank(world_, &rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(world_, &size_), "MPI_Comm_size");
    posted_.resize(static_cast<std::size_t>(size_));
    posts_.resize(posted_.size(), 0);
    taken_.resize(posted_.size(), 0);
    find_local_rank();
    ++controls_alive;
}

MPI_Comm MpiControl::duplicate(MPI_Comm source, const std::string& what) const {
    MPI_Comm copy = MPI_COMM_NULL;
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Comm_idup(source, &copy, &request), "MPI_Comm_idup");
    wait(request, what, kShortWait);
    check(MPI_Comm_set_errhandler(copy, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    return copy;
}

MpiControl::~MpiControl() {
    --controls_alive;
    // The peers do not come to MPI_Finalize while an exception takes this rank down: it would hang.
    if (std::uncaught_exceptions() > exceptions_at_start_) return;
    int status = MPI_Comm_free(&world_);
    if (status == MPI_SUCCESS && mail_ != MPI_COMM_NULL) status = MPI_Comm_free(&mail_);
    if (status == MPI_SUCCESS && controls_alive == 0) status = MPI_Finalize();
    if (status != MPI_SUCCESS) {
        std::fprintf(stderr, "rank %d on %s: MPI did not end well: %s\n", job_rank_, host_.c_str(),
                     mpi_error_text(status).c_str());
    }
}

void MpiControl::find_local_rank() {
    MPI_Comm local = MPI_COMM_NULL;
    check(MPI_Comm_split_type(world_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &local),
          "MPI_Comm_split_type");
    check(MPI_Comm_rank(local, &local_rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(local, &local_size_), "MPI_Comm_size");
    check(MPI_Comm_free(&local), "MPI_Comm_free");
}

void MpiControl::check(int status, const std::string& what) const {
    if (status == MPI_SUCCESS) return;
    throw InfrastructureError("rank {} on {}: {} failed: {}", job_rank_, host_, what, mpi_error_text(status));
}

// Whether a request is done; throws when it has been waited for too long.
bool MpiControl::poll(MPI_Request& request, const std::string& what, Clock::duration waited) const {
    int done = 0;
    check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), what);
    note_poll();
    if (done == 0 && waited > timeout_) {
        throw InfrastructureError(
            "rank {} on {} waited {:.0f} s for {}: a peer hangs, is lost or is far slower "
            "(QUANTMILL_TIMEOUT sets the limit)",
            job_rank_, host_, duration<double>(waited).count(), what);
    }
    return done != 0;
}

// Polls: without sleeping for the time `busy`, then with sleeps that grow with the time waited, so that a
// short wait costs no latency and a long one no core.
void MpiControl::wait(MPI_Request& request, const std::string& what, Clock::duration busy) const {
    const Clock::time_point start = Clock::now();
    while (true) {
        const Clock::duration waited = Clock::now() - start;
        if (poll(request, what, waited)) return;
        if (waited < busy) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(
                std::clamp<Clock::duration>(waited / 10, microseconds(10), milliseconds(1)));
        }
    }
}

// A large message between two ranks, of which nobody knows when the other one comes to it. MPI moves some ten
// KB a poll, and says nothing of it: but a burst of polls that takes twice as long as the shortest has moved
// something. While that goes on there is no sleep; a late peer is waited for with sleeps.
void MpiControl::wait_for_large(MPI_Request& request, const std::string& what) const {
    constexpr int kBurst = 32;
    const Clock::time_point start = Clock::now();
    Clock::time_point begin = start, moved = start;
    Clock::duration shortest = Clock::duration::max();
    while (true) {
        for (int i = 0; i < kBurst; ++i) {
            if (poll(request, what, begin - start)) return;
        }
        const Clock::time_point end = Clock::now();
        shortest = std::min(shortest, end - begin);
        if (end - begin > 2 * shortest) moved = end;
        const Clock::duration idle = end - moved;
        if (idle < microseconds(500)) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(
                std::clamp<Clock::duration>(idle / 10, microseconds(20), microseconds(300)));
        }
        begin = Clock::now();
    }
}

// MPI moves a large message only while it is polled, so sleeping would slow it down. Late peers are
// therefore waited for in a barrier, with sleeps; what follows is the transfer alone, polled busily for
// the returned time.
Clock::duration MpiControl::meet_before(std::size_t bytes, const std::string& what) {
    if (bytes < kLargeMessage) return kShortWait;
    barrier(what);
    return std::chrono::seconds(10);
}

void MpiControl::barrier(const std::string& what) {
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Ibarrier(world_, &request), what);
    wait(request, what, kShortWait);
}

void MpiControl::broadcast_bytes(void* data, std::size_t bytes, int root) {
    const std::string what = fmt::format("a broadcast of {} bytes from rank {}", bytes, root);
    const Clock::duration busy = meet_before(bytes, what);
    for (std::size_t begin = 0; begin < bytes; begin += max_message_) {
        const std::size_t piece = std::min(max_message_, bytes - begin);
        MPI_Request request = MPI_REQUEST_NULL;
        check(MPI_Ibcast(static_cast<char*>(data) + begin, static_cast<int>(piece), MPI_BYTE, root, world_,
                         &request),
              what);
        wait(request, what, busy);
    }
}

void MpiControl::all_reduce(std::int64_t* data, std::size_t count, MPI_Op operation,
                            const std::string& what) {
    const std::string whole = fmt::format("{} of {} integers", what, count);
    const Clock::duration busy = meet_before(count * sizeof(std::int64_t), whole);
    const std::size_t max_count = std::min(max_message_, kReductionMessage) / sizeof(std::int64_t);
    for (std::size_t begin = 0; begin < count; begin += max_count) {
        const std::size_t piece = std::min(max_count, count - begin);
        MPI_Request request = MPI_REQUEST_NULL;
        check(MPI_Iallreduce(MPI_IN_PLACE, data + begin, static_cast<int>(piece), MPI_INT64_T, operation,
                             world_, &request),
              whole);
        wait(request, whole, busy);
    }
}

void MpiControl::sum_int64_to(std::int64_t* data, std::size_t count, int root) {
    const std::string whole = fmt::format("a sum of {} integers on rank {}", count, root);
    const Clock::duration busy = meet_before(count * sizeof(std::int64_t), whole);
    const std::size_t max_count = std::min(max_message_, kReductionMessage) / sizeof(std::int64_t);
    for (std::size_t begin = 0; begin < count; begin += max_count) {
        const std::size_t piece = std::min(max_count, count - begin);
        MPI_Request request = MPI_REQUEST_NULL;
        const void* source = rank_ == root ? MPI_IN_PLACE : data + begin;
        check(MPI_Ireduce(source, rank_ == root ? data + begin : nullptr, static_cast<int>(piece),
                          MPI_INT64_T, MPI_SUM, root, world_, &request),
              whole);
        wait(request, whole, busy);
    }
}

std::unique_ptr<Control> MpiControl::split(int color) {
    MPI_Comm part = MPI_COMM_NULL;
    barrier("all ranks to form groups");
    check(MPI_Comm_split(world_, color, rank_, &part), "MPI_Comm_split");
    return std::unique_ptr<Control>(new MpiControl(*this, part));
}

// Pieces of a message that travel between two ranks.
class MpiTransfer final : public Transfer {
public:
    enum class Direction { send, receive };
    MpiTransfer(const MpiControl& control, Direction direction, std::size_t bytes, std::string what)
        : control_(control), direction_(direction), large_(bytes >= kLargeMessage), what_(std::move(what)) {}
    ~MpiTransfer() override {
        if (direction_ == Direction::receive) withdraw();
    }
    MpiTransfer(const MpiTransfer&) = delete;
    MpiTransfer& operator=(const MpiTransfer&) = delete;

    MPI_Request* add() { return &requests_.emplace_back(MPI_REQUEST_NULL); }
    bool done() override {
        int done = 0;
        control_.check(
            MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done, MPI_STATUSES_IGNORE),
            what_);
        return done != 0;
    }
    void wait() override {
        for (MPI_Request& request : requests_) {
            if (large_) {
                control_.wait_for_large(request, what_);
            } else {
                control_.wait(request, what_, milliseconds(2));
            }
        }
    }

private:
    // A job that ends before its messages have come still talks about its end, and MPI would then write what
    // comes into memory that is no longer ours. A piece that has begun to come is let in; a dead sender's
    // never ends.
    void withdraw() noexcept {
        for (MPI_Request& request : requests_) {
            if (request != MPI_REQUEST_NULL) MPI_Cancel(&request);
        }
        const auto patience = Clock::now() + milliseconds(2000);
        int done = 0;
        while (Clock::now() < patience && done == 0) {
            const int pieces = static_cast<int>(requests_.size());
            if (MPI_Testall(pieces, requests_.data(), &done, MPI_STATUSES_IGNORE) != MPI_SUCCESS) return;
        }
    }

    const MpiControl& control_;
    Direction direction_;
    bool large_;
    std::string what_;
    std::vector<MPI_Request> requests_;
};

constexpr int kTransferTag = 1;

std::unique_ptr<Transfer> MpiControl::start_send_bytes(const void* data, std::size_t bytes, int peer) {
    auto transfer =
        std::make_unique<MpiTransfer>(*this, MpiTransfer::Direction::send, bytes,
                                      fmt::format("{} bytes to reach rank {} of {}", bytes, peer, size_));
    for (std::size_t begin = 0; begin < bytes; begin += max_message_) {
        const std::size_t piece = std::min(max_message_, bytes - begin);
        check(MPI_Isend(static_cast<const char*>(data) + begin, static_cast<int>(piece), MPI_BYTE, peer,
                        kTransferTag, world_, transfer->add()),
              "MPI_Isend");
    }
    return transfer;
}

std::unique_ptr<Transfer> MpiControl::start_receive_bytes(void* data, std::size_t bytes, int peer) {
    auto transfer =
        std::make_unique<MpiTransfer>(*this, MpiTransfer::Direction::receive, bytes,
                                      fmt::format("{} bytes from rank {} of {}", bytes, peer, size_));
    for (std::size_t begin = 0; begin < bytes; begin += max_message_) {
        const std::size_t piece = std::min(max_message_, bytes - begin);
        check(MPI_Irecv(static_cast<char*>(data) + begin, static_cast<int>(piece), MPI_BYTE, peer,
                        kTransferTag, world_, transfer->add()),
              "MPI_Irecv");
    }
    return transfer;
}

bool MpiControl::post(const std::string& text, int peer) {
    Posted& last = posted_[static_cast<std::size_t>(peer)];
    int left = 1;
    check(MPI_Test(&last.request, &left, MPI_STATUS_IGNORE), "posting a message");
    if (left == 0) return false;
    last.text = text;
    check(MPI_Isend(last.text.data(), static_cast<int>(last.text.size()), MPI_BYTE, peer, kTransferTag, mail_,
                    &last.request),
          "posting a message");
    ++posts_[static_cast<std::size_t>(peer)];
    return true;
}

std::optional<Mail> MpiControl::next_mail() {
    int found = 0;
    MPI_Message message = MPI_MESSAGE_NULL;
    MPI_Status status;
    check(MPI_Improbe(MPI_ANY_SOURCE, kTransferTag, mail_, &found, &message, &status), "looking for mail");
    if (found == 0) return std::nullopt;
    int bytes = 0;
    check(MPI_Get_count(&status, MPI_BYTE, &bytes), "MPI_Get_count");
    Mail mail{status.MPI_SOURCE, std::string(static_cast<std::size_t>(bytes), '\0')};
    check(MPI_Mrecv(mail.text.data(), bytes, MPI_BYTE, &message, MPI_STATUS_IGNORE), "taking mail");
    ++taken_[static_cast<std::size_t>(mail.from)];
    return mail;
}

void MpiControl::drop_mail() {
    if (!has_mail()) return;
    const std::string mine(reinterpret_cast<const char*>(posts_.data()), posts_.size() * sizeof(posts_[0]));
    const std::vector<std::string> all = all_gather(mine);
    std::int64_t missing = 0;
    for (std::size_t peer = 0; peer < all.size(); ++peer) {
        std::int64_t sent = 0;
        std::memcpy(&sent, all[peer].data() + static_cast<std::size_t>(rank_) * sizeof sent, sizeof sent);
        missing += sent - taken_[peer];
    }
    while (missing > 0) missing -= next_mail() ? 1 : 0;
    for (Posted& last : posted_) wait(last.request, "mail to be taken", kShortWait);
    barrier("all ranks to take their mail");
}

std::string MpiControl::broadcast(const std::string& message, int root) {
    auto bytes = static_cast<std::uint64_t>(message.size());
    broadcast_bytes(&bytes, sizeof bytes, root);
    std::string result = rank_ == root ? message : std::string(bytes, '\0');
    broadcast_bytes(result.data(), bytes, root);
    return result;
}

std::vector<std::size_t> MpiControl::gather_sizes(std::size_t own) {
    const std::string what = "the sizes of all ranks' messages";
    auto size = static_cast<std::uint64_t>(own);
    std::vector<std::uint64_t> sizes(static_cast<std::size_t>(size_));
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Iallgather(&size, 1, MPI_UINT64_T, sizes.data(), 1, MPI_UINT64_T, world_, &request), what);
    wait(request, what, kShortWait);
    return {sizes.begin(), sizes.end()};
}

std::vector<std::string> MpiControl::all_gather(const std::string& message) {
    const std::vector<std::size_t> sizes = gather_sizes(message.size());
    const std::size_t total = std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
    std::vector<std::string> messages(sizes.size());
    if (total > max_message_) {  // displacements are int too
        for (int root = 0; root < size_; ++root) {
            std::string& piece = messages[static_cast<std::size_t>(root)];
            piece = root == rank_ ? message : std::string(sizes[static_cast<std::size_t>(root)], '\0');
            broadcast_bytes(piece.data(), piece.size(), root);
        }
        return messages;
    }

    const std::vector<int> counts(sizes.begin(), sizes.end());
    std::vector<int> begins(counts.size());
    std::exclusive_scan(counts.begin(), counts.end(), begins.begin(), 0);
    std::string joined(total, '\0');
    const std::string what = fmt::format("all ranks' messages ({} bytes)", total);
    const Clock::duration busy = meet_before(total, what);
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Iallgatherv(message.data(), static_cast<int>(message.size()), MPI_BYTE, joined.data(),
                          counts.data(), begins.data(), MPI_BYTE, world_, &request),
          what);
    wait(request, what, busy);
    for (std::size_t r = 0; r < messages.size(); ++r) {
        messages[r] = joined.substr(static_cast<std::size_t>(begins[r]), sizes[r]);
    }
    return messages;
}

// Not a reduction of the library's: its order of additions, and so the result, may differ between ranks
// and runs.
std::vector<double> MpiControl::all_sum(const std::vector<double>& values) {
    const std::size_t bytes = values.size() * sizeof(double);
    std::string message(bytes, '\0');
    if (bytes > 0) std::memcpy(message.data(), values.data(), bytes);
    std::vector<double> sum(values.size(), 0.0);
    std::vector<double> addend(values.size());
    for (const std::string& other : all_gather(message)) {
        if (other.size() != bytes) {
            throw InternalError("rank {} on {} sums {} values, another rank {}", job_rank_, host_,
                                values.size(), other.size() / sizeof(double));
        }
        if (bytes > 0) std::memcpy(addend.data(), other.data(), bytes);
        for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += addend[i];
    }
    return sum;
}

std::vector<std::int64_t> MpiControl::all_max(const std::vector<std::int64_t>& values) {
    std::vector<std::int64_t> result = values;
    all_reduce(result.data(), result.size(), MPI_MAX, "a maximum");
    return result;
}

void MpiControl::abort(ExitCode code) {
    std::fflush(nullptr);
    // The launcher kills all ranks at once and drops what it has not read of their output.
    std::this_thread::sleep_for(milliseconds(300));
    MPI_Abort(MPI_COMM_WORLD, static_cast<int>(code));
    std::_Exit(static_cast<int>(code));
}

}  // namespace

std::unique_ptr<Control> make_mpi_control(const MpiOptions& options) {
    return std::make_unique<MpiControl>(options);
}

void note_poll() { last_poll = Clock::now().time_since_epoch().count(); }

double seconds_since_poll() {
    const Clock::time_point poll{Clock::duration(last_poll.load())};
    return duration<double>(Clock::now() - poll).count();
}

std::string mpi_library() {
    std::string text(MPI_MAX_LIBRARY_VERSION_STRING, '\0');
    int length = 0;
    if (MPI_Get_library_version(text.data(), &length) != MPI_SUCCESS) return "unknown MPI";
    text.resize(static_cast<std::size_t>(length));
    // "Open MPI v4.1.4, package: …" or "MPICH Version:\t4.0.2\nMPICH Release date: …"
    text.resize(std::min(text.find_first_of(",\n"), text.size()));
    std::replace(text.begin(), text.end(), '\t', ' ');
    return text;
}

}  // namespace quantmill
