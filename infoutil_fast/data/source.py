"""A labelled image set as values: its splits, the images that they give, and those that cannot be decoded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infoutil_fast.data.decode import PIXELS
from infoutil_fast.types import InputError, UnreadableError

log = logging.getLogger(__name__)
HELD = 2 << 30  # bytes of decoded images that a pool keeps in memory; what is beyond is decoded again when it is needed
NAMED = 10  # undecodable files that are named one by one, and again at the end

T = TypeVar("T")
Triple = tuple[float, float, float]
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Skipped:
    """Which images of a split were found undecodable, and why; copies of the split share it."""

    def __init__(self) -> None:
        self.why: dict[int, str] = {}  # position -> the error
        self._lock = Lock()

    def add(self, position: int, error: UnreadableError) -> None:
        with self._lock:
            if position not in self.why:
                self.why[position] = str(error)
                if len(self.why) <= NAMED:
                    log.warning("left out: %s", error)

    def among(self, positions: Iterable[int]) -> list[int]:
        """Those of `positions` that were found undecodable, ascending."""
        return sorted(self.why.keys() & {int(p) for p in positions})


@dataclass(frozen=True, eq=False)
class Split:
    """N labelled images that are read one by one."""

    names: tuple[str, ...]  # unique and stable: the path relative to the source, or "train/00012"
    labels: np.ndarray  # [N] int64
    read: Callable[[int], np.ndarray]  # position -> [H, W, 3] uint8 RGB, as stored; raises `UnreadableError`
    boxes: np.ndarray | None = None  # [N, 4] int64 top, left, bottom, right of the object, half-open (demo set only)
    skipped: Skipped = field(default_factory=Skipped)  # found so far
    drawn: np.ndarray | None = None  # [n] int64, what `held` was asked for, undecodable images among them

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, positions: Iterable[int], size: int, workers: int = 0) -> Tensor:
        """The images at `positions`, in that order, as [n, 3, size, size] uint8 (contiguous).

        The short side is resized to `size` (Pillow's bilinear filter, which antialiases; an image that has that size is not resampled),
        then the centre is cropped. `workers` threads read; 0 reads in this one. The bytes do not depend on `workers`. Raises
        `UnreadableError` for an image that cannot be decoded.
        """
        rows = [int(p) for p in positions]
        out = np.empty((len(rows), 3, size, size), np.uint8)

        def fill(row: int) -> None:
            out[row] = square(self.read(rows[row]), size).transpose(2, 0, 1)

        for _ in threaded(fill, range(len(rows)), workers):
            pass
        return torch.from_numpy(out)

    def readable(self, positions: Iterable[int], size: int, workers: int = 0) -> tuple[Tensor, np.ndarray]:
        """As `batch`, without the images that cannot be decoded, and the rows of `positions` [m] int64 that are left."""
        rows = [int(p) for p in positions]
        out = np.empty((len(rows), 3, size, size), np.uint8)

        def fill(row: int) -> bool:
            image = self.attempt(rows[row])
            if image is not None:
                out[row] = square(image, size).transpose(2, 0, 1)
            return image is not None

        there = np.fromiter(threaded(fill, range(len(rows)), workers), bool, len(rows))
        left = np.flatnonzero(there)
        for new, old in enumerate(left):  # in place: `out` may be most of the memory
            if new != old:
                out[new] = out[old]
        return torch.from_numpy(out[: len(left)]), left

    def attempt(self, position: int) -> np.ndarray | None:
        """The image, or None when it cannot be decoded: then it is remembered and logged."""
        if position in self.skipped.why:
            return None
        try:
            return self.read(position)
        except UnreadableError as error:
            self.skipped.add(position, error)
            return None

    def held(self, positions: Iterable[int], workers: int = 0, limit: int = HELD) -> tuple[Split, np.ndarray]:
        """This split with the images at `positions` decoded once, by `workers` threads, and those of them that can be decoded [m] int64.

        Of the decoded images `limit` bytes stay in memory; the others are decoded again when they are read.
        """
        rows = [int(p) for p in positions]
        kept: dict[int, np.ndarray] = {}
        there, held = [], 0
        for row, image in zip(rows, threaded(self.attempt, rows, workers), strict=True):
            if image is None:
                continue
            there.append(row)
            if held + image.nbytes <= limit:
                kept[row], held = image, held + image.nbytes

        def read(position: int) -> np.ndarray:
            image = kept.get(position)
            return self.read(position) if image is None else image

        return replace(self, read=read, drawn=np.array(rows, np.int64)), np.array(there, np.int64)

    def subset(self, positions: np.ndarray) -> Split:
        """The split of the images at `positions` alone, in that order."""
        kept = np.asarray(positions, np.int64)
        boxes = None if self.boxes is None else self.boxes[kept]
        return Split(tuple(self.names[i] for i in kept), self.labels[kept], lambda position: self.read(int(kept[position])), boxes)

    def of_class(self, label: int) -> np.ndarray:
        """Positions of one class, ascending, [n] int64."""
        return np.flatnonzero(self.labels == label)

    def draw(self, label: int, count: int | None, seed: int) -> np.ndarray:
        """`count` positions of a class, ascending, drawn without replacement by (seed, label); all for None and if there are fewer.

        Only raw Philox words are used, whose stream numpy guarantees, so the draw is the same on every platform and version. A smaller draw
        of the same seed is a subset of a larger one. No image is read: one that cannot be decoded keeps its place in the draw.
        """
        positions = self.of_class(label)
        words = np.random.Philox(key=np.array([seed % 2**64, label], np.uint64)).random_raw(len(positions))
        return np.sort(positions[np.argsort(words, kind="stable")[:count]])


@dataclass(frozen=True, eq=False)
class Source:
    """A training and a validation split over the same classes."""

    name: str
    spec: str  # opens it again: an absolute path, or the word for a built-in set
    classes: tuple[str, ...]
    train: Split
    val: Split
    size: int  # default side of a net's input, in pixels
    mean: Triple  # by channel, in [0, 1] units
    std: Triple

    def pool(self, label: int, count: int, seed: int) -> np.ndarray:
        """`Split.draw` of at least 1 image in `train`."""
        if count < 1:
            raise InputError(f"a pool has at least 1 image, not {count}")
        return self.train.draw(label, count, seed)

    def log_skipped(self) -> None:
        """One line on each split of which images were left out."""
        for what, split in (("training", self.train), ("validation", self.val)):
            if found := split.skipped.among(split.skipped.why):
                named = ", ".join(split.names[i] for i in found[:NAMED]) + (", ..." if len(found) > NAMED else "")
                log.warning(
                    "%d of %d %s images of %s cannot be decoded and were left out: %s", len(found), len(split), what, self.name, named
                )


def threaded(function: Callable[[int], T], values: Iterable[int], workers: int) -> Iterator[T]:
    """`function` of each value, in order, in `workers` threads; few more results than threads wait at any time."""
    if workers < 1:
        yield from map(function, values)
        return
    left = iter(values)
    with ThreadPoolExecutor(workers) as threads:
        waiting = [threads.submit(function, value) for value in islice(left, 2 * workers)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [threads.submit(function, value) for value in islice(left, 1)]


def square(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] uint8 -> [size, size, 3]: short side to `size`, centre crop."""
    height, width = image.shape[:2]
    short = min(height, width)
    if height * width * (size / short) ** 2 > PIXELS:  # a sliver: scaled as a whole it would not fit in memory
        top, left = (height - short) // 2, (width - short) // 2
        image, height, width = np.ascontiguousarray(image[top : top + short, left : left + short]), short, short
    if short != size:
        height, width = height * size // short, width * size // short
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def default_size(short_sides: Iterable[int]) -> int:
    """224 where the median short side is 160 px or more, else the nearest of 32, 64, 96 and 128."""
    median = float(np.median(list(short_sides)))
    return 224 if median >= 160 else min((32, 64, 96, 128), key=lambda size: abs(size - median))
