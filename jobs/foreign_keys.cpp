#include "jobs/foreign_keys.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

namespace quantmill {

namespace {

struct ForeignKey {
    std::string_view name;  // last word of the key
    std::string_view advice;
};

constexpr ForeignKey foreign_keys[] = {
    // damping
    {"dampening_frac", "write quantization.damp_percent"},
    {"dampening", "write quantization.damp_percent"},
    {"percdamp", "write quantization.damp_percent"},
    {"damp", "write quantization.damp_percent"},
    // order of the columns
    {"actorder", "write quantization.desc_act: true"},
    {"act_order", "write quantization.desc_act: true"},
    // the grid
    {"scheme",
     "write quantization.bits, quantization.group_size and quantization.sym (W4A16 is bits: 4, "
     "group_size: 128, sym: true)"},
    {"config_groups", "write quantization.bits, quantization.group_size and quantization.sym"},
    {"wbits", "write quantization.bits"},
    {"w_bit", "write quantization.bits"},
    {"num_bits", "write quantization.bits"},
    {"q_group_size", "write quantization.group_size"},
    {"groupsize", "write quantization.group_size"},
    {"symmetric", "write quantization.sym"},
    {"zero_point", "write quantization.sym (zero_point: true is sym: false)"},
    {"mse", "write quantization.scale_search: mse (exponent 2.4 over 80 shrinks)"},
    {"gptaq", "write quantization.error_propagation_alpha"},
    {"foem", "write quantization.error_propagation_alpha"},
    // which modules
    {"ignore",
     "lm_head, embeddings and norms are left alone anyway; write quantization.overrides: [{match: NAME, "
     "skip: "
     "true}] for linears"},
    {"targets",
     "every linear of a block is quantized; write quantization.overrides: [{match: NAME, skip: true}] for "
     "those "
     "that are not to be"},
    {"dynamic", "write quantization.overrides: [{match: NAME, bits: 8}], or skip: true for -:"},
    {"modules_to_not_convert",
     "lm_head, embeddings and norms are left alone anyway; write quantization.overrides: [{match: NAME, "
     "skip: "
     "true}] for linears"},
    // calibration
    {"num_calibration_samples", "write calibration.sequences"},
    {"num_samples", "write calibration.sequences"},
    {"nsamples", "write calibration.sequences"},
    {"max_seq_length", "write calibration.sequence_length"},
    {"max_seq_len", "write calibration.sequence_length"},
    {"seqlen", "write calibration.sequence_length"},
    {"seq_len", "write calibration.sequence_length"},
    {"dataset", "make a token store with tools/calibrate.py --dataset and name it in calibration.tokens"},
    {"calibration_dataset",
     "make a token store with tools/calibrate.py --dataset and name it in calibration.tokens"},
    {"batch_size", "the batches are chosen by the program; there is nothing to set"},
    {"block_size", "the solver's block is fixed; there is nothing to set"},
    // files
    {"model_id", "write model, with a checkpoint directory"},
    {"model_path", "write model"},
    {"model_name_or_path", "write model, with a checkpoint directory"},
    {"pretrained_model_dir", "write model"},
    {"output_dir", "write output.directory"},
    {"save_dir", "write output.directory"},
    {"save_path", "write output.directory"},
    {"quantized_model_dir", "write output.directory"},
    {"checkpoint_format", "write output.format"},
    {"quant_method", "GPTQ is the only method; write output.format for how it is stored"},
    {"quantization_config", "the section is called quantization"},
    {"quantize_config", "the section is called quantization"},
    {"quantize", "the section is called quantization"},
    // the machine
    {"device", "write compute.backend"},
    {"device_map", "write compute.backend; ranks and their GPUs come from mpirun or srun"},
};

// Keys and sections that later versions bring; a section stands for all that is below it.
constexpr std::string_view later_keys[] = {"run",  "slurm",        "base",  "models",   "schemes",
                                           "jobs", "max_parallel", "begin", "schedule", "watch_dir"};

std::string_view last_word(std::string_view path) { return path.substr(path.rfind('.') + 1); }

}  // namespace

std::optional<std::string> advice_for_foreign_key(const std::string& path) {
    for (const auto later : later_keys) {
        // A later key is recognised in any section: people bring lm_head or preset without ours.
        const bool known = path == later || path.starts_with(fmt::format("{}.", later)) ||
                           (later.find('.') != std::string_view::npos && last_word(path) == last_word(later));
        if (known) return fmt::format("{} is not in this version", later);
    }
    const auto found = std::ranges::find(foreign_keys, last_word(path), &ForeignKey::name);
    if (found == std::end(foreign_keys)) return std::nullopt;
    return std::string(found->advice);
}

}  // namespace quantmill
