"""||dL/dW||^2 from Gram matrices; the definition is infoutil_fast/ops/sqnorms.py::gram_sqnorm. No GPU has timed it yet: unconfirmed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gram_sqnorm(
    x,  # [N, C, H, W], strides XN, XC, XH, XW
    g,  # [N, O, OH, OW], strides GN, GC, GH, GW
    out,  # [N, tiles, tiles] float32
    C,
    O,  # noqa: E741
    H,
    W,
    OH,
    OW,
    PY,
    PX,
    XN: tl.int64,
    XC: tl.int64,
    XH: tl.int64,
    XW: tl.int64,
    GN: tl.int64,
    GC: tl.int64,
    GH: tl.int64,
    GW: tl.int64,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    DY: tl.constexpr,
    DX: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    WIDE: tl.constexpr,  # under the CPU interpreter, whose bfloat16 arithmetic is wrong
):
    sample = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    j = tl.program_id(2)
    at = out + (sample * tl.num_programs(1) + i) * tl.num_programs(2) + j
    if i > j:  # the mirror image of a tile that another program takes twice
        tl.store(at, 0.0)
        return
    t = i * BT + tl.arange(0, BT)  # [BT]
    s = j * BT + tl.arange(0, BT)  # [BT]
    ty, tx, sy, sx = t // OW, t % OW, s // OW, s % OW
    x += sample * XN
    g += sample * GN
    grads = tl.zeros([BT, BT], dtype=tl.float32)
    for c0 in range(0, O, BC):
        c = c0 + tl.arange(0, BC)  # [BC]
        left = tl.load(g + (ty * GH + tx * GW)[:, None] + (c * GC)[None, :], mask=(t < OH * OW)[:, None] & (c < O)[None, :], other=0.0)
        right = tl.load(g + (sy * GH + sx * GW)[None, :] + (c * GC)[:, None], mask=(s < OH * OW)[None, :] & (c < O)[:, None], other=0.0)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        grads = tl.dot(left, right, grads, input_precision="ieee")
    pixels = tl.zeros([BT, BT], dtype=tl.float32)
    for d in range(KH * KW):  # the shift is in the addresses
        dy, dx = d // KW * DY - PY, d % KW * DX - PX
        ya, xa, yb, xb = ty * SY + dy, tx * SX + dx, sy * SY + dy, sx * SX + dx  # [BT] each
        a = (t < OH * OW) & (ya >= 0) & (ya < H) & (xa >= 0) & (xa < W)
        b = (s < OH * OW) & (yb >= 0) & (yb < H) & (xb >= 0) & (xb < W)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            left = tl.load(x + (ya * XH + xa * XW)[:, None] + (c * XC)[None, :], mask=a[:, None] & (c < C)[None, :], other=0.0)
            right = tl.load(x + (yb * XH + xb * XW)[None, :] + (c * XC)[:, None], mask=b[None, :] & (c < C)[:, None], other=0.0)
            if WIDE:
                left, right = left.to(tl.float32), right.to(tl.float32)
            pixels = tl.dot(left, right, pixels, input_precision="ieee")
    tl.store(at, tl.sum(grads * pixels) * tl.where(i < j, 2.0, 1.0))


def _tiles(positions: int, dtype: torch.dtype) -> tuple[int, int]:
    """(positions, channels) of one step: two Grams of 64 x 64 are 64 registers of a thread of four warps.

    Without tensor cores, as for float32, the factors go through registers too: 32 x 32, or they spill. No device has timed it yet.
    """
    most, channels = (64, 32) if dtype == torch.bfloat16 else (32, 16)
    return min(most, max(16, triton.next_power_of_2(positions))), channels


def gram_sqnorm(
    x: Tensor, g: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    BT, BC = _tiles(g.shape[2] * g.shape[3], g.dtype)
    tiles = triton.cdiv(g.shape[2] * g.shape[3], BT)
    out = torch.empty(len(x), tiles * tiles, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out.sum(1)
    _gram_sqnorm[(len(x), tiles, tiles)](
        x,
        g,
        out,
        x.shape[1],
        g.shape[1],
        *x.shape[2:],
        *g.shape[2:],
        *padding,
        *x.stride(),
        *g.stride(),
        KH=kernel[0],
        KW=kernel[1],
        SY=stride[0],
        SX=stride[1],
        DY=dilation[0],
        DX=dilation[1],
        BT=BT,
        BC=BC,
        WIDE=x.device.type == "cpu",
    )
    return out.sum(1).clamp(min=0)


def variants() -> dict[str, tuple[triton.JITFunction, dict[str, str], dict[str, int]]]:
    """What is compiled ahead of time to see its resources: the kernel, the types of its arguments, its constants."""
    found = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        BT, BC = _tiles(49, dtype)
        constants = {"KH": 3, "KW": 3, "SY": 1, "SX": 1, "DY": 1, "DX": 1, "BT": BT, "BC": BC, "WIDE": False}
        signature = {"x": f"*{kind}", "g": f"*{kind}", "out": "*fp32"}
        signature |= dict.fromkeys(("C", "O", "H", "W", "OH", "OW", "PY", "PX"), "i32")
        signature |= dict.fromkeys(("XN", "XC", "XH", "XW", "GN", "GC", "GH", "GW"), "i64") | dict.fromkeys(constants, "constexpr")
        found[f"gram_sqnorm {kind}"] = (_gram_sqnorm, signature, constants)
    return found
