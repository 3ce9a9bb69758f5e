"""What runs here, and why the rest does not: what `infoutil info` prints."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from infoutil_fast import methods, ops
from infoutil_fast._version import __version__
from infoutil_fast.models import nets
from infoutil_fast.ops import dispatch
from infoutil_fast.runtime.device import choose_device, choose_dtype, device_name, native_bfloat16
from infoutil_fast.types import first_line

PACKAGES = {  # import name: name in the registry
    "triton": "triton",
    "torchvision": "torchvision",
    "timm": "timm",
    "captum": "captum",
    "sklearn": "scikit-learn",
    "opacus": "opacus",
}
IMPORT_EACH = """
import importlib, json, os, sys, warnings
warnings.simplefilter("ignore")
report, sys.stdout = sys.stdout, sys.stderr
names, sys.path[:] = json.loads(sys.stdin.read())
for name in names:
    try:
        importlib.import_module(name)
        reason = None
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    print(json.dumps([name, reason]), file=report, flush=True)
os._exit(0)
"""


def collect() -> dict[str, Any]:
    """Everything as plain values for JSON; sizes in bytes, and `None` where a reason would stand means that it works."""
    device = choose_device("auto")
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": str(torch.__version__),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
        },
        "devices": _devices(),
        "auto": {"device": str(device), "dtype": str(choose_dtype("auto", device)).removeprefix("torch.")},
        "ops": {op: {backend: _why_not(op, backend) for backend in dispatch.NEEDS} for op in accelerated_ops()},
        "packages": _packages(),
        "methods": {name: methods.load(name).about for name in methods.available()},
        "nets": [*nets.NAMES, *(f"{name} = {nets.canonical(name)}" for name in nets.FOREIGN)],
    }


def info_text(facts: dict[str, Any]) -> str:
    """The same for a terminal: sections of aligned columns."""
    build = facts["torch"]
    devices: list[tuple[str, ...]] = [
        (
            device["name"],
            device["model"],
            f"{device['memory_bytes'] / 2**30:.1f} GiB" if device["memory_bytes"] else "",
            f"bfloat16: {'native' if device['native_bfloat16'] else 'not native'}{' '.join(['', *device['flags']])}",
        )
        for device in facts["devices"]
    ]
    if not any(device["name"].startswith("cuda") for device in facts["devices"]):
        devices.append(("cuda", f"no: {_no_cuda()}"))
    sections: dict[str, list[tuple[str, ...]]] = {
        "devices": devices,
        "ops": [
            (op, backend, f"no: {why}" if why else "yes") for op, backends in facts["ops"].items() for backend, why in backends.items()
        ],
        "packages": [
            (name, package["version"] or "-", f"no: {package['reason']}" if package["reason"] else "yes")
            for name, package in facts["packages"].items()
        ],
        "methods": list(facts["methods"].items()),
        "nets": [(net,) for net in facts["nets"]],
    }
    lines = [
        f"infoutil_fast {facts['version']}, Python {facts['python']}, {facts['platform']}",
        f"torch {build['version']}, {build['cpu_capability']}, {build['threads']} threads; "
        f"auto is {facts['auto']['dtype']} on {facts['auto']['device']}",
    ]
    for title, rows in sections.items():
        lines += ["", title, *_columns(rows)]
    return "\n".join(lines)


def accelerated_ops() -> list[str]:
    """Names of the ops that have more than one version."""
    return sorted(
        name
        for name, value in vars(ops).items()
        if inspect.isfunction(value) and hasattr(value, "__wrapped__") and "backend" in inspect.signature(value).parameters
    )


def _why_not(op: str, backend: str) -> str | None:
    """Why `op` cannot run with `backend` here, None if it can."""
    try:
        reason = dispatch.missing(backend)
    except (ImportError, RuntimeError, OSError) as error:  # there, but broken
        return f"{type(error).__name__}: {first_line(error)}"
    if reason is not None:
        return reason
    if not torch.cuda.is_available() and [d for d, runs in dispatch.DEVICES.items() if backend in runs] == ["cuda"]:
        return _no_cuda()
    if backend == "triton" and importlib.util.find_spec(f"infoutil_fast.kernels.{op}") is None:
        return "there is no such kernel"
    if backend == "cpp" and not hasattr(importlib.import_module("infoutil_fast._C"), op):
        return "the extension was built without it: install the package again"
    return None


def _no_cuda() -> str:
    return "no CUDA device is visible" if torch.version.cuda else "this torch was built without CUDA"


def _devices() -> list[dict[str, Any]]:
    """The CPU, then the CUDA devices."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has_memory = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    cpu = {
        "name": "cpu",
        "model": device_name("cpu").strip() or platform.machine(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if has_memory else None,
        "native_bfloat16": native_bfloat16(torch.device("cpu")),
        "flags": [flag for flag in ("avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", text)],
    }
    devices = [cpu]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(i)
        with torch.cuda.device(i):
            native = native_bfloat16(torch.device("cuda", i))
        flags = [f"sm_{facts.major}{facts.minor}"]
        devices.append(
            {"name": f"cuda:{i}", "model": facts.name, "memory_bytes": facts.total_memory, "native_bfloat16": native, "flags": flags}
        )
    return devices


def _packages() -> dict[str, dict[str, str | None]]:
    """Version of each optional package, and why it cannot be imported."""
    there = [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    reasons = import_reasons(there)
    return {
        name: {"version": _version(project), "reason": reasons[name] if name in there else "not installed"}
        for name, project in PACKAGES.items()
    }


def _version(project: str) -> str | None:
    try:
        return importlib.metadata.version(project)
    except importlib.metadata.PackageNotFoundError:
        return None


def import_reasons(names: Sequence[str], seconds: float = 120) -> dict[str, str | None]:
    """Why each module cannot be imported, None if it can. Tried in a child interpreter, which a broken extension may take down."""
    reasons: dict[str, str | None] = {}
    left = list(names)
    while left:
        try:
            child = subprocess.run(
                [sys.executable, "-c", IMPORT_EACH],
                input=json.dumps([left, sys.path]).encode(),
                capture_output=True,
                timeout=seconds,
                check=False,
            )
            said, end = child.stdout, f"its import ended the interpreter with code {child.returncode}"
        except subprocess.TimeoutExpired as error:
            said, end = error.stdout or b"", f"its import took more than {seconds:g} s"
        answers = dict(json.loads(line) for line in said.splitlines())
        reasons.update(answers)
        left = left[len(answers) :]
        if left:
            reasons[left.pop(0)] = end
    return reasons


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, each column but the last as wide as its longest cell (a row's own last cell does not count)."""
    count = max((len(row) for row in rows), default=0)
    widths = [max((len(row[i]) for row in rows if len(row) > i + 1), default=0) for i in range(count)]
    padded = ([cell.ljust(widths[i]) if i + 1 < len(row) else cell for i, cell in enumerate(row)] for row in rows)
    return [f"  {'  '.join(cells)}".rstrip() for cells in padded]
