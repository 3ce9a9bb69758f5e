"""Differentiable siamese augmentation (DSA, arXiv:2102.08259): one group of operations a call, parameters drawn apart from their use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from infoutil_fast.types import InputError

STRATEGY = "color_crop_cutout_flip_scale_rotate"
RATIO, DEGREES = 1.2, 15.0  # widest zoom, widest turn


@dataclass(frozen=True)
class Draw:
    """One group and the uniform numbers that its parameters come from: applying it again gives the same images."""

    group: str
    u: Tensor  # [N, 3] in [0, 1), or [1, 3] where all images share them


def groups(strategy: str) -> tuple[str, ...]:
    """The groups of a strategy such as "color_crop_flip"; none for "". Raises `InputError` with the known ones."""
    found = tuple(filter(None, strategy.split("_")))
    if not set(found) <= GROUPS.keys():
        raise InputError(f"augmentation {strategy!r} is not known; known are {', '.join(GROUPS)}, joined by _, or none")
    return found


def draw(strategy: str, n: int, generator: Generator, siamese: bool = False) -> Draw | None:
    """Draw one group of `strategy`, all equally likely, and its parameters for n images; None for the empty strategy.

    siamese: all images share one set of parameters, as DSA does between real and synthetic ones. Only `generator` (CPU) is advanced.
    """
    known = groups(strategy)
    if not known:
        return None
    group = known[int(torch.randint(len(known), (), generator=generator))]
    return Draw(group, torch.rand(1 if siamese else n, 3, generator=generator, dtype=torch.float64))


def apply(images: Tensor, drawn: Draw | None) -> Tensor:
    """Augment float images [N, C, H, W]; differentiable in them, same shape, dtype and device.

    Source: VICO-UoE/DatasetCondensation, aug_mode S, as described in arXiv:2102.08259 section 3. Raises `InputError` where the draw
    is for another number of images.
    """
    if drawn is None or not len(images):
        return images
    if len(drawn.u) not in (1, len(images)):
        raise InputError(f"the draw is for {len(drawn.u)} images, there are {len(images)}")
    u = drawn.u.to(images).expand(len(images), 3)
    return GROUPS[drawn.group](images, u)


def _color(x: Tensor, u: Tensor) -> Tensor:
    """Brightness, then saturation, then contrast."""
    brightness, saturation, contrast = u.T[:, :, None, None, None]  # each [N, 1, 1, 1]
    x = x + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def _crop(x: Tensor, u: Tensor) -> Tensor:
    """Moved by whole pixels, up to an eighth of the side, zeros outside."""
    h, w = x.shape[2:]
    for dim, side, share in ((2, h, u[:, 0]), (3, w, u[:, 1])):
        most = int(side / 8 + 0.5)
        start = (share * (2 * most + 1)).long()  # [N], 0 .. 2 most
        place = start[:, None] + torch.arange(side, device=x.device)  # [N, side]
        padded = F.pad(x, (0, 0, most, most) if dim == 2 else (most, most))
        x = padded.gather(dim, place.view(-1, 1, side, 1).expand_as(x) if dim == 2 else place.view(-1, 1, 1, side).expand_as(x))
    return x


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """A box of half the side, its centre anywhere, set to zero."""
    inside = []
    for side, share in ((x.shape[2], u[:, 0]), (x.shape[3], u[:, 1])):
        box = int(side / 2 + 0.5)
        top = (share * (side + 1 - box % 2)).long() - box // 2  # [N]
        place = torch.arange(side, device=x.device)
        low, high = (edge.clamp(0, side - 1)[:, None] for edge in (top, top + box - 1))
        inside.append((place >= low) & (place <= high))  # [N, side]
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def _flip(x: Tensor, u: Tensor) -> Tensor:
    return torch.where(u[:, 0, None, None, None] < 0.5, x.flip(3), x)


def _scale(x: Tensor, u: Tensor) -> Tensor:
    """Height and width zoomed apart, between 1 / 1.2 and 1.2."""
    zoom = u[:, :2] * (RATIO - 1 / RATIO) + 1 / RATIO  # [N, 2]
    return _warp(x, torch.diag_embed(zoom))


def _rotate(x: Tensor, u: Tensor) -> Tensor:
    angle = (2 * u[:, 0] - 1) * math.radians(DEGREES)
    cos, sin = angle.cos(), angle.sin()
    return _warp(x, torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2))


def _warp(x: Tensor, linear: Tensor) -> Tensor:
    """Sample at linear [N, 2, 2] times the centred coordinates, bilinear, zeros outside."""
    grid = F.affine_grid(F.pad(linear, (0, 1)), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


GROUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
