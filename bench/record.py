"""Append one row of a benchmark to results/<device>.jsonl, with what is needed to read it later."""

from __future__ import annotations

import datetime
import json
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
    return f"{found[1] if found else platform.processor()} ({torch.get_num_threads()} threads)"


def row(name: str, params: dict[str, Any], device: str, seconds: Sequence[float], against: Sequence[float], than: str) -> dict[str, Any]:
    """`seconds` of this version and `against` of the baseline called `than`, taken in turn in one run; ratio > 1: this one is faster."""
    low, _, high = quantiles(seconds, n=4)
    return {
        "name": name,
        "params": params,
        "device": device_name(device),
        "n": len(seconds),
        "median": median(seconds),
        "iqr": [low, high],
        "min": min(seconds),
        "ratio": round(median(against) / median(seconds), 3),
        "ratio_of_mins": round(min(against) / min(seconds), 3),
        "baseline": than,
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m pytest " + " ".join(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]),
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
