"""conv_grad_sqnorm and gram_sqnorm beside the whole batch's ordinary weight gradient.

python -m pytest bench/bench_conv_grad_sqnorm.py [--record]
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from infoutil_fast.ops.dispatch import available
from infoutil_fast.ops.sqnorms import conv_grad_sqnorm, gram_sqnorm

# N, C, O, side, kernel, stride: layers of ConvNet-3 and ResNet-18 at 32 and 224 px
SHAPES = [
    (32, 3, 128, 32, 3, 1),
    (32, 128, 128, 16, 3, 1),
    (32, 128, 128, 8, 3, 1),
    (32, 64, 64, 32, 3, 1),
    (32, 64, 128, 32, 3, 2),
    (32, 256, 256, 8, 3, 1),
    (32, 512, 512, 4, 3, 1),
    (8, 64, 64, 56, 3, 1),
    (8, 128, 128, 28, 3, 1),
    (8, 256, 256, 14, 3, 1),
    (8, 512, 512, 7, 3, 1),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_conv_grad_sqnorm(race, device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    n, c, o, side, k, s = shape
    x = torch.randn(n, c, side, side, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(o, c, k, k, device=device).to(dtype)
    g = torch.randn_like(torch.conv2d(x, weight, None, s, k // 2))
    options = (k, k), (s, s), (k // 2, k // 2), (1, 1)
    mask = [False, True, False]
    versions = {
        "weight gradient": partial(
            torch.ops.aten.convolution_backward, g, x, weight, None, [s, s], [k // 2] * 2, [1, 1], False, [0, 0], 1, mask
        )
    }
    for backend, reason in available(device).items():
        if reason is None:
            versions[f"direct {backend}"] = partial(conv_grad_sqnorm, x, g, *options, 1, backend=backend)
            if g.shape[2] * g.shape[3] <= 1024:
                versions[f"gram {backend}"] = partial(gram_sqnorm, x, g, *options, backend=backend)
    params = dict(zip(("N", "C", "O", "side", "kernel", "stride"), shape, strict=True))
    race("conv_grad_sqnorm", {**params, "dtype": str(dtype)[6:]}, device, versions)
