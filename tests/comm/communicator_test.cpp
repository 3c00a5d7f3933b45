#include "tests/comm/communicator_test.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "tests/mpi_main.h"

namespace quantmill {
namespace {

class CommunicatorTest : public testing::TestWithParam<Memory> {
protected:
    void SetUp() override {
        RecordProperty("seed", std::to_string(test_seed()));
        std::string obstacle;
        backend_ = GetParam().backend(control_, obstacle);
        if (backend_ == nullptr) GTEST_SKIP() << obstacle;
        communicator_ = GetParam().communicator(control_, *backend_);
    }

    template <class T>
    Tensor upload(const std::vector<T>& values, Shape shape) {
        Tensor tensor = backend_->empty(shape, dtype_of<T>, "test");
        backend_->copy_from_host(values.data(), tensor);
        return tensor;
    }
    template <class T>
    std::vector<T> download(const Tensor& tensor) {
        std::vector<T> values(static_cast<std::size_t>(tensor.shape().count()));
        backend_->copy_to_host(tensor, values.data());
        return values;
    }
    std::vector<float> random_floats(std::int64_t count) {
        std::vector<float> values(static_cast<std::size_t>(count));
        for (float& value : values) value = static_cast<float>(random_() % 1'000'000);
        return values;
    }

    Control& control_ = test_control();
    std::unique_ptr<Backend> backend_;
    std::unique_ptr<Communicator> communicator_;
    std::mt19937_64 random_{test_seed()};  // the same numbers on every rank
};

TEST_P(CommunicatorTest, BroadcastFromEveryRoot) {
    for (int root = 0; root < control_.size(); ++root) {
        for (const std::int64_t rows : {std::int64_t{0}, std::int64_t{1}, std::int64_t{37}}) {
            const std::vector<float> values = random_floats(rows * 13);
            const std::vector<float> nothing(values.size(), -1.0F);
            const Shape shape{rows, 13};
            Tensor tensor = upload(control_.rank() == root ? values : nothing, shape);
            communicator_->broadcast(tensor, root);
            EXPECT_EQ(download<float>(tensor), values);
        }
    }
}

TEST_P(CommunicatorTest, SumsAreExact) {
    const auto count = static_cast<std::int64_t>(1 + random_() % 5000);
    std::vector<std::int64_t> values(static_cast<std::size_t>(count));
    std::vector<std::int64_t> expected(values.size());
    const std::int64_t ranks = control_.size();
    for (std::size_t i = 0; i < values.size(); ++i) {
        const auto base = static_cast<std::int64_t>(random_() >> 8U) - (std::int64_t{1} << 54U);
        values[i] = base + control_.rank();
        expected[i] = base * ranks + ranks * (ranks - 1) / 2;
    }
    Tensor sum = upload(values, {count});
    communicator_->all_sum(sum);
    EXPECT_EQ(download<std::int64_t>(sum), expected);
}

TEST_P(CommunicatorTest, SumOnOneRank) {
    for (int root = 0; root < control_.size(); ++root) {
        const auto count = static_cast<std::int64_t>(1 + random_() % 3000);
        std::vector<std::int64_t> values(static_cast<std::size_t>(count));
        std::vector<std::int64_t> expected(values.size());
        const std::int64_t ranks = control_.size();
        for (std::size_t i = 0; i < values.size(); ++i) {
            const auto base = static_cast<std::int64_t>(random_() >> 8U);
            values[i] = base + control_.rank();
            expected[i] = base * ranks + ranks * (ranks - 1) / 2;
        }
        Tensor sum = upload(values, {count});
        communicator_->sum_to(sum, root);
        if (control_.rank() == root) {
            EXPECT_EQ(download<std::int64_t>(sum), expected);
        }
    }
}

// Other algorithms than small messages: rings, pieces.
TEST_P(CommunicatorTest, LargeTensors) {
    if (GetParam().name == "in_small_pieces") GTEST_SKIP() << "100,000 pieces take minutes";
    constexpr std::int64_t kRows = 1201, kColumns = 1009;  // 9.7 MB
    std::vector<std::int64_t> values(kRows * kColumns), sums(values.size());
    const std::int64_t ranks = control_.size(), rank = control_.rank();
    for (std::size_t i = 0; i < values.size(); ++i) {
        const auto base = static_cast<std::int64_t>(random_() >> 8U) - (std::int64_t{1} << 54U);
        values[i] = base * (rank + 1);
        sums[i] = base * (ranks * (ranks + 1) / 2);
    }
    Tensor tensor = upload(values, {kRows, kColumns});
    communicator_->all_sum(tensor);
    EXPECT_EQ(download<std::int64_t>(tensor), sums);

    const int root = static_cast<int>(ranks) - 1;
    tensor = upload(values, {kRows, kColumns});
    communicator_->sum_to(tensor, root);
    if (rank == root) {
        EXPECT_EQ(download<std::int64_t>(tensor), sums);
    }

    tensor = upload(rank == root ? sums : values, {kRows, kColumns});
    communicator_->broadcast(tensor, root);
    EXPECT_EQ(download<std::int64_t>(tensor), sums);

    std::vector<RowRange> ranges;
    for (std::int64_t r = 0; r < ranks; ++r) ranges.push_back({kRows * r / ranks, kRows * (r + 1) / ranks});
    std::vector<std::int64_t> mine(sums.size(), -1);
    const RowRange own = ranges[static_cast<std::size_t>(rank)];
    std::copy(sums.begin() + own.begin * kColumns, sums.begin() + own.end * kColumns,
              mine.begin() + own.begin * kColumns);
    tensor = upload(mine, {kRows, kColumns});
    communicator_->all_gather_rows(tensor, ranges);
    EXPECT_EQ(download<std::int64_t>(tensor), sums);
}

// What is sent was computed just before, and what is received is computed with at once.
TEST_P(CommunicatorTest, TransfersFollowTheBackendsWork) {
    if (backend_->name() == "memory" || control_.size() == 1) GTEST_SKIP() << "nothing is computed";
    constexpr std::int64_t kCount = 5'000'000;
    const int rank = control_.rank(), peer = rank ^ 1;
    if (peer >= control_.size()) return;
    for (int round = 0; round < 5; ++round) {
        Tensor source = upload(std::vector<float>(kCount, static_cast<float>(round)), {kCount});
        Tensor tensor = backend_->empty({kCount}, DType::f32, "message");
        if (rank < peer) {
            backend_->copy(source, tensor);  // on its way when the sending starts
            communicator_->start_send(tensor, peer)->wait();
        } else {
            backend_->zero(tensor);
            communicator_->start_receive(tensor, peer)->wait();
            backend_->copy(tensor, source);
            EXPECT_EQ(download<float>(source), std::vector<float>(kCount, static_cast<float>(round)));
        }
    }
}

TEST_P(CommunicatorTest, OnlyIntegersAreSummed) {
    Tensor sum = upload(std::vector<float>{1.0F}, {1});
    EXPECT_THROW(communicator_->all_sum(sum), InternalError);
    EXPECT_THROW(communicator_->sum_to(sum, 0), InternalError);
}

// A chain, as hidden states go from one group of ranks to the next: receive, change, pass on.
TEST_P(CommunicatorTest, TensorsPassAlongAChain) {
    const int rank = control_.rank(), last = control_.size() - 1;
    constexpr int kTensors = 6;
    std::vector<Tensor> tensors;
    std::vector<std::unique_ptr<Transfer>> incoming, outgoing;
    for (int i = 0; i < kTensors; ++i) {
        tensors.push_back(upload(std::vector<float>(static_cast<std::size_t>(50 + i), -1.0F), {50 + i}));
        if (rank > 0) incoming.push_back(communicator_->start_receive(tensors.back(), rank - 1));
    }
    for (std::size_t i = 0; i < kTensors; ++i) {
        std::vector<float> values(50 + i, static_cast<float>(i));
        if (rank > 0) {
            incoming[i]->wait();
            EXPECT_EQ(download<float>(tensors[i]), std::vector<float>(50 + i, static_cast<float>(i)));
        }
        tensors[i] = upload(values, tensors[i].shape());
        if (rank < last) outgoing.push_back(communicator_->start_send(tensors[i], rank + 1));
    }
    for (const auto& transfer : outgoing) transfer->wait();
    Tensor nothing = upload(std::vector<float>(), {0, 3});
    if (rank == 0 && last > 0) communicator_->start_send(nothing, 1)->wait();
    if (rank == 1) communicator_->start_receive(nothing, 0)->wait();
}

// Cuts `rows` at random places, so that some ranges are empty, and deals them to ranks in any order.
std::vector<RowRange> random_ranges(std::int64_t rows, int ranks, std::mt19937_64& random) {
    std::vector<std::int64_t> cuts{0, rows};
    while (cuts.size() < static_cast<std::size_t>(ranks) + 1) {
        cuts.push_back(static_cast<std::int64_t>(random() % (static_cast<std::uint64_t>(rows) + 1)));
    }
    std::sort(cuts.begin(), cuts.end());
    std::vector<RowRange> ranges;
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) ranges.push_back({cuts[i], cuts[i + 1]});
    std::shuffle(ranges.begin(), ranges.end(), random);
    return ranges;
}

TEST_P(CommunicatorTest, GathersRowsOfAnySplit) {
    for (int round = 0; round < 20; ++round) {
        const auto rows = static_cast<std::int64_t>(random_() % 40);
        const auto columns = static_cast<std::int64_t>(1 + random_() % 50);
        const std::vector<float> values = random_floats(rows * columns);
        const std::vector<RowRange> ranges = random_ranges(rows, control_.size(), random_);
        const RowRange own = ranges.at(static_cast<std::size_t>(control_.rank()));
        std::vector<float> mine(values.size(), -1.0F);
        std::copy(values.begin() + own.begin * columns, values.begin() + own.end * columns,
                  mine.begin() + own.begin * columns);
        Tensor tensor = upload(mine, {rows, columns});
        communicator_->all_gather_rows(tensor, ranges);
        EXPECT_EQ(download<float>(tensor), values) << "round " << round;
    }
}

TEST_P(CommunicatorTest, RefusesRangesThatOverlapOrDoNotExist) {
    Tensor tensor = upload(std::vector<float>(10), {5, 2});
    const auto ranks = static_cast<std::size_t>(control_.size());
    std::vector<RowRange> ranges(ranks);
    ranges[0] = {0, 6};
    EXPECT_THROW(communicator_->all_gather_rows(tensor, ranges), InternalError);
    ranges.resize(ranks + 1);
    EXPECT_THROW(communicator_->all_gather_rows(tensor, ranges), InternalError);
    if (ranks == 1) return;
    ranges.resize(ranks);
    ranges[0] = {0, 3};
    ranges[1] = {2, 5};
    EXPECT_THROW(communicator_->all_gather_rows(tensor, ranges), InternalError);
}

INSTANTIATE_TEST_SUITE_P(Memories, CommunicatorTest, testing::ValuesIn(tested_memories()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace quantmill
