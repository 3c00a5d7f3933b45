#pragma once

#include "comm/control.h"
#include "workers/cli.h"

namespace quantmill {

// `quantmill eval`: perplexity of a plain or GPTQ checkpoint on the sequences of a store, spread over the
// ranks. Collective.
void evaluate(const EvalCommand& command, Control& control);

}  // namespace quantmill
