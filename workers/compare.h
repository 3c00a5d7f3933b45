#pragma once

#include "comm/control.h"
#include "workers/cli.h"
#include "workers/tokenized_text.h"

namespace quantmill {

// `quantmill compare`: two results of `quantmill eval --json`, or checkpoints that it evaluates now, side by
// side. Collective.
void compare(const CompareCommand& command, Control& control, const TokenizedText* text);

}  // namespace quantmill
