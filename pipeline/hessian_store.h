#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "pipeline/hessian.h"
#include "pipeline/model_graph.h"

namespace quantmill {

// What the Hessians of a store were made of.
struct HessianOrigin {
    std::string model_name;
    std::string model;   // fingerprint_of_model
    std::string tokens;  // fingerprint_of_tokens
    std::int64_t sequences = 0;
    std::int64_t token_count = 0;
};

// A Hessian summed over all tokens of a job, exactly as it was when it was factored.
struct StoredHessian {
    FixedPointExponents exponents;  // [C]
    std::vector<std::int64_t> sum;  // [C(C+1)/2], the lower triangle row by row
};

// The Hessians of a model in a directory: block-00000.h5, …, each with a group a stage that holds `exponents`
// int32 [C] and `sum` int64 [C(C+1)/2] with checksums, and the attribute `origin`, a JSON text. A block's
// file appears under its name when it is complete.
class HessianStore {
public:
    // `head`: it has the Hessian of lm_head too, as block number graph.blocks.
    HessianStore(std::filesystem::path directory, const ModelGraph& graph, HessianOrigin origin,
                 bool head = false);

    // Refuses a directory that holds Hessians of another origin: ours would not be told from them.
    void require_no_other() const;
    // The same, and makes the directory.
    void prepare() const;
    std::uint64_t bytes() const;  // of all blocks, about
    void write_block(int block, const std::vector<StoredHessian>& stages) const;

    // Throws BadInput that says what differs when a block is missing, broken or of another origin.
    void require_complete() const;
    StoredHessian read(int block, std::size_t stage) const;

private:
    std::filesystem::path file_of(int block) const;
    void require_origin(int block) const;

    std::filesystem::path directory_;
    const ModelGraph& graph_;
    HessianOrigin origin_;
    int blocks_;
};

}  // namespace quantmill
