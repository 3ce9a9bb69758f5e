"""Peak memory of one PatchShapley in this process, which should be fresh: python bench/peak_memory.py '{"net": ..., "size": ..., ...}'

Prints {"plan": bytes, "call": bytes, "loaded": bytes, "how": ...}: the peaks while it is planned and called, above what was there before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from typing import Any

import torch
from cases import case

from infoutil_fast.runtime.memory import peak_bytes, reset_peak
from infoutil_fast.shapley.maps import PatchShapley


def peaks(net: str, size: int, images: int, evaluations: int, batch: int, dtype: str, device: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    where = torch.device(device)
    model, shown, targets = case(net, size, images, device)
    tiny, few, classes = case("convnet3", 8, 1, device)
    PatchShapley(tiny, (3, 8, 8), dtype=getattr(torch, dtype))(few, classes)  # what the first call of a process loads
    loaded = _now(where)
    plan = PatchShapley(model, (3, size, size), evaluations=evaluations, batch=batch, dtype=getattr(torch, dtype))
    planned = peak_bytes(where) - loaded
    before = _now(where)
    plan(shown, targets)
    return {"plan": planned, "call": peak_bytes(where) - before, "loaded": loaded, "how": repr(plan)}


def _now(device: torch.device) -> int:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # of glibc: freed memory that still counts as resident would hide what the next step takes
        trim(0)
    reset_peak(device)
    return peak_bytes(device)


if __name__ == "__main__":
    print(json.dumps(peaks(**json.loads(sys.argv[1]))))
