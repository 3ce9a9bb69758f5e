"""Every coalition's feature map out of those of the periodic masks; the definition is infoutil_fast/ops/patches.py::assemble_patterns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _assemble_patterns(
    maps,  # [B * P, H, W, C]
    index,  # [M, R, S] int32
    row,  # [H] int32
    col,  # [W] int32
    out,  # [B * M, H, W, C] of the dtype of maps: values are moved, never computed with
    P,
    M,
    R,
    S,
    H,
    W,
    tiles,
    C: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    to = tl.program_id(0).to(tl.int64)  # b * M + m; int64: B * M * H * W * C passes 2^31
    n = tl.program_id(1) % tiles * BN + tl.arange(0, BN)  # [BN] pixels
    c = tl.program_id(1) // tiles * BC + tl.arange(0, BC)  # [BC]
    N = H * W
    inside = n < N
    r = tl.load(row + n // W, mask=inside, other=0)  # [BN]
    s = tl.load(col + n % W, mask=inside, other=0)
    pattern = tl.load(index + (to % M * R + r) * S + s, mask=inside, other=0)  # [BN]
    source = (to // M * P + pattern) * N + n  # [BN] int64
    both = inside[:, None] & (c < C)[None, :]  # [BN, BC]
    value = tl.load(maps + source[:, None] * C + c[None, :], mask=both, other=0.0)
    tl.store(out + (to * N + n)[:, None] * C + c[None, :], value, mask=both)


def _tiles(N: int, C: int) -> tuple[int, int]:
    """(pixels, channels) of one program.

    A pixel's pattern is looked up once for all its channels, and these lie side by side in both tensors: where C is a multiple of 4
    (bfloat16: 8), loads and stores are 16 bytes wide. 2048 values are 16 to a thread of four warps. No device has timed it yet.
    """
    BC = min(256, triton.next_power_of_2(C))
    return min(2048 // BC, triton.next_power_of_2(N)), BC


def assemble_patterns(maps: Tensor, index: Tensor, row: Tensor, col: Tensor, *, images: int, out: Tensor | None) -> Tensor:
    (_, C, H, W), (M, R, S) = maps.shape, index.shape
    if out is None:
        out = torch.empty(images * M, C, H, W, dtype=maps.dtype, device=maps.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    BN, BC = _tiles(H * W, C)
    tiles = triton.cdiv(H * W, BN)
    _assemble_patterns[(images * M, tiles * triton.cdiv(C, BC))](
        maps.contiguous(memory_format=torch.channels_last),
        index.contiguous(),
        row.contiguous(),
        col.contiguous(),
        out,
        len(maps) // images,
        M,
        R,
        S,
        H,
        W,
        tiles,
        C=C,
        BN=BN,
        BC=BC,
    )
    return out


def variants() -> dict[str, tuple[triton.JITFunction, dict[str, str], dict[str, int]]]:
    """What is compiled ahead of time to see its resources: the kernel, the types of its arguments, its constants."""
    scalars = dict.fromkeys(("P", "M", "R", "S", "H", "W", "tiles"), "i32")
    found = {}
    for dtype in ("fp32", "bf16"):
        for C in (16, 128):
            BN, BC = _tiles(1024, C)
            constants = {"C": C, "BN": BN, "BC": BC}
            pointers = {"maps": f"*{dtype}", "index": "*i32", "row": "*i32", "col": "*i32", "out": f"*{dtype}"}
            signature = {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")}
            found[f"assemble_patterns {dtype} C={C}"] = (_assemble_patterns, signature, constants)
    return found
