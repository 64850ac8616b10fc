// Readable errors at the boundary. Messages name the expected and the actual value.
#pragma once

#include <sstream>
#include <stdexcept>

namespace skipkernels {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
    if (!condition) fail(parts...);
}

}  // namespace skipkernels
