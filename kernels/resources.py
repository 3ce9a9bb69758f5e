"""Compile every kernel ahead of time, without a GPU, and print what it takes: python -m infoutil_fast.kernels.resources"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import infoutil_fast.kernels

ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class Resources:
    """Of one thread, except for `shared`. `local` is what spilled registers (and indexed arrays) occupy, in bytes."""

    kernel: str
    arch: int
    registers: int
    shared: int  # bytes of a block
    local: int
    warps: int
    store_bits: int  # the widest store to global memory


def kernels() -> Iterator[tuple[str, triton.JITFunction, dict[str, str], dict[str, int]]]:
    """Every variant that a kernel module declares in `variants()`, with its name."""
    for module in pkgutil.iter_modules(infoutil_fast.kernels.__path__):
        found = importlib.import_module(f"infoutil_fast.kernels.{module.name}")
        for name, (kernel, signature, constants) in getattr(found, "variants", dict)().items():
            yield name, kernel, signature, constants


def compile_for(arch: int, kernel: triton.JITFunction, signature: dict[str, str], constants: dict[str, int]) -> CompiledKernel:
    """The compiled kernel for pointers and integers that are multiples of 16, as at 32 and 224 px. Fails under TRITON_INTERPRET."""
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel, signature, {(list(signature).index(k),): v for k, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32))


def measure() -> Iterator[Resources]:
    """Resources of every kernel on every architecture, as cuobjdump reads them from the cubin."""
    for name, kernel, signature, constants in kernels():
        for arch in ARCHITECTURES:
            compiled = compile_for(arch, kernel, signature, constants)
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder, "kernel.cubin")
                cubin.write_bytes(compiled.asm["cubin"])
                tool = triton.knobs.nvidia.cuobjdump.path
                usage = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
            used = {key: int(value) for key, value in re.findall(r"(REG|SHARED|LOCAL|STACK):(\d+)", usage)}
            stores = [int(n or 1) * int(bits) for n, bits in re.findall(r"st\.global\.(?:v(\d)\.)?b(\d+)", compiled.asm["ptx"])]
            local = used["LOCAL"] + used["STACK"]
            yield Resources(name, arch, used["REG"], compiled.metadata.shared, local, compiled.metadata.num_warps, max(stores, default=0))


def main() -> None:
    print(f"{'kernel':<28}{'sm':>4}{'registers':>11}{'shared':>8}{'local':>7}{'warps':>7}{'store bits':>12}")
    for row in measure():
        name, *numbers = astuple(row)
        print(f"{name:<28}" + "".join(f"{n:>{w}}" for n, w in zip(numbers, (4, 11, 8, 7, 7, 12), strict=True)))


if __name__ == "__main__":
    main()
