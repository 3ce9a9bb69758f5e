"""A split's pixels, batch by batch, decoded once where they fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from infoutil_fast.data import Split
from infoutil_fast.types import InputError

IN_MEMORY = 4 << 30  # bytes of decoded pixels that are kept; larger splits are decoded again every epoch


class Pixels:
    """Batches of a split at one side, uint8 [n, 3, size, size], the next one read while the last is used.

    Images that cannot be decoded are left out: of `labels` where all is held in memory, else of the batches that they belong to.
    """

    def __init__(self, split: Split, size: int, workers: int = 0):
        self.split, self.size, self.workers = split, size, workers
        n = len(split.labels)
        self.kept: Tensor | None = None
        self.labels = torch.from_numpy(split.labels)
        if 3 * size * size * n <= IN_MEMORY:
            self.kept, there = split.readable(np.arange(n), size, workers)
            self.labels = self.labels[there]
            if not len(there):
                raise InputError(f"none of {n} images can be decoded, such as {split.names[0]}")

    def read(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(positions)
        if self.kept is not None:
            return self.kept[index], self.labels[index]
        images, there = self.split.readable(positions, self.size, self.workers)
        return images, self.labels[index[there]]

    def batches(self, order: np.ndarray, batch: int, drop_last: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        last = len(order) - len(order) % batch if drop_last and len(order) >= batch else len(order)
        parts = [order[i : min(i + batch, last)] for i in range(0, last, batch)]
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.read, parts[0]) if parts else None
            for following in [*parts[1:], None]:
                assert coming is not None
                ready = coming.result()
                coming = ahead.submit(self.read, following) if following is not None else None
                if len(ready[1]):
                    yield ready
