#include "pipeline/families/families.h"

namespace quantmill {

// Llama 2, 3 and 3.x; SmolLM2 and other models of the same class.
ModelGraph llama(ModelConfig& config) {
    DenseDecoder traits;
    traits.qkv_bias = traits.o_bias = config.boolean("attention_bias", false);
    traits.mlp_bias = config.boolean("mlp_bias", false);
    return dense_decoder(config, "llama", traits);
}

}  // namespace quantmill
