"""Images under masks of patches, and feature maps put together from periodic masks."""

from __future__ import annotations

from typing import SupportsFloat

import torch
from torch import Tensor

from infoutil_fast.ops.dispatch import accelerated
from infoutil_fast.types import InputError

FLOATS = (torch.float32, torch.bfloat16)


def _check_masked_patches(
    images: Tensor, masks: Tensor, grid: tuple[int, int], fill: float | Tensor, dtype: torch.dtype | None, out: Tensor | None
) -> None:
    if images.ndim != 4 or images.dtype not in FLOATS or images.shape[1] == 0:
        raise InputError(f"images must be [B, C, H, W] float32 or bfloat16, not {_what(images)}")
    B, C, H, W = images.shape
    rows, cols = grid
    if not (1 <= rows <= H and 1 <= cols <= W):
        raise InputError(f"a {H}x{W} image has no {rows}x{cols} grid: every patch needs a pixel (1 to {H} rows, 1 to {W} columns)")
    if masks.ndim != 2 or masks.dtype != torch.bool or masks.shape[1] != rows * cols:
        raise InputError(f"masks must be [M, {rows * cols}] bool for a {rows}x{cols} grid, not {_what(masks)}")
    if isinstance(fill, Tensor):
        shapes = [(C,), (C, H, W), (B, C, H, W)]
        if fill.shape not in shapes or fill.dtype not in FLOATS:
            raise InputError(f"fill must be a number or a float32 or bfloat16 tensor of shape {shapes}, not {_what(fill)}")
    elif not isinstance(fill, SupportsFloat):
        raise InputError(f"fill must be a number or a tensor, not {type(fill).__name__}")
    if dtype not in (None, *FLOATS):
        raise InputError(f"dtype must be float32 or bfloat16, not {dtype}")
    if out is not None:
        want = (B * masks.shape[0], C, H, W)
        right = out.shape == want and out.dtype == (dtype or images.dtype) and out.is_contiguous(memory_format=torch.channels_last)
        if not right:
            raise InputError(f"out must be {list(want)} {dtype or images.dtype} in channels_last, not {_what(out)}, strides {out.stride()}")
    for name, tensor in (("masks", masks), ("fill", fill), ("out", out)):
        if isinstance(tensor, Tensor) and tensor.device != images.device:
            raise InputError(f"{name} is on {tensor.device} and images on {images.device}: both must be on one device")


