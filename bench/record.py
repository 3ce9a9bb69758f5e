"""Time a call, and append one row of a benchmark to results/<device>.jsonl, with what is needed to read it later."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from infoutil_fast.runtime import rows
from infoutil_fast.runtime.device import device_name

RESULTS = Path(__file__).parent / "results"


def time_call(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds by the clock, and seconds of processor time (on CUDA the device's own, twice): the second does not count what others take."""
    if device != "cuda":
        start, busy = perf_counter(), process_time()
        call()
        return perf_counter() - start, process_time() - busy
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    elapsed = begin.elapsed_time(end) / 1000
    return elapsed, elapsed


Times = Sequence[tuple[float, float]]  # (by the clock, of the processor), in seconds


def row(
    name: str, params: dict[str, Any], device: str, taken: Times, against: Times, than: str, rivals: Mapping[str, Times] | None = None
) -> dict[str, Any]:
    """`taken` by this version and `against` by the baseline called `than`, in turn in one run; ratio > 1 where this one is faster.

    On a machine with other work the ratio by the clock depends on who was interrupted: `load` says how much waited, and then processor time
    is the fairer ratio (with one thread). `rivals`: further versions of the run; `ratios` has one entry for each, from its pairs of rounds.
    """
    wall, busy = zip(*taken, strict=True)
    than_wall, than_busy = zip(*against, strict=True)
    return {
        **origin(name, params, device),
        **rows.summary(wall),
        "median_processor": median(busy),
        "baseline": than,
        "ratio": round(median(than_wall) / median(wall), 3),
        "ratio_processor": round(median(than_busy) / median(busy), 3),
        **({"ratios": {rival: paired_ratio(taken, times) for rival, times in rivals.items()}} if rivals else {}),
    }


def origin(name: str, params: dict[str, Any], device: str) -> dict[str, Any]:
    """What was measured, on what, with what, when, and by which command."""
    return {"name": name, "params": params, **rows.provenance(device, "python -m pytest " + " ".join(sys.argv[1:]))}


def paired_ratio(taken: Times, rival: Times) -> dict[str, Any]:
    """How many times faster than `rival`, round by round; a rival that was too slow for all rounds counts with its last one."""
    pairs = [(rival[min(i, len(rival) - 1)], own) for i, own in enumerate(taken)]
    wall = rows.summary([there[0] / own[0] for there, own in pairs])
    busy = rows.summary([there[1] / own[1] for there, own in pairs])
    return {
        "median": round(wall["median"], 3),
        "iqr": [round(v, 3) for v in wall["iqr"]],
        "median_processor": round(busy["median"], 3),
        "iqr_processor": [round(v, 3) for v in busy["iqr"]],
        "n": wall["n"],
        "n_rival": len(rival),
    }


def keep_rows(device: str, measured: Sequence[dict[str, Any]]) -> Path:
    """Write the rows below those of earlier runs; returns the file."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = RESULTS / f"{name}.jsonl"
    rows.append(path, measured)
    return path
