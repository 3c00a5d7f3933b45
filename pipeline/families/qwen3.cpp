#include "pipeline/families/families.h"

namespace quantmill {

ModelGraph qwen3(ModelConfig& config) {
    DenseDecoder traits;
    traits.qkv_bias = traits.o_bias = config.boolean("attention_bias", false);
    traits.qk_norm = true;
    traits.head_dim = 128;  // the family's default when config.json names none
    refuse_sliding_window(config);
    return dense_decoder(config, "qwen3", traits);
}

}  // namespace quantmill
