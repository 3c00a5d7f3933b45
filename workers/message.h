#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace quantmill {

// Plain numbers as the bytes of a host message, and back.
template <class T>
std::string as_message(const std::vector<T>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

template <class T>
std::vector<T> from_message(const std::string& message) {
    std::vector<T> values(message.size() / sizeof(T));
    std::copy_n(message.data(), message.size(), reinterpret_cast<char*>(values.data()));
    return values;
}

}  // namespace quantmill
