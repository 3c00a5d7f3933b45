#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

constexpr std::int64_t kKeyBlock = 128;
constexpr std::int64_t kQueryRows = 192;  // query rows of one product, over all heads of a key/value head
constexpr float kNoScore = std::numeric_limits<float>::lowest();

struct Extents {
    std::int64_t heads;                                       // H
    std::int64_t kv_heads;                                    // K
    std::int64_t width;                                       // D
    std::int64_t shared() const { return heads / kv_heads; }  // query heads of one key/value head
    std::int64_t query_block() const { return std::clamp<std::int64_t>(kQueryRows / shared(), 16, 128); }
};

// Some queries of one sequence and all query heads that share one key/value head.
struct Task {
    std::int64_t sequence_begin;  // token
    std::int64_t query_begin;     // tokens
    std::int64_t query_end;
    std::int64_t kv_head;
};

// e^(score − highest) over visible keys [begin, end) of a row of scores, zero elsewhere; returns the sum.
QUANTMILL_HOT_LOOP float exponentiate(float* scores, std::int64_t begin, std::int64_t end, std::int64_t count,
                                      float highest) {
    constexpr std::int64_t kLanes = 16;
    float sums[kLanes] = {};
    std::fill(scores, scores + begin, 0.0F);
    std::fill(scores + end, scores + count, 0.0F);
    const std::int64_t whole = begin + (end - begin) / kLanes * kLanes;
    for (std::int64_t i = begin; i < whole; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            scores[i + lane] = vector_exp(scores[i + lane] - highest);
            sums[lane] += scores[i + lane];
        }
    }
    for (std::int64_t i = whole; i < end; ++i) {
        scores[i] = vector_exp(scores[i] - highest);
        sums[i - whole] += scores[i];
    }
    float sum = 0.0F;
    for (const float lane : sums) sum += lane;
    return sum;
}

QUANTMILL_HOT_LOOP float highest_of(const float* scores, std::int64_t count, float highest) {
    for (std::int64_t i = 0; i < count; ++i) highest = scores[i] > highest ? scores[i] : highest;
    return highest;
}

QUANTMILL_HOT_LOOP void scale_row(const float* x, float factor, std::int64_t count, float* out) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = x[i] * factor;
}

// One thread's attention for one task at a time, with a running softmax over blocks of keys. Row r holds
// token query_begin + r / shared, query head kv_head · shared + r % shared.
class TaskSolver {
public:
    TaskSolver(const float* q, const float* k, const float* v, float* out, const Extents& extents,
               const AttentionOptions& options)
        : q_(q), k_(k), v_(v), out_(out), extents_(extents), options_(options) {
        const auto rows = static_cast<std::size_t>(extents.query_block() * extents.shared());
        const auto width = static_cast<std::size_t>(extents.width);
        queries_.resize(rows * width);
        sums_.resize(rows * width);
        scores_.resize(rows * kKeyBlock);
        highest_.resize(rows);
        weight_.resize(rows);
    }

    void solve(const Task& task) {
        task_ = task;
        rows_ = (task.query_end - task.query_begin) * extents_.shared();
        gather_queries();
        const std::int64_t window = options_.window;
        std::int64_t begin = task.sequence_begin;
        if (window > 0) begin = std::max(begin, task.query_begin - window + 1);
        for (; begin < task.query_end; begin += kKeyBlock) {
            add_keys(begin, std::min(begin + kKeyBlock, task.query_end));
        }
        scatter();
    }

private:
    std::int64_t token_of(std::int64_t row) const { return task_.query_begin + row / extents_.shared(); }
    std::int64_t query_offset(std::int64_t row) const {
        const std::int64_t head = task_.kv_head * extents_.shared() + row % extents_.shared();
        return (token_of(row) * extents_.heads + head) * extents_.width;
    }
    std::int64_t key_offset(std::int64_t token) const {
        return (token * extents_.kv_heads + task_.kv_head) * extents_.width;
    }

    void gather_queries() {
        const std::int64_t width = extents_.width;
        for (std::int64_t row = 0; row < rows_; ++row) {
            scale_row(q_ + query_offset(row), options_.scale, width, queries_.data() + row * width);
        }
        std::fill_n(highest_.begin(), rows_, kNoScore);
        std::fill_n(weight_.begin(), rows_, 0.0F);
        std::fill_n(sums_.begin(), rows_ * width, 0.0F);
    }

