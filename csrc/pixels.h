// What the gradient-norm ops share: images read pixel by pixel, the geometry of a convolution, one number for each sample.
#pragma once

#include <array>

#include <pybind11/stl.h>

#include "arrays.h"
#include "tiles.h"

using Two = std::array<int64_t, 2>;

struct Conv {
    Two kernel, stride, padding, dilation;
};

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A [N, C, H, W] array of float32 or bfloat16 with any strides, in bytes.
struct Pixels {
    const char *data;
    bool half;
    int64_t N, C, H, W, sn, sc, sy, sx;

    static Pixels of(const py::array &a) {
        return {static_cast<const char *>(a.data()), is_bfloat16(a), a.shape(0), a.shape(1), a.shape(2), a.shape(3),
                a.strides(0), a.strides(1), a.strides(2), a.strides(3)};
    }

    // The channels of one pixel, where they lie or else in `scratch` [C].
    template <typename T> const T *at(int64_t n, int64_t y, int64_t x, T *scratch) const {
        if (sc == sizeof(T)) return reinterpret_cast<const T *>(data + n * sn + y * sy + x * sx);
        copy(n, y, x, 0, C, scratch);
        return scratch;
    }

    // Whether the pixels of an image row follow each other in memory, channel by channel.
    bool joined() const { return sc == (half ? 2 : 4) && sx == C * sc; }

    // `count` channels from c on of one pixel, zeros where it lies outside; T has the array's width.
    template <typename T> void copy(int64_t n, int64_t y, int64_t x, int64_t c, int64_t count, T *to) const {
        if (y < 0 || y >= H || x < 0 || x >= W) {
            std::memset(to, 0, count * sizeof(T));
            return;
        }
        const char *from = data + n * sn + y * sy + x * sx + c * sc;
        if (sc == sizeof(T)) std::memcpy(to, from, count * sizeof(T));
        else
            for (int64_t i = 0; i < count; ++i) std::memcpy(to + i, from + i * sc, sizeof(T));
    }
};

template <typename F> void each_sample(int64_t N, int64_t threads, F f) {
    const py::gil_scoped_release release;
    each_part(N, threads, f);
}

template <typename F> py::array_t<float> by_sample(int64_t N, int64_t threads, F f) {
    py::array_t<float> result(N);
    float *to = result.mutable_data();
    each_sample(N, threads, [&](int64_t n) { to[n] = float(f(n)); });
    return result;
}

// One sample's squared norm: conv_grad_sqnorm.cpp, gram_sqnorm.cpp.
double direct_square(const Pixels &x, const Pixels &g, const Conv &conv, int64_t groups, int64_t n);
double gram_square(const Pixels &x, const Pixels &g, const Conv &conv, int64_t n);
