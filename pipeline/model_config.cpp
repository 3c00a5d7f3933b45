#include "pipeline/model_config.h"

#include <algorithm>
#include <array>
#include <map>

namespace quantmill {
namespace {

// Fields that change nothing in a forward pass without dropout: what transformers 4 and 5 write into the
// config.json of these families, and what published checkpoints carry beside that.
constexpr auto kHarmlessFields = std::to_array<std::string_view>(
    {// what made the checkpoint, and how it is stored
     "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
     "attn_implementation", "dtype", "model_type", "quantization_config", "torch_dtype", "torchscript",
     "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16",
     // tokens
     "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "prefix", "sep_token_id",
     "tokenizer_class",
     // generation
     "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
     "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
     "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length",
     "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
     "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
     "temperature", "top_k", "top_p", "typical_p", "use_cache",
     // training
     "attention_dropout", "gradient_checkpointing", "hidden_dropout", "initializer_range",
     // lengths that no layer reads
     "max_sequence_length", "max_window_layers", "model_max_length", "original_max_position_embeddings",
     // other tasks and forms of output; pretraining_tp splits the same products
     "chunk_size_feed_forward", "finetuning_task", "id2label", "is_decoder", "is_llama_config", "label2id",
     "num_labels", "output_attentions", "output_hidden_states", "pretraining_tp", "problem_type",
     "return_dict", "task_specific_params", "tf_legacy_loss", "use_return_dict"});

// Fields that change nothing at this one value.
const std::map<std::string_view, nlohmann::json>& neutral_values() {
    static const std::map<std::string_view, nlohmann::json> values{
        {"add_cross_attention", false},
        {"attention_bias", false},
        {"embedding_multiplier", 1.0},
        {"is_causal", true},
        {"is_encoder_decoder", false},
        {"logits_scaling", 1.0},
        {"mlp_bias", false},
        {"num_experts", 0},
        {"num_local_experts", 0},
        {"residual_multiplier", 1.0},
        {"rope_interleaved", false},
        {"tie_encoder_decoder", false},
        {"use_mrope", false},
        {"use_qk_norm", false},
        {"use_rope", true},
        {"use_sliding_window", false},  // Mistral uses its window whatever this says
    };
    return values;
}

bool is_harmless(const std::string& field, const nlohmann::json& value) {
    if (value.is_null() || (value.is_structured() && value.empty())) return true;
    if (std::find(kHarmlessFields.begin(), kHarmlessFields.end(), field) != kHarmlessFields.end())
        return true;
    const auto neutral = neutral_values().find(field);
    return neutral != neutral_values().end() && neutral->second == value;
}

}  // namespace

const nlohmann::json* ModelConfig::find(const std::string& field) {
    read_.insert(field);
    const auto it = json_.find(field);
    return it == json_.end() || it->is_null() ? nullptr : &*it;
}

std::int64_t ModelConfig::integer(const std::string& field) {
    const nlohmann::json* value = find(field);
    if (value == nullptr) throw BadInput("{}: field '{}' is missing", file_, field);
    if (!value->is_number_integer() || value->get<std::int64_t>() <= 0) {
        throw BadInput("{}: field '{}' is {}, expected a positive integer", file_, field, value->dump());
    }
    return value->get<std::int64_t>();
}

std::int64_t ModelConfig::integer(const std::string& field, std::int64_t fallback) {
    return find(field) == nullptr ? fallback : integer(field);
}

double ModelConfig::number(const std::string& field) {
    const nlohmann::json* value = find(field);
    if (value == nullptr) throw BadInput("{}: field '{}' is missing", file_, field);
    if (!value->is_number()) {
        throw BadInput("{}: field '{}' is {}, expected a number", file_, field, value->dump());
    }
    return value->get<double>();
}

double ModelConfig::number(const std::string& field, double fallback) {
    return find(field) == nullptr ? fallback : number(field);
}

bool ModelConfig::boolean(const std::string& field, bool fallback) {
    const nlohmann::json* value = find(field);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) {
        throw BadInput("{}: field '{}' is {}, expected true or false", file_, field, value->dump());
    }
    return value->get<bool>();
}

std::string ModelConfig::text(const std::string& field, const std::string& fallback) {
    const nlohmann::json* value = find(field);
    if (value == nullptr) return fallback;
    if (!value->is_string()) {
        throw BadInput("{}: field '{}' is {}, expected a string", file_, field, value->dump());
    }
    return value->get<std::string>();
}

std::vector<std::string> ModelConfig::texts(const std::string& field) {
    const nlohmann::json* value = find(field);
    if (value == nullptr) return {};
    try {
        return value->get<std::vector<std::string>>();
    } catch (const nlohmann::json::exception&) {
        throw BadInput("{}: field '{}' is {}, expected a list of strings", file_, field, value->dump());
    }
}

const nlohmann::json& ModelConfig::object(const std::string& field) {
    static const nlohmann::json null;
    const nlohmann::json* value = find(field);
    if (value == nullptr) return null;
    if (!value->is_object()) {
        throw BadInput("{}: field '{}' is {}, expected an object", file_, field, value->dump());
    }
    return *value;
}

void ModelConfig::refuse_unknown_fields() const {
    for (const auto& [field, value] : json_.items()) {
        if (read_.contains(field) || is_harmless(field, value)) continue;
        if (field == "auto_map") {
            throw BadInput(
                "{}: field 'auto_map' is {}: the model brings code of its own, which is not run here; if it "
                "computes what its architecture in transformers does, take the field out of config.json",
                file_, value.dump());
        }
        throw BadInput(
            "{}: field '{}' is {}: it is not known for this architecture and may change the model's "
            "mathematics; if it changes nothing in the forward pass, take it out of config.json",
            file_, field, value.dump());
    }
}

}  // namespace quantmill
