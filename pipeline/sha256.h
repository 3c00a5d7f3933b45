#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace quantmill {

// SHA-256 of bytes that come piece by piece.
class Sha256 {
public:
    Sha256();
    ~Sha256();
    Sha256(const Sha256&) = delete;
    Sha256& operator=(const Sha256&) = delete;

    void add(const void* data, std::size_t bytes);
    void add(const std::string& text) { add(text.data(), text.size()); }
    std::string finish();  // lower-case hexadecimal

private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace quantmill
