#pragma once

#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace quantmill {

// A kind of memory that tensors move between, and what moves them.
struct Memory {
    std::string name;
    // Nothing when this machine cannot: `obstacle` says why, on all ranks alike.
    std::function<std::unique_ptr<Backend>(Control& control, std::string& obstacle)> backend;
    std::function<std::unique_ptr<Communicator>(Control& control, Backend& backend)> communicator;
};
inline std::ostream& operator<<(std::ostream& stream, const Memory& memory) { return stream << memory.name; }

// Of this test program.
std::vector<Memory> tested_memories();

}  // namespace quantmill
