"""||dL/dW||^2 of each sample's convolution; the definition is infoutil_fast/ops/sqnorms.py::conv_grad_sqnorm.

Unconfirmed: no GPU has timed it yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _conv_grad_sqnorm(
    x,  # [N, groups * C, H, W], strides XN, XC, XH, XW
    g,  # [N, groups * O, OH, OW], strides GN, GC, GH, GW
    out,  # [N, groups, o_tiles * k_tiles] float32
    groups,
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
    BO: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    WIDE: tl.constexpr,  # under the CPU interpreter, whose bfloat16 arithmetic is wrong
):
    sample = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    o = tl.program_id(1) * BO + tl.arange(0, BO)  # [BO]
    k = tl.program_id(2) * BK + tl.arange(0, BK)  # [BK], (ky, kx, c): neighbours are neighbouring channels
    c = k % C
    dx = k // C % KW * DX - PX
    dy = k // (C * KW) * DY - PY
    x += sample * XN + (group * C + c) * XC  # [BK]
    g += sample * GN + (group * O + o) * GC  # [BO]
    weight = tl.zeros([BO, BK], dtype=tl.float32)
    for t0 in range(0, OH * OW, BT):
        t = t0 + tl.arange(0, BT)  # [BT]
        inside = t < OH * OW
        left = tl.load(g[:, None] + (t // OW * GH + t % OW * GW)[None, :], mask=(o < O)[:, None] & inside[None, :], other=0.0)  # [BO, BT]
        row = (t // OW * SY)[:, None] + dy[None, :]  # [BT, BK]
        col = (t % OW * SX)[:, None] + dx[None, :]
        there = inside[:, None] & (k < C * KW * KH)[None, :] & (row >= 0) & (row < H) & (col >= 0) & (col < W)
        right = tl.load(x[None, :] + row * XH + col * XW, mask=there, other=0.0)  # [BT, BK]
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        weight = tl.dot(left, right, weight, input_precision="ieee")
    tile = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    at = tl.program_id(0).to(tl.int64) * (tl.num_programs(1) * tl.num_programs(2)) + tile
    tl.store(out + at, tl.sum(weight * weight))  # squared only when all positions are summed


def _tiles(dtype: torch.dtype) -> tuple[int, int, int]:
    """(outputs, unfolded inputs, positions) of one step.

    64 x 64 sums are 32 registers of a thread of four warps. Without tensor cores, as for float32, both factors go through registers too:
    64 x 32, or they spill. No device has timed it yet.
    """
    return (64, 64, 64) if dtype == torch.bfloat16 else (64, 32, 32)


def conv_grad_sqnorm(
    x: Tensor,
    g: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    N, C, O = len(x), x.shape[1] // groups, g.shape[1] // groups  # noqa: E741
    BO, BK, BT = _tiles(x.dtype)
    tiles = triton.cdiv(O, BO), triton.cdiv(C * kernel[0] * kernel[1], BK)
    out = torch.empty(N, groups * tiles[0] * tiles[1], dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out.sum(1)
    grid = (N * groups, *tiles)
    _conv_grad_sqnorm[grid](
        x,
        g,
        out,
        groups,
        C,
        O,
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
        BO=BO,
        BK=BK,
        BT=BT,
        WIDE=x.device.type == "cpu",
    )
    return out.sum(1)


def variants(name: str = "conv_grad_sqnorm", side: int = 3) -> dict[str, tuple[triton.JITFunction, dict[str, str], dict[str, int]]]:
    """What is compiled ahead of time to see its resources: the kernel, the types of its arguments, its constants."""
    found = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        BO, BK, BT = _tiles(dtype)
        constants = {"KH": side, "KW": side, "SY": 1, "SX": 1, "DY": 1, "DX": 1, "BO": BO, "BK": BK, "BT": BT, "WIDE": False}
        signature = {"x": f"*{kind}", "g": f"*{kind}", "out": "*fp32"}
        signature |= dict.fromkeys(("groups", "C", "O", "H", "W", "OH", "OW", "PY", "PX"), "i32")
        signature |= dict.fromkeys(("XN", "XC", "XH", "XW", "GN", "GC", "GH", "GW"), "i64") | dict.fromkeys(constants, "constexpr")
        found[f"{name} {kind}"] = (_conv_grad_sqnorm, signature, constants)
    return found
