"""Append one row of a benchmark to results/<device>.jsonl, with what is needed to read it later."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device_name(device: str) -> str:
    """The model of the device as its driver or the kernel gives it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor()


Times = Sequence[tuple[float, float]]  # (by the clock, of the processor), in seconds


def row(name: str, params: dict[str, Any], device: str, taken: Times, against: Times, than: str) -> dict[str, Any]:
    """`taken` by this version and `against` by the baseline called `than`, in turn in one run; ratio > 1 where this one is faster.

    On a machine with other work the ratio by the clock depends on who was interrupted: `load` says how much waited, and then processor time
    is the fairer ratio (with one thread).
    """
    wall, busy = zip(*taken, strict=True)
    than_wall, than_busy = zip(*against, strict=True)
    low, _, high = quantiles(wall, n=4)
    return {
        "name": name,
        "params": params,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "n": len(taken),
        "median": median(wall),
        "iqr": [low, high],
        "median_processor": median(busy),
        "baseline": than,
        "ratio": round(median(than_wall) / median(wall), 3),
        "ratio_processor": round(median(than_busy) / median(busy), 3),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m pytest " + " ".join(sys.argv[1:]),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("infoutil_fast", "torch", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def append(device: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write the rows below those of earlier runs; returns the file."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    return path