    // Adds keys [begin, end) to every row's softmax.
    void add_keys(std::int64_t begin, std::int64_t end) {
        const std::int64_t width = extents_.width;
        const std::int64_t keys = end - begin;
        const std::int64_t stride = extents_.kv_heads * width;
        sgemm(rows_, keys, width, 1.0F, {queries_.data(), width}, {k_ + key_offset(begin), stride, true},
              0.0F, scores_.data(), keys);
        for (std::int64_t row = 0; row < rows_; ++row) weigh(row, begin, keys);
        sgemm(rows_, width, keys, 1.0F, {scores_.data(), keys}, {v_ + key_offset(begin), stride}, 1.0F,
              sums_.data(), width);
    }

    // Turns a row of scores into weights relative to the row's highest score so far.
    void weigh(std::int64_t row, std::int64_t begin, std::int64_t keys) {
        float* scores = scores_.data() + row * keys;
        const std::int64_t token = token_of(row);
        const std::int64_t last = std::clamp<std::int64_t>(token + 1 - begin, 0, keys);
        const std::int64_t first =
            options_.window > 0 ? std::clamp<std::int64_t>(token + 1 - options_.window - begin, 0, last) : 0;
        const float highest = highest_of(scores + first, last - first, highest_[row]);
        const float correction = vector_exp(highest_[row] - highest);
        const float sum = exponentiate(scores, first, last, keys, highest);
        weight_[row] = weight_[row] * correction + sum;
        highest_[row] = highest;
        float* sums = sums_.data() + row * extents_.width;
        if (correction != 1.0F) scale_row(sums, correction, extents_.width, sums);
    }

    void scatter() {
        const std::int64_t width = extents_.width;
        for (std::int64_t row = 0; row < rows_; ++row) {
            scale_row(sums_.data() + row * width, 1.0F / weight_[row], width, out_ + query_offset(row));
        }
    }

    const float* q_;
    const float* k_;
    const float* v_;
    float* out_;
    Extents extents_;
    AttentionOptions options_;
    Task task_{};
    std::int64_t rows_ = 0;
    std::vector<float> queries_;  // [rows, D], scaled
    std::vector<float> scores_;   // [rows, keys]
    std::vector<float> sums_;     // [rows, D], Σ weight · value
    std::vector<float> highest_;  // [rows]
    std::vector<float> weight_;   // [rows], Σ weight
};

// The longest tasks (late queries) first, so that threads end together.
std::vector<Task> make_tasks(const Sequences& sequences, const Extents& extents) {
    std::vector<Task> tasks;
    for (std::int64_t s = 0; s < sequences.count(); ++s) {
        const std::int64_t begin = sequences.offsets[s];
        const std::int64_t end = sequences.offsets[s + 1];
        for (std::int64_t query = begin; query < end; query += extents.query_block()) {
            for (std::int64_t head = 0; head < extents.kv_heads; ++head) {
                tasks.push_back({begin, query, std::min(query + extents.query_block(), end), head});
            }
        }
    }
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
        return a.query_end - a.sequence_begin > b.query_end - b.sequence_begin;
    });
    return tasks;
}

}  // namespace

void CpuBackend::attention(ConstTensorView q, ConstTensorView k, ConstTensorView v,
                           const Sequences& sequences, const AttentionOptions& options, TensorView out) {
    const bool ranks_fit = q.shape().rank() == 3 && k.shape().rank() == 3;
    const Extents extents = ranks_fit ? Extents{q.extent(1), k.extent(1), q.extent(2)} : Extents{};
    const std::int64_t tokens = sequences.tokens();
    require_operands(ranks_fit && extents.kv_heads > 0 && extents.heads % extents.kv_heads == 0 &&
                         is(q, DType::f32, {tokens, extents.heads, extents.width}) &&
                         is(k, DType::f32, {tokens, extents.kv_heads, extents.width}) &&
                         is(v, DType::f32, k.shape()) && is(out, DType::f32, q.shape()),
                     "attention", {q, k, v, out});
    const std::vector<Task> tasks = make_tasks(sequences, extents);
    const auto* q_data = q.data<float>();
    const auto* k_data = k.data<float>();
    const auto* v_data = v.data<float>();
    auto* out_data = out.data<float>();

#pragma omp parallel
    {
        TaskSolver solver(q_data, k_data, v_data, out_data, extents, options);
#pragma omp for schedule(dynamic, 1)
        for (std::size_t index = 0; index < tasks.size(); ++index) solver.solve(tasks[index]);
    }
}

}  // namespace quantmill
