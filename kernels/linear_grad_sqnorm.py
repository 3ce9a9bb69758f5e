"""||dL/dW||^2 of a sample's linear layer; the definition is infoutil_fast/ops/sqnorms.py::linear_grad_sqnorm. Unconfirmed."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from infoutil_fast.kernels import conv_grad_sqnorm as direct
from infoutil_fast.kernels.gram_sqnorm import gram_sqnorm

variants = partial(direct.variants, "linear_grad_sqnorm", 1)


def linear_grad_sqnorm(x: Tensor, g: Tensor) -> Tensor:
    """A 1x1 convolution over T x 1 pixels, by Grams where that takes fewer multiplications (by halves, on chip)."""
    x, g = x.mT.unsqueeze(3), g.mT.unsqueeze(3)  # [N, K, T, 1], [N, O, T, 1]
    one, none = (1, 1), (0, 0)
    K, O, T = x.shape[1], g.shape[1], x.shape[2]  # noqa: E741
    if T * (K + O) < 2 * K * O:
        return gram_sqnorm(x, g, one, one, none, one)
    return direct.conv_grad_sqnorm(x, g, one, one, none, one, 1)
