"""Windows of source images: placed at random, whole or at the cells of a grid, and cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from infoutil_fast.data import Split
from infoutil_fast.data.reading import feed
from infoutil_fast.pixels.augment import random_box
from infoutil_fast.types import Windows


def windows_at(split: Split, positions: np.ndarray, cells: Tensor, grid: int, width: int) -> Windows:
    """Windows of `width` patches at pooled cells [N, crops], on the centred square of each stored image; [N * crops], image by image."""
    rows = []
    across = grid - width + 1
    for position, row in zip(positions.tolist(), cells.tolist(), strict=True):
        h, w = split.shape(position)
        square = min(h, w)
        side = max(round(square * width / grid), 1)
        for cell in row:
            y, x = divmod(cell, across)
            top = min((h - square) // 2 + round(square * y / grid), h - side)
            left = min((w - square) // 2 + round(square * x / grid), w - side)
            rows.append((position, top, left, side))
    return Windows.of(rows)


def random_windows(
    split: Split, positions: np.ndarray, crops: int, generators: Sequence[Generator], scale: tuple[float, float] = (0.08, 1.0)
) -> Windows:
    """`crops` random square windows of each image, area share in `scale` (RDED's crop: random resized, aspect 1)."""
    rows = []
    for position, generator in zip(positions.tolist(), generators, strict=True):
        h, w = split.shape(position)
        for _ in range(crops):
            top, left, side, _ = random_box(h, w, scale, (1.0, 1.0), generator)
            rows.append((position, top, left, side))
    return Windows.of(rows)


def whole_windows(split: Split, positions: np.ndarray) -> Windows:
    """The centred square of each image."""
    rows = []
    for position in positions.tolist():
        h, w = split.shape(position)
        square = min(h, w)
        rows.append((position, (h - square) // 2, (w - square) // 2, square))
    return Windows.of(rows)


def take(split: Split, windows: Windows, size: int, workers: int = 0) -> Tensor:
    """Cut windows from the stored images and resize them (Pillow's bilinear filter, antialiased): uint8 [n, 3, size, size]."""
    out = np.empty((len(windows), 3, size, size), np.uint8)

    def cut(position: int, pixels: np.ndarray) -> None:
        for i in np.flatnonzero(windows.image == position):
            top, left, side = windows.top[i], windows.left[i], windows.size[i]
            crop = pixels[top : top + side, left : left + side]
            if side != size:
                crop = np.asarray(Image.fromarray(np.ascontiguousarray(crop)).resize((size, size), Image.Resampling.BILINEAR))
            out[i] = crop.transpose(2, 0, 1)

    deque(feed(split.read, np.unique(windows.image), cut, workers), 0)
    return torch.from_numpy(out)
