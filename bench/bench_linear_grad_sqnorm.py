"""linear_grad_sqnorm and channel_sums on this machine, in one run. python -m pytest bench/bench_linear_grad_sqnorm.py [--record]"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from infoutil_fast.ops.dispatch import version
from infoutil_fast.ops.sqnorms import channel_sums, linear_grad_sqnorm

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize(("T", "K", "O"), [(197, 384, 1536), (64, 512, 512), (1024, 96, 96)])
def test_linear_grad_sqnorm(race, T: int, K: int, O: int, dtype: torch.dtype) -> None:  # noqa: E741
    x, g = torch.randn(8, T, K).to(dtype), torch.randn(8, T, O).to(dtype)
    versions = {name: partial(linear_grad_sqnorm, x, g, backend=name) for name in ("torch", version(linear_grad_sqnorm, x))}
    race("linear_grad_sqnorm", {"N": 8, "T": T, "K": K, "O": O, "dtype": str(dtype)[6:]}, "cpu", versions)


@DTYPES
@pytest.mark.parametrize(("C", "side"), [(128, 32), (512, 4)])
def test_channel_sums(race, C: int, side: int, dtype: torch.dtype) -> None:
    x = torch.randn(32, C, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    g, mean = torch.randn_like(x), torch.randn(C)
    versions = {name: partial(channel_sums, x, g, mean, backend=name) for name in ("torch", version(channel_sums, x))}
    race("channel_sums", {"N": 32, "C": C, "side": side, "dtype": str(dtype)[6:]}, "cpu", versions)