def _what(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@accelerated(cpu="cpp", cuda="triton", check=_check_masked_patches)
def masked_patches(
    images: Tensor,
    masks: Tensor,
    grid: tuple[int, int],
    fill: float | Tensor = 0.0,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every image under every coalition of patches: pixels of absent patches are replaced by `fill`.

    Pixel (y, x) lies in patch (y * rows // H) * cols + x * cols // W: rectangles, row by row, whose sides differ by at most one pixel.

    Args:
        images: [B, C, H, W] float32 or bfloat16, any strides, H >= rows and W >= cols.
        masks: [M, rows * cols] bool, True where the patch is kept.
        grid: (rows, cols).
        fill: a number, or float32 or bfloat16 [C], [C, H, W] or [B, C, H, W] (a baseline image).
        dtype: float32 or bfloat16, by default that of the images. Images and fill are rounded to it.
        out: written and returned if given: [B * M, C, H, W], channels_last, of that dtype; it may not overlap the inputs.
        backend: "auto", "torch", "triton" (CUDA) or "cpp" (CPU). All give the same bits (of a NaN, only that it is one).

    Returns:
        [B * M, C, H, W] in channels_last, row b * M + m holds image b under coalition m. It carries no gradient.

    Raises:
        InputError: shapes, dtypes, devices or the backend do not fit.
    """
    B, C, H, W = images.shape
    M, N = len(masks), H * W * C  # N: the output's memory is [B, M, N]
    rows, cols = grid
    if out is None:
        out = torch.empty(B * M, C, H, W, dtype=dtype or images.dtype, device=images.device, memory_format=torch.channels_last)
    row = torch.arange(H, device=images.device) * rows // H  # [H], of the patch that holds the pixel
    col = torch.arange(W, device=images.device) * cols // W  # [W]
    keep = masks.reshape(M, rows, cols).index_select(2, col.repeat_interleave(C)).index_select(1, row).view(M, N)
    shown = images.to(out.dtype).permute(0, 2, 3, 1).reshape(B, 1, N)
    base = fill if isinstance(fill, Tensor) else torch.full((), fill, dtype=torch.float32, device=images.device)
    base = base[:, None, None] if base.ndim == 1 else base
    hidden = base.to(out.dtype).expand(B, C, H, W).permute(0, 2, 3, 1).reshape(B, 1, N)
    torch.where(keep, shown, hidden, out=out.permute(0, 2, 3, 1).view(B, M, N))
    return out


def _check_assemble_patterns(maps: Tensor, index: Tensor, row: Tensor, col: Tensor, images: int, out: Tensor | None) -> None:
    if maps.ndim != 4 or maps.dtype not in FLOATS or 0 in maps.shape[1:]:
        raise InputError(f"maps must be [B * P, C, H, W] float32 or bfloat16, C, H and W at least 1, not {_what(maps)}")
    rows, C, H, W = maps.shape
    if images < 0 or (rows % images if images else rows):
        raise InputError(f"images must divide the {rows} maps: the number of images B of maps [B * P, C, H, W], not {images}")
    if index.ndim != 3 or index.dtype != torch.int32 or 0 in index.shape[1:]:
        raise InputError(f"index must be [M, R, S] int32, R and S at least 1, not {_what(index)}")
    for name, table, side in (("row", row, H), ("col", col, W)):
        if table.shape != (side,) or table.dtype != torch.int32:
            raise InputError(f"{name} must be [{side}] int32 for {H}x{W} maps, not {_what(table)}")
    if out is not None:
        want = (images * len(index), C, H, W)
        if out.shape != want or out.dtype != maps.dtype or not out.is_contiguous(memory_format=torch.channels_last):
            raise InputError(f"out must be {list(want)} {maps.dtype} in channels_last, not {_what(out)}, strides {out.stride()}")
    for name, tensor in (("index", index), ("row", row), ("col", col), ("out", out)):
        if tensor is not None and tensor.device != maps.device:
            raise InputError(f"{name} is on {tensor.device} and maps on {maps.device}: both must be on one device")
    if maps.device.type == "cpu":  # elsewhere it would wait for the device
        blocks = (("row", row, index.shape[1]), ("col", col, index.shape[2]))
        for name, tensor, stop in (*blocks, ("index", index, rows // images if images else None)):
            if stop is not None and tensor.numel():
                low, high = map(int, tensor.aminmax())
                if low < 0 or high >= stop:
                    raise InputError(f"{name} must lie in 0 to {stop - 1}, not {low} to {high}")


@accelerated(cpu="cpp", cuda="triton", check=_check_assemble_patterns)
def assemble_patterns(
    maps: Tensor,
    index: Tensor,
    row: Tensor,
    col: Tensor,
    *,
    images: int,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every coalition's feature map, gathered from those of a few periodic masks.

    Where a location depends on at most p x p patches, 2^(p * p) masks of period p give every value that any coalition can have there:
    out[b * M + m, :, y, x] = maps[b * P + index[m, row[y], col[x]], :, y, x].

    Args:
        maps: [B * P, C, H, W] float32 or bfloat16, row b * P + p holds image b under pattern p. Copied first if not channels_last.
        index: [M, R, S] int32, the pattern (0 to P - 1) of each coalition in each block of patches.
        row: [H] int32, the block row (0 to R - 1) of each map row.
        col: [W] int32, the block column (0 to S - 1) of each map column.
        images: B, from which P follows.
        out: written and returned if given: [B * M, C, H, W], channels_last, of the dtype of the maps; it may not overlap the inputs.
        backend: "auto", "torch", "triton" (CUDA) or "cpp" (CPU). All give the same bits.

    Returns:
        [B * M, C, H, W] in channels_last, row b * M + m holds image b under coalition m. It carries no gradient.

    Raises:
        InputError: shapes, dtypes, devices or the backend do not fit; on the CPU also for a pattern or block out of range. On CUDA
            the ranges are not checked, which would wait for the device: there such a value reads memory that is not the maps'.
    """
    (_, C, H, W), M = maps.shape, len(index)
    if out is None:
        out = torch.empty(images * M, C, H, W, dtype=maps.dtype, device=maps.device, memory_format=torch.channels_last)
    P = len(maps) // max(images, 1)
    pattern = index.long().index_select(1, row).index_select(2, col)  # [M, H, W], int64: P * H * W may pass 2^31
    place = (pattern.view(M, H * W) * (H * W) + torch.arange(H * W, device=maps.device)).flatten()  # of the pixel among those of an image
    sources = maps.permute(0, 2, 3, 1).reshape(images, P * H * W, C)
    targets = out.permute(0, 2, 3, 1).view(images, M * H * W, C)
    for source, target in zip(sources, targets, strict=True):
        torch.index_select(source, 0, place, out=target)
    return out
