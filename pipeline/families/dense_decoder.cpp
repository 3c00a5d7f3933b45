#include <cmath>
#include <numbers>

#include "pipeline/families/families.h"

namespace quantmill {
namespace {

// "llama3" scaling: long wavelengths are divided by factor, short ones kept, a ramp between.
// transformers computes in single precision; so do we, since positions multiply the difference.
void scale_like_llama3(ModelConfig& rope, double original_positions, std::vector<float>& frequencies) {
    const auto factor = static_cast<float>(rope.number("factor"));
    const auto low = static_cast<float>(rope.number("low_freq_factor"));
    const auto high = static_cast<float>(rope.number("high_freq_factor"));
    const auto positions = static_cast<float>(original_positions);
    for (float& frequency : frequencies) {
        const float wavelength = 2.0F * std::numbers::pi_v<float> / frequency;
        if (wavelength < positions / high) continue;
        if (wavelength > positions / low) {
            frequency /= factor;
        } else {
            const float smooth = (positions / wavelength - low) / (high - low);
            frequency = (1.0F - smooth) * frequency / factor + smooth * frequency;
        }
    }
}

std::vector<float> inverse_frequencies(ModelConfig& config, std::int64_t head_dim) {
    // transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters with both.
    const nlohmann::json& parameters = config.object("rope_parameters");
    const nlohmann::json& scaling = config.object("rope_scaling");
    const nlohmann::json& source = parameters.is_null() ? scaling : parameters;
    const nlohmann::json none = nlohmann::json::object();
    ModelConfig rope(source.is_null() ? none : source, config.file() + " (rope scaling)");

    const double theta = rope.number("rope_theta", config.number("rope_theta", 10000.0));
    const std::string type = rope.text("rope_type", rope.text("type", "default"));
    if (rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0) {
        throw BadInput("{}: partial_rotary_factor other than 1 is not supported", config.file());
    }

    std::vector<float> frequencies(static_cast<std::size_t>(head_dim / 2));
    for (std::size_t i = 0; i < frequencies.size(); ++i) {
        const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
        frequencies[i] = 1.0F / std::pow(static_cast<float>(theta), exponent);
    }
    if (type == "llama3") {
        scale_like_llama3(rope, rope.number("original_max_position_embeddings"), frequencies);
    } else if (type == "linear") {
        for (float& frequency : frequencies) frequency /= static_cast<float>(rope.number("factor"));
    } else if (type != "default") {
        throw BadInput("{}: rope scaling type '{}' is not supported (default, linear, llama3)", config.file(),
                       type);
    }
    rope.refuse_unknown_fields();
    return frequencies;
}

std::vector<Stage> stages(const Attention& attention, std::int64_t hidden, std::int64_t intermediate,
                          const DenseDecoder& traits) {
    const std::int64_t q = attention.heads * attention.head_dim;
    const std::int64_t kv = attention.kv_heads * attention.head_dim;
    return {
        {StageInput::norm,
         "input_layernorm.weight",
         {"qkv",
          {{"self_attn.q_proj", q, hidden, traits.qkv_bias},
           {"self_attn.k_proj", kv, hidden, traits.qkv_bias},
           {"self_attn.v_proj", kv, hidden, traits.qkv_bias}}},
         false},
        {StageInput::attention, "", {"o", {{"self_attn.o_proj", hidden, q, traits.o_bias}}}, true},
        {StageInput::norm,
         "post_attention_layernorm.weight",
         {"gate_up",
          {{"mlp.gate_proj", intermediate, hidden, traits.mlp_bias},
           {"mlp.up_proj", intermediate, hidden, traits.mlp_bias}}},
         false},
        {StageInput::silu_mul,
         "",
         {"down", {{"mlp.down_proj", hidden, intermediate, traits.mlp_bias}}},
         true},
    };
}

// All layers of these families attend alike; a mixture would need a window per block.
void check_layer_types(ModelConfig& config, std::int64_t window) {
    const std::string expected = window > 0 ? "sliding_attention" : "full_attention";
    for (const std::string& type : config.texts("layer_types")) {
        if (type == expected) continue;
        throw BadInput("{}: layer type '{}' is not supported here (all layers '{}')", config.file(), type,
                       expected);
    }
}

}  // namespace

void refuse_sliding_window(ModelConfig& config) {
    if (config.boolean("use_sliding_window", false)) {
        throw BadInput("{}: use_sliding_window is not supported for this family", config.file());
    }
    config.integer("sliding_window", 0);
}

ModelGraph dense_decoder(ModelConfig& config, const std::string& family, const DenseDecoder& traits) {
    ModelGraph graph;
    graph.family = family;
    graph.hidden_size = config.integer("hidden_size");
    graph.vocab_size = config.integer("vocab_size");
    graph.max_positions = config.integer("max_position_embeddings", 2048);
    graph.blocks = static_cast<int>(config.integer("num_hidden_layers"));
    graph.norm_eps = static_cast<float>(config.number("rms_norm_eps", 1e-6));

    Attention& attention = graph.attention;
    attention.heads = config.integer("num_attention_heads");
    attention.kv_heads = config.integer("num_key_value_heads", attention.heads);
    attention.head_dim = config.integer(
        "head_dim", traits.head_dim > 0 ? traits.head_dim : graph.hidden_size / attention.heads);
    attention.window = traits.window;
    attention.qk_norm = traits.qk_norm;
    if (attention.heads % attention.kv_heads != 0 || attention.head_dim % 2 != 0) {
        throw BadInput("{}: {} heads of {} with {} key/value heads do not fit together", config.file(),
                       attention.heads, attention.head_dim, attention.kv_heads);
    }
    if (const std::string act = config.text("hidden_act", "silu"); act != "silu") {
        throw BadInput("{}: hidden_act '{}' is not supported for {} (silu)", config.file(), act, family);
    }

    check_layer_types(config, traits.window);

    graph.inverse_frequencies = inverse_frequencies(config, attention.head_dim);
    graph.stages = stages(attention, graph.hidden_size, config.integer("intermediate_size"), traits);
    if (config.boolean("tie_word_embeddings", false)) graph.lm_head = graph.embedding;
    return graph;
}

}  // namespace quantmill
