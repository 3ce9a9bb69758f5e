"""The accelerated ops. Each body is the definition, in plain torch; its fast versions bear the same name in `kernels/` and `csrc/`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infoutil_fast.ops.dispatch import accelerated
from infoutil_fast.ops.patches import FLOATS, _what
from infoutil_fast.types import InputError

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
