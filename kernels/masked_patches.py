"""Every image under every coalition of patches; the definition is infoutil_fast/ops/patches.py::masked_patches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _masked_patches(
    images,  # [B, C, H, W], strides SB, SC, SH, SW
    masks,  # [M, rows * cols] uint8, strides KM, KD
    fill,  # [B, C, H, W], strides FB, FC, FH, FW (0 where it repeats)
    out,  # [B * M, H, W, C]; images, fill and out are of one dtype: values are moved, never computed with
    M,
    H,
    W,
    tiles,
    SB: tl.int64,
    SC: tl.int64,
    SH: tl.int64,
    SW: tl.int64,
    FB: tl.int64,
    FC: tl.int64,
    FH: tl.int64,
    FW: tl.int64,
    KM: tl.int64,
    KD: tl.int64,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)  # int64: B * M * H * W * C passes 2^31
    b = pid // tiles
    n = (pid % tiles).to(tl.int32) * BN + tl.arange(0, BN)  # [BN] elements of one image, in the order of the output
    m = tl.program_id(1) * BM + tl.arange(0, BM)  # [BM]
    N = H * W * C
    c = n % C
    x = n // C % W
    y = n // (C * W)
    patch = y * ROWS // H * COLS + x * COLS // W  # [BN]
    inside = n < N
    shown = tl.load(images + b * SB + c * SC + y * SH + x * SW, mask=inside, other=0.0)  # [BN]
    hidden = tl.load(fill + b * FB + c * FC + y * FH + x * FW, mask=inside, other=0.0)  # [BN]
    both = (m < M)[:, None] & inside[None, :]  # [BM, BN]
    keep = tl.load(masks + m[:, None] * KM + patch[None, :] * KD, mask=both, other=0)  # [BM, BN]
    value = tl.where(keep != 0, shown[None, :], hidden[None, :])
    tl.store(out + (b * M + m[:, None]) * N + n[None, :], value, mask=both)


def _tiles(M: int) -> tuple[int, int]:
    """(coalitions, elements) of one program.

    1024 elements are 8 to a thread of four warps, so both dtypes are stored 16 bytes wide. Reading the image, mostly from L2, once for 4
    coalitions is little beside the writes; 16 coalitions would take 200 registers. No device has timed it yet.
    """
    return min(4, triton.next_power_of_2(M)), 1024


def masked_patches(
    images: Tensor, masks: Tensor, grid: tuple[int, int], fill: float | Tensor, *, dtype: torch.dtype | None, out: Tensor | None
) -> Tensor:
    B, C, H, W = images.shape
    M = len(masks)
    if out is None:
        out = torch.empty(B * M, C, H, W, dtype=dtype or images.dtype, device=images.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    base = fill if isinstance(fill, Tensor) else torch.full((), fill, dtype=torch.float32, device=images.device)
    base = (base[:, None, None] if base.ndim == 1 else base).to(out.dtype).expand(B, C, H, W)
    shown = images.to(out.dtype)  # a small tensor beside the output; the rounding is then torch's own
    BM, BN = _tiles(M)
    tiles = triton.cdiv(H * W * C, BN)
    flags = masks.view(torch.uint8)
    _masked_patches[(B * tiles, triton.cdiv(M, BM))](
        shown,
        flags,
        base,
        out,
        M,
        H,
        W,
        tiles,
        *shown.stride(),
        *base.stride(),
        *flags.stride(),
        C=C,
        ROWS=grid[0],
        COLS=grid[1],
        BM=BM,
        BN=BN,
    )
    return out


def variants() -> dict[str, tuple[triton.JITFunction, dict[str, str], dict[str, int]]]:
    """What is compiled ahead of time to see its resources: the kernel, the types of its arguments, its constants."""
    constants = {"C": 3, "ROWS": 4, "COLS": 4, "BM": 4, "BN": 1024}
    scalars = {"M": "i32", "H": "i32", "W": "i32", "tiles": "i32"}
    strides = dict.fromkeys(("SB", "SC", "SH", "SW", "FB", "FC", "FH", "FW", "KM", "KD"), "i64")
    rest = {**scalars, **strides, **dict.fromkeys(constants, "constexpr")}
    return {
        f"masked_patches {dtype}": (
            _masked_patches,
            {"images": f"*{dtype}", "masks": "*u8", "fill": f"*{dtype}", "out": f"*{dtype}", **rest},
            constants,
        )
        for dtype in ("fp32", "bf16")
    }
