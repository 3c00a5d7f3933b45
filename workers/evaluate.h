#pragma once

#include "comm/control.h"
#include "workers/cli.h"
#include "workers/evaluation.h"
#include "workers/tokenized_text.h"

namespace quantmill {

// The numbers of docs/evaluation.md for a plain or GPTQ checkpoint, the sequences spread over the ranks; with
// a reference both models are walked together, block by block. `text` holds what --text was tokenized to,
// where this process did so. Collective; equal on all ranks.
Evaluation measure(const EvalCommand& command, Control& control, const TokenizedText* text);

// `quantmill eval`: measures and prints. Collective.
void evaluate(const EvalCommand& command, Control& control, const TokenizedText* text);

}  // namespace quantmill
