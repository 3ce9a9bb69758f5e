// ||dL/dW||^2 of each sample's convolution from Gram matrices; the definition is infoutil_fast/ops.py::gram_sqnorm.
//
// With K the Gram matrix of the pixels and G that of the output gradients, the sum of G[t, s] K[stride t + d, stride s + d] over all kernel
// offsets d. The pixels are split by their place within the stride, so that each part has unit stride. Parts and output gradients lie on grids
// of one width, so that a shift is one distance in memory; both matrices are symmetric, so image rows above the diagonal suffice.
#include "pixels.h"

namespace {

struct Shift {
    int64_t y, x;
};

// The pixels (stride * i + at) of one sample, or all where stride is one.
struct Part {
    Two at;
    std::vector<Shift> shifts;  // output position + shift = position in this part
    int64_t least = 0, most = 0, down = 0;  // horizontal shifts, and the largest vertical one
};

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

std::vector<Part> parts(const Conv &conv) {
    std::vector<Part> found;
    for (int64_t ky = 0; ky < conv.kernel[0]; ++ky)
        for (int64_t kx = 0; kx < conv.kernel[1]; ++kx) {
            const int64_t y = ky * conv.dilation[0] - conv.padding[0], x = kx * conv.dilation[1] - conv.padding[1];
            const Shift shift{floor_div(y, conv.stride[0]), floor_div(x, conv.stride[1])};
            const Two at{y - shift.y * conv.stride[0], x - shift.x * conv.stride[1]};
            auto part = std::find_if(found.begin(), found.end(), [&](const Part &p) { return p.at == at; });
            if (part == found.end()) part = found.insert(part, Part{at});
            part->shifts.push_back(shift);
            part->least = std::min(part->least, shift.x), part->most = std::max(part->most, shift.x), part->down = std::max(part->down, shift.y);
        }
    return found;
}

// A Gram matrix: a row for each grid position, of `pitch` words with zeros behind the last position.
struct Gram {
    int64_t pitch = 0;
    std::vector<float> packed, values;

    // Of the pixels stride * (i, j) + at, i < rows, j < width, zeros outside the image; `beyond` positions behind them are readable.
    void fill(const Tiles &tiles, const Pixels &from, int64_t n, Two stride, Two at, int64_t rows, int64_t width, int64_t beyond) {
        const int64_t p = up(rows * width, 4), words = up(from.half ? (from.C + 1) / 2 : from.C, LANES);
        pitch = up(p + beyond, LANES) + LANES;
        packed.assign(p * words, 0.0f);
        values.assign(p * pitch + LANES, 0.0f);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < width; ++j) {
                float *to = packed.data() + (i * width + j) * words;
                const int64_t y = i * stride[0] + at[0], x = j * stride[1] + at[1];
                from.half ? from.copy(n, y, x, 0, from.C, reinterpret_cast<uint16_t *>(to)) : from.copy(n, y, x, 0, from.C, to);
            }
        tiles.gram(from.half, packed.data(), p, words, width, values.data(), pitch);
    }
};

// The sum over the part's shifts d of G[t, s] K[t + d, s + d]; both grids are `width` wide, K's has `rows` rows, G's `outs` x `inside` positions.
double shifted(const Tiles &tiles, const Gram &k, const Gram &g, int64_t rows, int64_t outs, int64_t width, int64_t inside, const Part &part) {
    const int64_t end = outs * width;
    std::vector<float> keep(up(end, LANES) + LANES);
    std::vector<const float *> from;
    double sum = 0;
    for (int64_t dx = part.least; dx <= part.most; ++dx) {
        for (int64_t s = 0; s < end; ++s) keep[s] = s % width < inside && s % width + dx >= 0 && s % width + dx < width ? 2.0f : 0.0f;
        for (int64_t ty = 0; ty < outs; ++ty) {
            const int64_t first = ty * width, low = first + std::max<int64_t>(-dx, 0);
            for (int64_t s = first; s < first + width; ++s) keep[s] *= 0.5f;  // both orders of two positions in one row are formed
            for (int64_t t = first; t < first + width; ++t) {
                if (keep[t] == 0) continue;
                from.clear();
                for (const Shift &d : part.shifts)
                    if (d.x == dx && ty + d.y >= 0 && ty + d.y < rows) from.push_back(k.values.data() + (t + d.y * width + dx) * (k.pitch + 1) + low - t);
                sum += tiles.correlate(g.values.data() + t * g.pitch + low, keep.data() + low, from.data(), int64_t(from.size()), end - low);
            }
        }
    }
    return sum;
}

}  // namespace

double gram_square(const Pixels &x, const Pixels &g, const Conv &conv, int64_t n) {
    const Tiles &tiles = fastest_tiles();
    Gram pixels, grads;
    const int64_t across = (x.W + conv.stride[1] - 1) / conv.stride[1], width = std::max(across, g.W);
    const int64_t rows = (x.H + conv.stride[0] - 1) / conv.stride[0];
    grads.fill(tiles, g, n, {1, 1}, {0, 0}, g.H, width, 0);
    double sum = 0;
    for (const Part &part : parts(conv)) {
        const int64_t beyond = std::max<int64_t>(g.H + part.down - rows, 0) * width + std::max<int64_t>(part.most, 0);
        pixels.fill(tiles, x, n, conv.stride, part.at, rows, width, beyond);
        sum += shifted(tiles, pixels, grads, rows, g.H, width, g.W, part);
    }
    return std::max(sum, 0.0);
}

namespace {

py::array_t<float> gram_sqnorm(const py::array &x, const py::array &g, Two kernel, Two stride, Two padding, Two dilation, int64_t threads) {
    const Pixels from = Pixels::of(x), grad = Pixels::of(g);
    const Conv conv{kernel, stride, padding, dilation};
    return by_sample(from.N, threads, [&](int64_t n) { return gram_square(from, grad, conv, n); });
}

}  // namespace

void bind_gram_sqnorm(py::module_ &m) {
    m.def("gram_sqnorm", &gram_sqnorm, py::arg("x"), py::arg("g"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
          py::arg("dilation"), py::arg("threads"));
}
