"""The accelerated ops. Each body is the definition, in plain torch; its fast versions bear the same name in `kernels/` and `csrc/`."""

from __future__ import annotations

from typing import SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor

from infoutil_fast.dispatch import accelerated
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


Two = tuple[int, int]


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: sums of squares of narrow numbers overflow and lose digits."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_pair(x: Tensor, g: Tensor, shapes: tuple[str, str]) -> None:
    """Input `x` and output gradient `g` of one layer."""
    ndim = shapes[0].count(",") + 1
    for name, tensor, shape in (("x", x, shapes[0]), ("g", g, shapes[1])):
        if tensor.ndim != ndim or not tensor.is_floating_point():
            raise InputError(f"{name} must be {shape} of floats, not {_what(tensor)}")
    if len(x) != len(g) or x.dtype != g.dtype or x.device != g.device:
        raise InputError(
            f"x and g must be of as many samples, one dtype and one device, not {_what(x)} {x.device} and {_what(g)} {g.device}"
        )


def _check_convolution(x: Tensor, g: Tensor, kernel: Two, stride: Two, padding: Two, dilation: Two, groups: int = 1) -> None:
    _check_pair(x, g, ("[N, C, H, W]", "[N, O, H', W']"))
    if min(*kernel, *stride, *dilation, groups) < 1 or min(padding) < 0:
        raise InputError(
            f"kernel {kernel}, stride {stride}, dilation {dilation} and groups {groups} must be at least 1, padding {padding} 0"
        )
    if x.shape[1] % groups or g.shape[1] % groups:
        raise InputError(f"{x.shape[1]} and {g.shape[1]} channels do not fall into {groups} groups")
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    want = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
    if list(g.shape[2:]) != want:
        raise InputError(f"this convolution of {list(x.shape)} has {want} positions, and g is {list(g.shape)}")


@accelerated(cpu="cpp", cuda="triton", check=_check_convolution, dtypes=FLOATS)
def conv_grad_sqnorm(
    x: Tensor, g: Tensor, kernel: Two, stride: Two, padding: Two, dilation: Two, groups: int = 1, *, backend: str = "auto"
) -> Tensor:
    """Squared norm of each sample's weight gradient of a 2-D convolution: ||G'U||^2 with U the unfolded input.

    Args:
        x: [N, C, H, W], the input. The fast versions take float32 and bfloat16, any strides; channels_last is fastest.
        g: [N, O, H', W'], the gradient of the loss with respect to the output, of the same dtype.
        kernel, stride, padding, dilation: (vertical, horizontal); zeros are padded.
        backend: "auto", "torch", "triton" (CUDA) or "cpp" (CPU). Sums are in float32 at least; they differ in rounding.

    Returns:
        [N] float32, float64 for float64. Raises `InputError` where shapes, dtypes, devices or the backend do not fit.
    """
    u = F.unfold(_wide(x), kernel, dilation, padding, stride).unflatten(1, (groups, -1))  # [N, groups, K, T]
    return (_wide(g).flatten(2).unflatten(1, (groups, -1)) @ u.mT).square().sum((1, 2, 3))


@accelerated(cpu="cpp", cuda="triton", check=_check_convolution, dtypes=FLOATS)
def gram_sqnorm(x: Tensor, g: Tensor, kernel: Two, stride: Two, padding: Two, dilation: Two, *, backend: str = "auto") -> Tensor:
    """`conv_grad_sqnorm` with one group, from Gram matrices: fewer operations where positions are few and channels many.

    (UU')[t, s] is the sum over the kernel's offsets d of XX'[stride t + d, stride s + d], X the padded pixels (reference: the ghost norm
    of arXiv:2205.10683, without its unfolded input). Arguments, result and errors as there.
    """
    pixels = F.pad(_wide(x), (padding[1], padding[1], padding[0], padding[0]))
    xx = torch.einsum("nchw,ncij->nhwij", pixels, pixels)
    gg = torch.einsum("nohw,noij->nhwij", _wide(g), _wide(g))
    total = gg.new_zeros(len(gg))
    for i in range(0, kernel[0] * dilation[0], dilation[0]):
        for j in range(0, kernel[1] * dilation[1], dilation[1]):
            rows = slice(i, i + (g.shape[2] - 1) * stride[0] + 1, stride[0])
            cols = slice(j, j + (g.shape[3] - 1) * stride[1] + 1, stride[1])
            total += (xx[:, rows, cols, rows, cols] * gg).sum((1, 2, 3, 4))
    return total.clamp(min=0)


def _check_linear(x: Tensor, g: Tensor) -> None:
    _check_pair(x, g, ("[N, T, K]", "[N, T, O]"))
    if x.shape[1] != g.shape[1]:
        raise InputError(f"x and g must be of as many positions, not {_what(x)} and {_what(g)}")


@accelerated(cpu="cpp", cuda="triton", check=_check_linear, dtypes=FLOATS)
def linear_grad_sqnorm(x: Tensor, g: Tensor, *, backend: str = "auto") -> Tensor:
    """Squared norm of each sample's weight gradient of a linear layer over T positions, ||sum_t g_t x_t'||^2.

    `x` [N, T, K], `g` [N, T, O] of one dtype; [N] float32, float64 for float64. Backends and errors as `conv_grad_sqnorm`.
    """
    return (_wide(g).mT @ _wide(x)).square().sum((1, 2))


def _check_channels(x: Tensor, g: Tensor, mean: Tensor) -> None:
    _check_pair(x, g, ("[N, C, H, W]", "[N, C, H, W]"))
    if x.shape != g.shape or mean.shape != x.shape[1:2] or mean.device != x.device or mean.dtype != _wide(mean).dtype:
        raise InputError(f"x and g must be of one shape, mean float32 of their channels, not {_what(x)}, {_what(g)} and {_what(mean)}")


@accelerated(cpu="cpp", check=_check_channels, dtypes=FLOATS)
def channel_sums(x: Tensor, g: Tensor, mean: Tensor, *, backend: str = "auto") -> Tensor:
    """Sums over the positions of (x - mean) g and of g: what the weight and bias gradients of a batch norm are made of.

    `x` and `g` [N, C, H, W] of one dtype, `mean` [C] float32 or float64; [N, 2, C] float32, float64 for float64.
    Backends: "torch" and, on a CPU, "cpp".
    """
    centred = _wide(x) - mean.to(_wide(x).dtype)[:, None, None]
    return torch.stack([(centred * _wide(g)).sum((2, 3)), _wide(g).sum((2, 3))], 1)
