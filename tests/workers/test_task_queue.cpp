#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <stdexcept>
#include <vector>

#include "workers/task_queue.h"

namespace quantmill {
namespace {

TEST(TaskQueue, RunsTasksInOrderOnAnotherThread) {
    TaskQueue queue(100);
    std::vector<int> order;
    for (int i = 0; i < 50; ++i) {
        queue.submit(10, [&order, i, caller = std::this_thread::get_id()] {
            EXPECT_NE(std::this_thread::get_id(), caller);
            order.push_back(i);
        });
    }
    queue.finish();
    ASSERT_EQ(order.size(), 50U);
    for (int i = 0; i < 50; ++i) EXPECT_EQ(order[static_cast<std::size_t>(i)], i);
}

TEST(TaskQueue, HoldsNoMoreThanItsBytes) {
    TaskQueue queue(100);
    std::promise<void> go;
    const std::shared_future<void> started = go.get_future().share();
    std::atomic<int> accepted = 0;
    const auto task = [started] { started.wait(); };
    const auto producer = std::async(std::launch::async, [&] {
        for (int i = 0; i < 5; ++i) {
            queue.submit(40, task);
            ++accepted;
        }
    });
    // Two of 40 bytes fit into 100; the third must wait for the first.
    EXPECT_EQ(producer.wait_for(std::chrono::milliseconds(100)), std::future_status::timeout);
    EXPECT_EQ(accepted, 2);
    go.set_value();
    producer.wait();
    queue.finish();
    EXPECT_EQ(accepted, 5);
}

TEST(TaskQueue, TakesATaskLargerThanItsBytesWhenNothingElseWaits) {
    TaskQueue queue(100);
    bool done = false;
    queue.submit(1000, [&] { done = true; });
    queue.finish();
    EXPECT_TRUE(done);
}

TEST(TaskQueue, ThrowsWhatATaskThrew) {
    TaskQueue queue(100);
    std::atomic<bool> second = false;
    std::promise<void> go;
    queue.submit(1, [wait = go.get_future().share()] {
        wait.wait();
        throw std::runtime_error("the disk is full");
    });
    queue.submit(1, [&] { second = true; });
    go.set_value();
    for (int i = 0; i < 2; ++i) {
        try {
            queue.finish();
            FAIL() << "the failure was lost";
        } catch (const std::runtime_error& error) {
            EXPECT_STREQ(error.what(), "the disk is full");
        }
    }
    EXPECT_THROW(queue.submit(1, [] {}), std::runtime_error);
    EXPECT_FALSE(second) << "nothing may be written after a failure";
}

}  // namespace
}  // namespace quantmill
