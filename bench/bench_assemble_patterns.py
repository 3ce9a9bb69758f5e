"""assemble_patterns beside a plain copy of its output, in one run. python -m pytest bench/bench_assemble_patterns.py [--record]"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from infoutil_fast.ops.dispatch import available
from infoutil_fast.ops.patches import assemble_patterns

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def blocks(side: int, device: str) -> Tensor:
    """Of a 4x4 grid under 2x2 blocks: [side] int32 in 0 to 2."""
    return (torch.arange(side, device=device) * 4 // side).clamp(max=2).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("B", "C", "size"), [(8, 128, 8), (8, 16, 32), (1, 128, 28)])
@pytest.mark.parametrize("device", DEVICES)
def test_assemble_patterns(race, device: str, B: int, C: int, size: int, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    P, M = 16, 64
    maps = torch.randn(B * P, C, size, size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    index = torch.randint(P, (M, 3, 3), device=device, dtype=torch.int32)
    row = blocks(size, device)
    out = torch.zeros(B * M, C, size, size, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    other = torch.randn_like(out)
    versions: dict[str, Callable[[], Tensor]] = {
        backend: partial(assemble_patterns, maps, index, row, row, images=B, out=out, backend=backend)
        for backend, reason in available(device).items()
        if reason is None
    }
    results = [call().clone() for call in versions.values()]
    assert all(torch.equal(results[0], result) for result in results[1:])
    versions["copy"] = partial(out.copy_, other)  # what moving this many bytes takes
    megabytes = out.numel() * out.element_size() / 1e6
    params = {"B": B, "P": P, "M": M, "C": C, "size": size, "dtype": str(dtype)[6:], "MB": round(megabytes, 1)}
    race("assemble_patterns", params, device, versions)
