#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace quantmill {

// Runs tasks one after the other on a thread of its own. An exception that a task throws ends the queue and
// is thrown again by the next call.
class TaskQueue {
public:
    // `most_bytes` of waiting tasks: a caller that would go beyond waits, unless nothing else is waiting.
    explicit TaskQueue(std::size_t most_bytes);
    ~TaskQueue();  // drops what has not begun
    TaskQueue(const TaskQueue&) = delete;
    TaskQueue& operator=(const TaskQueue&) = delete;

    // `bytes`: the memory that the task holds.
    void submit(std::size_t bytes, std::function<void()> task);
    void finish();  // waits for all tasks

private:
    struct Task {
        std::size_t bytes;
        std::function<void()> run;
    };
    void work();

    std::size_t most_bytes_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Task> tasks_;  // the first one is running
    std::size_t bytes_ = 0;
    std::exception_ptr failure_;
    bool closing_ = false;
    std::thread thread_;
};

}  // namespace quantmill
