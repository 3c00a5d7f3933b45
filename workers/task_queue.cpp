#include "workers/task_queue.h"

#include <utility>

namespace quantmill {

TaskQueue::TaskQueue(std::size_t most_bytes) : most_bytes_(most_bytes), thread_([this] { work(); }) {}

TaskQueue::~TaskQueue() {
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
    }
    changed_.notify_all();
    thread_.join();
}

void TaskQueue::submit(std::size_t bytes, std::function<void()> task) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return failure_ || tasks_.empty() || bytes_ + bytes <= most_bytes_; });
    if (failure_) std::rethrow_exception(failure_);
    tasks_.push_back({bytes, std::move(task)});
    bytes_ += bytes;
    changed_.notify_all();
}

void TaskQueue::finish() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return failure_ || tasks_.empty(); });
    if (failure_) std::rethrow_exception(failure_);
}

void TaskQueue::work() {
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [&] { return closing_ || !tasks_.empty(); });
        if (closing_) return;
        const std::function<void()> run = std::move(tasks_.front().run);
        lock.unlock();
        std::exception_ptr failure;
        try {
            run();
        } catch (...) {
            failure = std::current_exception();
        }
        lock.lock();
        bytes_ -= tasks_.front().bytes;
        tasks_.pop_front();
        failure_ = failure;
        changed_.notify_all();
        if (failure_) return;
    }
}

}  // namespace quantmill
