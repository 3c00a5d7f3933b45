#include "pipeline/families/families.h"

namespace quantmill {

ModelGraph qwen2(ModelConfig& config) {
    DenseDecoder traits;
    traits.qkv_bias = true;
    refuse_sliding_window(config);
    return dense_decoder(config, "qwen2", traits);
}

}  // namespace quantmill
