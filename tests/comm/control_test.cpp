#include "comm/control.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <thread>

#include "comm/mpi_control.h"
#include "tests/mpi_main.h"

namespace quantmill {
namespace {

using Random = std::mt19937_64;

std::string random_message(Random& random, std::size_t longest) {
    std::string message(random() % (longest + 1), '\0');
    for (char& byte : message) byte = static_cast<char>(random());
    return message;
}

// Message limits, in bytes: the usual one, and small ones so that short messages travel in pieces.
class ControlTest : public testing::TestWithParam<std::size_t> {
protected:
    ControlTest() { RecordProperty("seed", std::to_string(test_seed())); }

    std::unique_ptr<Control> control_ = make_mpi_control({.max_message = GetParam()});
    Random random_{test_seed()};  // the same numbers on every rank
    int rank() const { return control_->rank(); }
    int size() const { return control_->size(); }
};

TEST_P(ControlTest, RanksAreNumberedAndCounted) {
    const std::vector<std::string> ranks = control_->all_gather(std::to_string(rank()));
    ASSERT_EQ(ranks.size(), static_cast<std::size_t>(size()));
    for (int r = 0; r < size(); ++r) EXPECT_EQ(ranks.at(static_cast<std::size_t>(r)), std::to_string(r));
    EXPECT_EQ(size(), test_control().size());
    EXPECT_EQ(control_->local_size(), size());  // tests run on one host
    EXPECT_EQ(control_->local_rank(), rank());
    EXPECT_FALSE(control_->host().empty());
}

TEST_P(ControlTest, BroadcastFromEveryRoot) {
    for (int root = 0; root < size(); ++root) {
        for (const std::size_t longest : {std::size_t{0}, std::size_t{1}, std::size_t{70'000}}) {
            const std::string message = random_message(random_, longest);
            EXPECT_EQ(control_->broadcast(rank() == root ? message : "not mine", root), message);
        }
    }
}

TEST_P(ControlTest, GatherMessagesOfDifferentLengths) {
    for (int round = 0; round < 20; ++round) {
        std::vector<std::string> messages(static_cast<std::size_t>(size()));
        for (std::string& message : messages) message = random_message(random_, round == 0 ? 0 : 300);
        EXPECT_EQ(control_->all_gather(messages.at(static_cast<std::size_t>(rank()))), messages);
    }
}

TEST_P(ControlTest, SumOfDoublesIsInRankOrder) {
    // Numbers whose sum depends on the order: magnitudes from 1e-20 to 1e20.
    std::vector<std::vector<double>> values(static_cast<std::size_t>(size()), std::vector<double>(50));
    for (auto& row : values) {
        for (double& value : row) {
            value = std::pow(10.0, static_cast<double>(random_() % 41) - 20.0) *
                    (static_cast<double>(random_()) / 1e19 - 0.9);
        }
    }
    std::vector<double> expected(50, 0.0);
    for (const auto& row : values) {
        for (std::size_t i = 0; i < row.size(); ++i) expected[i] += row[i];
    }
    EXPECT_EQ(control_->all_sum(values.at(static_cast<std::size_t>(rank()))), expected);
    EXPECT_TRUE(control_->all_sum({}).empty());
}

TEST_P(ControlTest, SumOfDifferentLengthsIsRefused) {
    if (size() == 1) GTEST_SKIP() << "needs two ranks";
    EXPECT_THROW(control_->all_sum(std::vector<double>(rank() == 0 ? 1 : 2)), InternalError);
}

TEST_P(ControlTest, Maximum) {
    constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();
    const std::int64_t r = rank();
    EXPECT_EQ(control_->all_max({r, -r, r == 0 ? kLargest : -kLargest, 7}),
              (std::vector<std::int64_t>{size() - 1, 0, kLargest, 7}));
}

TEST_P(ControlTest, IntegerSumsAreExact) {
    for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{1 + random_() % 3000}}) {
        std::vector<std::int64_t> values(count);
        std::vector<std::int64_t> expected(count);
        for (std::size_t i = 0; i < count; ++i) {
            // Above 2^53: doubles would round.
            const auto base = static_cast<std::int64_t>(random_() >> 8U);
            values[i] = base + rank() * static_cast<std::int64_t>(i);
            expected[i] = base * size() + size() * (size() - 1) / 2 * static_cast<std::int64_t>(i);
        }
        control_->all_sum_int64(values.data(), count);
        EXPECT_EQ(values, expected);
    }
}

TEST_P(ControlTest, SumOnOneRankLeavesTheOthersAlone) {
    for (int root = 0; root < size(); ++root) {
        std::vector<std::int64_t> values(random_() % 3000);
        std::vector<std::int64_t> expected(values.size());
        for (std::size_t i = 0; i < values.size(); ++i) {
            const auto base = static_cast<std::int64_t>(random_() >> 8U);
            values[i] = base + rank();
            expected[i] = rank() == root ? base * size() + size() * (size() - 1) / 2 : values[i];
        }
        control_->sum_int64_to(values.data(), values.size(), root);
        EXPECT_EQ(values, expected) << "root " << root;
    }
}

TEST_P(ControlTest, GroupsAreControlsOfTheirOwn) {
    for (int round = 0; round < 5; ++round) {
        std::vector<int> colors(static_cast<std::size_t>(size()));
        for (int& color : colors) color = static_cast<int>(random_() % 3);
        const int mine = colors.at(static_cast<std::size_t>(rank()));
        const auto group = control_->split(mine);
        std::vector<std::string> expected;
        for (int r = 0; r < size(); ++r) {
            if (colors[static_cast<std::size_t>(r)] == mine) expected.push_back(std::to_string(r));
        }
        EXPECT_EQ(group->size(), static_cast<int>(expected.size()));
        EXPECT_EQ(group->all_gather(std::to_string(rank())), expected);
        EXPECT_EQ(expected.at(static_cast<std::size_t>(group->rank())), std::to_string(rank()));
    }
}

// Each rank sends random messages to each other one; all are on their way at once.
TEST_P(ControlTest, MessagesBetweenTwoRanksArriveInOrder) {
    std::vector<std::string> sent, received;
    std::vector<std::unique_ptr<Transfer>> transfers;
    constexpr int kRounds = 4;
    const auto count = static_cast<std::size_t>(kRounds) * static_cast<std::size_t>(size()) *
                       static_cast<std::size_t>(size());
    for (std::size_t i = 0; i < count; ++i) sent.push_back(random_message(random_, 3000));
    received.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
        const int from = static_cast<int>(i) / size() % size(), to = static_cast<int>(i) % size();
        received[i].resize(sent[i].size());
        if (from == to) continue;
        if (from == rank())
            transfers.push_back(control_->start_send_bytes(sent[i].data(), sent[i].size(), to));
        if (to == rank()) {
            transfers.push_back(control_->start_receive_bytes(received[i].data(), sent[i].size(), from));
        }
    }
    for (const auto& transfer : transfers) transfer->wait();
    for (std::size_t i = 0; i < count; ++i) {
        const int from = static_cast<int>(i) / size() % size(), to = static_cast<int>(i) % size();
        if (to == rank() && from != to) {
            EXPECT_EQ(received[i], sent[i]);
        }
    }
    for (const auto& transfer : transfers) EXPECT_TRUE(transfer->done());
}

// In a ring, with a sender that is late: its receiver has begun to sleep between polls.
TEST_P(ControlTest, ALargeMessageArrivesWhole) {
    const int next = (rank() + 1) % size(), previous = (rank() + size() - 1) % size();
    if (next == rank()) return;
    // MPI looks for each of many pieces in all of them, so pieces of 8 bytes are few.
    std::vector<std::uint64_t> sent(GetParam() < 1000 ? 2'000 : 400'000), received(sent.size());
    const auto fill = [&](int from, std::vector<std::uint64_t>& values) {
        for (std::size_t i = 0; i < values.size(); ++i) {
            values[i] = i * 0x9E3779B97F4A7C15U + static_cast<std::uint64_t>(from);
        }
    };
    fill(rank(), sent);
    const std::size_t bytes = sent.size() * sizeof(sent[0]);
    const auto receive = control_->start_receive_bytes(received.data(), bytes, previous);
    if (rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    const auto send = control_->start_send_bytes(sent.data(), bytes, next);
    receive->wait();
    send->wait();
    fill(previous, sent);
    EXPECT_EQ(received, sent);
}

TEST_P(ControlTest, MailArrivesBesideCollectives) {
    if (!control_->has_mail()) GTEST_SKIP() << "this MPI library lets one thread only call it";
    std::vector<std::string> taken;
    for (int round = 0; round < 3; ++round) {
        const std::string text = std::to_string(rank()) + "/" + std::to_string(round);
        while (!control_->post(text, 0)) control_->all_max({});
        control_->barrier();
        while (rank() == 0 &&
               taken.size() < static_cast<std::size_t>(round + 1) * static_cast<std::size_t>(size())) {
            if (const auto mail = control_->next_mail()) {
                EXPECT_TRUE(mail->text.starts_with(std::to_string(mail->from) + "/")) << mail->text;
                taken.push_back(mail->text);
            }
        }
    }
    std::sort(taken.begin(), taken.end());
    EXPECT_EQ(std::unique(taken.begin(), taken.end()), taken.end());
    control_->post("never taken", (rank() + 1) % size());
    control_->drop_mail();
    EXPECT_FALSE(control_->next_mail().has_value());
}

INSTANTIATE_TEST_SUITE_P(MessageLimits, ControlTest,
                         testing::Values(std::size_t{8}, std::size_t{1000}, std::size_t{1} << 30U));

TEST(LargeMessages, WaitInABarrierFirst) {
    Control& control = test_control();
    std::vector<std::int64_t> values(400'000);  // 3.2 MB
    for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<std::int64_t>(i) * (control.rank() + 1);
    }
    control.all_sum_int64(values.data(), values.size());
    const std::int64_t factor = control.size() * (control.size() + 1) / 2;
    for (std::size_t i = 0; i < values.size(); ++i) {
        ASSERT_EQ(values[i], static_cast<std::int64_t>(i) * factor);
    }
    const std::string message(3'000'000, static_cast<char>('a' + control.rank()));
    const int last = control.size() - 1;
    EXPECT_EQ(control.broadcast(message, last), std::string(3'000'000, static_cast<char>('a' + last)));
}

}  // namespace
}  // namespace quantmill
