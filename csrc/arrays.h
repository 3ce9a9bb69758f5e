// What the ops share: bfloat16, copying.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "threads.h"

namespace py = pybind11;

// numpy has no bfloat16: Python passes it as uint16.
struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

template <typename T> T from_float(float x);

template <> inline float from_float<float>(float x) { return x; }

// To nearest, ties to even, as torch does.
template <> inline bfloat16 from_float<bfloat16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

inline bool is_bfloat16(const py::array &a) { return a.dtype().kind() == 'u' && a.itemsize() == 2; }

// memcpy that asks for the memory 4 KB further on, which the caller writes next: short runs, one after the other, else wait for their
// stores. The ops take up to 1.5 times as long without it.
inline void copy_onwards(char *to, const char *from, int64_t n) {
#ifdef __GNUC__
    for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(to + i + 4096, 1);  // past the end it does nothing
#endif
    std::memcpy(to, from, n);
}
