#include "pipeline/families/families.h"

namespace quantmill {

ModelGraph mistral(ModelConfig& config) {
    DenseDecoder traits;
    traits.window = config.integer("sliding_window", 0);
    return dense_decoder(config, "mistral", traits);
}

}  // namespace quantmill
