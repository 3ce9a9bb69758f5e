"""Sums over positions by channel, on every backend, against float64."""

from __future__ import annotations

import pytest
import torch
from test_conv_grad_sqnorm import BF16, CPU, F32

from infoutil_fast.ops.sqnorms import channel_sums
from infoutil_fast.types import InputError


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("shape", [(3, 5, 7, 4), (2, 67, 1, 13), (1, 1, 1, 1), (0, 3, 2, 2), (2, 16, 31, 9)], ids=str)
def test_sums_of_products_and_of_gradients(shape: tuple[int, ...], backend: str) -> None:
    for dtype in (F32, BF16):
        for layout in (torch.channels_last, torch.contiguous_format):
            x, g = torch.randn(shape).to(dtype).contiguous(memory_format=layout), torch.randn(shape).to(dtype).mT.contiguous().mT
            mean = torch.randn(shape[1])
            got = channel_sums(x, g, mean, backend=backend)
            a, b = x.double() - mean.double()[:, None, None], g.double()
            want = torch.stack([(a * b).sum((2, 3)), b.sum((2, 3))], 1)
            assert got.dtype == F32
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_wrong_input_is_refused() -> None:
    x = torch.zeros(2, 3, 4, 5)
    for bad in (torch.zeros(4), torch.zeros(3).bfloat16()):
        with pytest.raises(InputError, match=r"of one shape, mean float32 of their channels"):
            channel_sums(x, x, bad)
