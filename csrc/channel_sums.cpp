// Sums over positions of (x - mean) g and of g, in one pass; the definition is infoutil_fast/ops.py::channel_sums.
#include "pixels.h"

namespace {

// Adds one sample to sums [2, C]; pixels are taken where they lie if their channels are contiguous, else through a copy.
template <typename T> void sample(const Pixels &x, const Pixels &g, const float *mean, int64_t n, float *sums) {
    const int64_t C = x.C;
    std::vector<T> scratch(2 * C);
    float *products = sums, *plain = sums + C;
    std::fill(sums, sums + 2 * C, 0.0f);
    for (int64_t y = 0; y < x.H; ++y)
        for (int64_t i = 0; i < x.W; ++i) {
            const T *a = x.at<T>(n, y, i, scratch.data()), *b = g.at<T>(n, y, i, scratch.data() + C);
            fastest_tiles().centred(sizeof(T) == 2, a, b, mean, C, products, plain);
        }
}

py::array_t<float> channel_sums(const py::array &x, const py::array &g, const py::array_t<float, py::array::c_style | py::array::forcecast> &mean, int64_t threads) {
    const Pixels from = Pixels::of(x), grad = Pixels::of(g);
    py::array_t<float> result({from.N, int64_t(2), from.C});
    float *to = result.mutable_data();
    const float *centre = mean.data();
    each_sample(from.N, threads, [&](int64_t n) {
        float *sums = to + 2 * n * from.C;
        from.half ? sample<uint16_t>(from, grad, centre, n, sums) : sample<float>(from, grad, centre, n, sums);
    });
    return result;
}

}  // namespace

void bind_channel_sums(py::module_ &m) { m.def("channel_sums", &channel_sums, py::arg("x"), py::arg("g"), py::arg("mean"), py::arg("threads")); }
