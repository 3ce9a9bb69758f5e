"""Windows of source images: placed by a heat map or at random, cut, ranked, stitched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from infoutil_fast.types import InputError, one_of

DIRECTIONS = ("high", "low", "medium")


def pool_heat(heat: Tensor, width: int) -> Tensor:
    """Mean of every `width` x `width` block of patches: heat [N, g, g] -> [N, g - width + 1, g - width + 1] (InfoUtil step 2)."""
    if not 1 <= width <= heat.shape[-1]:
        raise InputError(f"a window of {width} patches does not fit a grid of {heat.shape[-1]}")
    return F.avg_pool2d(heat[:, None], width, stride=1)[:, 0]


def smallest_width(heat: Tensor, share: float, widths: Sequence[int]) -> Tensor:
    """For each map [N, g, g] the first of `widths` (ascending, in patches) whose best window holds `share` of its positive values: [N].

    The last width where none does, and where no value is positive.
    """
    positive = heat.clamp_min(0).double()
    total = positive.sum((1, 2))
    chosen = torch.full((len(heat),), widths[-1], dtype=torch.int64, device=heat.device)
    for width in reversed(widths[:-1]):
        held = pool_heat(positive, width).flatten(1).amax(1) * width**2
        chosen[(held >= share * total) & (total > 0)] = width
    return chosen.cpu()


def noisy_cells(pooled: Tensor, crops: int, noise: float, generators: Sequence[Generator], distinct: bool = False) -> Tensor:
    """Best cell of each pooled map [N, c, c] under fresh noise, `crops` times, the last time without: flat index [N, crops] int64.

    Noise ~ N(0, (noise * std of the image's pooled map)^2), drawn anew for each crop but the last (InfoUtil step 3,
    noise = 2, crops = 5). `distinct` forbids a cell that the image already has while others are left.
    """
    flat = pooled.flatten(1).cpu().double()
    sigma = noise * flat.std(1, correction=0) if flat.shape[1] > 1 else torch.zeros(len(flat), dtype=flat.dtype)
    cells = torch.empty(len(flat), crops, dtype=torch.int64)
    for n, generator in enumerate(generators):
        draws = torch.randn(crops - 1, flat.shape[1], generator=generator, dtype=torch.float64) * sigma[n]
        scores = flat[n] + torch.cat([draws, torch.zeros(1, flat.shape[1], dtype=torch.float64)])  # [crops, cells]
        order = range(crops - 1, -1, -1)  # the clean one first, so that it always keeps its cell
        taken: list[int] = []
        for crop in order:
            if distinct and len(taken) < flat.shape[1]:
                scores[crop, taken] = -torch.inf
            best = int(scores[crop].argmax())
            cells[n, crop] = best
            taken.append(best)
    return cells


def best_of_image(scores: Tensor, crops: int, direction: str) -> Tensor:
    """Which of each image's `crops` windows its direction prefers: index into scores [N * crops], [N] int64. The first wins a tie."""
    by_image = scores.view(-1, crops)
    if direction == "medium":  # the crop nearest the middle of all
        by_image = -(by_image - scores.median()).abs()
    best = by_image.argmin(1) if direction == "low" else by_image.argmax(1)
    return best + torch.arange(len(best)) * crops


def rank(scores: Tensor, count: int, direction: str) -> Tensor:
    """The `count` highest, lowest or most central of scores [N], best first, [count] int64; ties in the order given."""
    one_of("direction", direction, DIRECTIONS)
    if direction != "medium":
        return scores.argsort(descending=direction == "high", stable=True)[:count]
    from_middle = (torch.arange(len(scores)) - (len(scores) - 1) / 2).abs()
    return scores.argsort(stable=True)[from_middle.argsort(stable=True)[:count]]


def stitch(crops: Tensor, factor: int) -> Tensor:
    """Each factor^2 consecutive crops as one image, row by row: [n * factor^2, C, s, s] -> [n, C, s * factor, s * factor]."""
    _, c, s, _ = crops.shape
    tiles = crops.view(-1, factor, factor, c, s, s)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1, c, factor * s, factor * s)
