"""Squared norms of per-sample weight gradients of a linear layer over positions, and the sums over positions that norm layers need."""

from __future__ import annotations

import pytest
import torch
from test_conv_grad_sqnorm import BF16, CPU, F32, TOLERANCES, interpreted
from torch import Tensor

from infoutil_fast.ops.sqnorms import linear_grad_sqnorm
from infoutil_fast.types import InputError

# N, T, K, O
SHAPES = [(3, 1, 5, 7), (2, 13, 3, 5), (3, 7, 37, 41), (2, 67, 3, 131), (1, 1, 1, 1), (0, 3, 4, 5), (2, 300, 9, 6)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Not contiguous."""
    n, t, k, o = shape
    return torch.randn(n, k, 2 * t).to(dtype)[:, :, ::2].mT, torch.randn(2 * n, t, o + 3).to(dtype)[::2, :, 3:]


def by_sample(x: Tensor, g: Tensor) -> Tensor:
    return (
        torch.stack([(b.double().T @ a.double()).square().sum() for a, b in zip(x, g, strict=True)]) if len(x) else torch.zeros(0).double()
    )


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squares_of_the_weight_gradient(shape: tuple[int, ...], backend: str) -> None:
    for dtype in (F32, BF16):
        x, g = inputs(shape, dtype)
        got = linear_grad_sqnorm(x, g, backend=backend)
        assert got.dtype == F32
        torch.testing.assert_close(got.double(), by_sample(x, g), rtol=TOLERANCES[dtype], atol=0)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"as many positions, not \[2, 3, 4\] float32 and \[2, 5, 4\] float32"):
        linear_grad_sqnorm(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
    with pytest.raises(InputError, match=r"x must be \[N, T, K\] of floats, not \[2, 3\] float32"):
        linear_grad_sqnorm(torch.zeros(2, 3), torch.zeros(2, 3))


INTERPRETED = """
import torch
from infoutil_fast.kernels.linear_grad_sqnorm import linear_grad_sqnorm
from test_linear_grad_sqnorm import SHAPES, TOLERANCES, by_sample, inputs
torch.manual_seed({seed})
for shape in SHAPES:
    for dtype in (torch.float32, torch.bfloat16):
        x, g = inputs(shape, dtype)
        torch.testing.assert_close(linear_grad_sqnorm(x, g).double(), by_sample(x, g), rtol=TOLERANCES[dtype], atol=0)
print("agree")
"""


def test_triton_agrees_under_the_interpreter(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted(INTERPRETED.format(seed=seed), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_agrees_on_the_device(shape: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    for dtype in (F32, BF16):
        x, g = inputs(shape, dtype)
        got = linear_grad_sqnorm(x.cuda(), g.cuda(), backend="triton")
        torch.testing.assert_close(got.cpu().double(), by_sample(x, g), rtol=TOLERANCES[dtype], atol=0)
