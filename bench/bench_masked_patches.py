"""masked_patches: its versions on this machine, in one run. python -m pytest bench/bench_masked_patches.py [--record]"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from infoutil_fast.ops.dispatch import available
from infoutil_fast.ops.patches import masked_patches

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("out", ["new", "out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("B", "M", "size"), [(32, 64, 32), (4, 64, 224)])
@pytest.mark.parametrize("device", DEVICES)
def test_masked_patches(race, device: str, B: int, M: int, size: int, dtype: torch.dtype, out: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = torch.randn(B, 3, size, size, device=device).to(dtype)
    masks = torch.rand(M, 16, device=device) < 0.5
    memory = torch.empty(B * M, 3, size, size, dtype=dtype, device=device, memory_format=torch.channels_last) if out == "out" else None
    versions = {
        backend: partial(masked_patches, images, masks, (4, 4), 0.5, out=memory, backend=backend)
        for backend, reason in available(device).items()
        if reason is None
    }
    results = [call().clone() for call in versions.values()]
    assert all(torch.equal(results[0], other) for other in results[1:])
    race("masked_patches", {"B": B, "M": M, "size": size, "dtype": str(dtype)[6:], "memory": out}, device, versions)
