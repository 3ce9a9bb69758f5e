// ||dL/dW||^2 of each sample's convolution; the definition is infoutil_fast/ops.py::conv_grad_sqnorm.
//
// Band by band of output rows: the unfolded input [t, K] and the output gradient [t, O] are packed for the cache (bfloat16: positions in
// pairs), multiplied into the weight gradient [O, K] of the one sample, which is squared at the end.
#include "pixels.h"

namespace {

constexpr int64_t BAND = 1 << 17, DEEP = 224;  // words of a packed band of unfolded input; positions

// Row (oy, ox) of the unfolded input of one group: K numbers (ky, kx, c). `joined`: the pixels under a row of the kernel are one run of memory.
template <typename T>
void unfold(const Pixels &x, const Conv &conv, bool joined, int64_t n, int64_t first, int64_t oy, int64_t ox, int64_t c, T *to) {
    const int64_t x0 = ox * conv.stride[1] - conv.padding[1], across = conv.kernel[1];
    joined = joined && x0 >= 0 && x0 + across <= x.W;
    for (int64_t ky = 0; ky < conv.kernel[0]; ++ky) {
        const int64_t y = oy * conv.stride[0] + ky * conv.dilation[0] - conv.padding[0];
        if (joined) x.copy(n, y, x0, first, across * c, to), to += across * c;
        else
            for (int64_t kx = 0; kx < across; ++kx, to += c) x.copy(n, y, x0 + kx * conv.dilation[1], first, c, to);
    }
}

// A pitch of at least n words that is an odd number of cache lines: an even one would leave a part of the cache unused.
int64_t odd(int64_t n) { return (up(n, LANES) / LANES | 1) * LANES; }

// Rows (oy, ox) and (oy, ox + 1) of the unfolded input, in pairs of bfloat16, straight from joined pixels; false where some lie outside.
bool unfold_pair(const Tiles &tiles, const Pixels &x, const Conv &conv, int64_t n, int64_t oy, int64_t ox, uint32_t *to) {
    const int64_t x0 = ox * conv.stride[1] - conv.padding[1], run = conv.kernel[1] * x.C;
    if (x0 < 0 || x0 + conv.stride[1] + conv.kernel[1] > x.W) return false;
    for (int64_t ky = 0; ky < conv.kernel[0]; ++ky, to += run) {
        const int64_t y = oy * conv.stride[0] + ky * conv.dilation[0] - conv.padding[0];
        const auto *from = reinterpret_cast<const uint16_t *>(x.data + n * x.sn + y * x.sy + x0 * x.sx);
        if (y >= 0 && y < x.H) tiles.interleave(from, from + conv.stride[1] * x.C, run, to);
        else std::fill(to, to + run, 0);
    }
    return true;
}

// `row(t, to)` writes `n` numbers of row t; packed as floats or, for bfloat16, as pairs of rows, to `pitch` words a row, by `pair(t, to)` where
// that can. Returns the rows.
template <typename F, typename G>
int64_t pack(const Tiles &tiles, bool half, int64_t t0, int64_t t1, int64_t n, int64_t pitch, std::vector<uint16_t> &two, float *to, F row, G pair) {
    if (!half) {
        for (int64_t t = t0; t < t1; ++t, to += pitch) row(t, to);
        return t1 - t0;
    }
    two.assign(2 * n, 0);
    for (int64_t t = t0; t < t1; t += 2, to += pitch) {
        if (t + 1 < t1 && pair(t, reinterpret_cast<uint32_t *>(to))) continue;
        row(t, two.data());
        if (t + 1 < t1) row(t + 1, two.data() + n);
        else std::fill(two.begin() + n, two.end(), 0);
        tiles.interleave(two.data(), two.data() + n, n, reinterpret_cast<uint32_t *>(to));
    }
    return (t1 - t0 + 1) / 2;
}

}  // namespace

double direct_square(const Pixels &x, const Pixels &g, const Conv &conv, int64_t groups, int64_t n) {
    const Tiles &tiles = fastest_tiles();
    const int64_t c = x.C / groups, o = g.C / groups, k = conv.kernel[0] * conv.kernel[1] * c, t = g.H * g.W;
    const int64_t ku = up(k, LANES), og = up(o, ROWS), kp = odd(ku), op = odd(og), rows = std::clamp<int64_t>(BAND / ku / 2 * 2, 2, DEEP);
    const bool half = x.half, joined = groups == 1 && conv.dilation[1] == 1 && x.joined();
    std::vector<float> u(std::min(rows, t + 1) * kp), a(std::min(rows, t + 1) * op), weight(og * ku);
    std::vector<uint16_t> two;
    double sum = 0;
    for (int64_t group = 0; group < groups; ++group) {
        std::fill(weight.begin(), weight.end(), 0.0f);
        for (int64_t t0 = 0; t0 < t; t0 += rows) {
            const int64_t t1 = std::min(t, t0 + rows);
            pack(tiles, half, t0, t1, k, kp, two, u.data(), [&](int64_t i, auto *to) {
                unfold(x, conv, joined, n, group * c, i / g.W, i % g.W, c, to);
            }, [&](int64_t i, uint32_t *to) {
                return joined && i % g.W + 1 < g.W && unfold_pair(tiles, x, conv, n, i / g.W, i % g.W, to);
            });
            const int64_t packed = pack(tiles, half, t0, t1, o, op, two, a.data(), [&](int64_t i, auto *to) {
                g.copy(n, i / g.W, i % g.W, group * o, o, to);
            }, [&](int64_t i, uint32_t *to) {
                if (g.sc != 2) return false;
                const auto at = [&](int64_t t) { return reinterpret_cast<const uint16_t *>(g.data + n * g.sn + t / g.W * g.sy + t % g.W * g.sx) + group * o; };
                tiles.interleave(at(i), at(i + 1), o, to);
                return true;
            });
            tiles.products(half, a.data(), op, u.data(), kp, packed, weight.data(), ku, og, ku);
        }
        sum += tiles.squares(weight.data(), og * ku);
    }
    return sum;
}

namespace {

py::array_t<float> conv_grad_sqnorm(const py::array &x, const py::array &g, Two kernel, Two stride, Two padding, Two dilation,
                                    int64_t groups, int64_t threads) {
    const Pixels from = Pixels::of(x), grad = Pixels::of(g);
    const Conv conv{kernel, stride, padding, dilation};
    return by_sample(from.N, threads, [&](int64_t n) { return direct_square(from, grad, conv, groups, n); });
}

}  // namespace

void bind_conv_grad_sqnorm(py::module_ &m) {
    m.def("conv_grad_sqnorm", &conv_grad_sqnorm, py::arg("x"), py::arg("g"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
          py::arg("dilation"), py::arg("groups"), py::arg("threads"));
}
