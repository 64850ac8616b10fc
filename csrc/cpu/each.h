// Loops over registers.
#pragma once

#include <type_traits>
#include <utility>

// of the small pieces of a kernel: as calls they would pass their vectors through memory
#define SKIPKERNELS_INLINE __attribute__((always_inline))

namespace skipkernels::SKIPKERNELS_ISA {

// f(0), ..., f(N - 1) without a loop: what they index stays in registers.
template <class F, int... I>
[[gnu::always_inline]] inline void each_of(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
[[gnu::always_inline]] inline void each(F f) {
    each_of(f, std::make_integer_sequence<int, N>{});
}

}  // namespace skipkernels::SKIPKERNELS_ISA
