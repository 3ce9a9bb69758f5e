// ||dL/dW||^2 of each sample's linear layer over T positions; the definition is infoutil_fast/ops.py::linear_grad_sqnorm.
//
// A 1x1 convolution over a T x 1 image, in the form that takes fewer multiplications: ||G'X||^2 or, by halves, the sum of XX' * GG'.
#include "pixels.h"

namespace {

// [N, T, K] as [N, K, T, 1]
Pixels column(const py::array &a) {
    return {static_cast<const char *>(a.data()), is_bfloat16(a), a.shape(0), a.shape(2), a.shape(1), 1, a.strides(0), a.strides(2), a.strides(1), 0};
}

py::array_t<float> linear_grad_sqnorm(const py::array &x, const py::array &g, int64_t threads) {
    const Pixels from = column(x), grad = column(g);
    const Conv one{{1, 1}, {1, 1}, {0, 0}, {1, 1}};
    const bool gram = from.H * (from.C + grad.C) < 2 * from.C * grad.C;
    return by_sample(from.N, threads, [&](int64_t n) { return gram ? gram_square(from, grad, one, n) : direct_square(from, grad, one, 1, n); });
}

}  // namespace

void bind_linear_grad_sqnorm(py::module_ &m) {
    m.def("linear_grad_sqnorm", &linear_grad_sqnorm, py::arg("x"), py::arg("g"), py::arg("threads"));
}
