"""A labelled image set as values: its splits, the images that they give, and those that cannot be decoded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from infoutil_fast.data.reading import NAMED, Skipped, feed, squared, whole
from infoutil_fast.types import InputError

log = logging.getLogger(__name__)
HELD = 2 << 30  # bytes of decoded images that a pool keeps in memory; what is beyond is decoded again when it is needed

Triple = tuple[float, float, float]
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False)
class Split:
    """N labelled images that are read one by one."""

    names: tuple[str, ...]  # unique and stable: the path relative to the source, or "train/00012"
    labels: np.ndarray  # [N] int64
    read: Callable[[int], np.ndarray]  # position -> [H, W, 3] uint8 RGB, as stored; raises `UnreadableError`
    boxes: np.ndarray | None = None  # [N, 4] int64 top, left, bottom, right of the object, half-open (demo set only)
    skipped: Skipped = field(default_factory=Skipped)  # found so far
    drawn: np.ndarray | None = None  # [n] int64, what `held` was asked for, undecodable images among them
    shapes: Mapping[int, tuple[int, int]] | None = None  # height and width of the held images

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
        for row, image in enumerate(feed(self.read, rows, squared(size), workers)):
            assert image is not None
            out[row] = image.transpose(2, 0, 1)
        return torch.from_numpy(out)

    def readable(self, positions: Iterable[int], size: int, workers: int = 0) -> tuple[Tensor, np.ndarray]:
        """As `batch`, without the images that cannot be decoded, and the rows of `positions` [m] int64 that are left."""
        rows = [int(p) for p in positions]
        out = np.empty((len(rows), 3, size, size), np.uint8)
        left: list[int] = []
        for row, image in enumerate(feed(self.read, rows, squared(size), workers, self.skipped)):
            if image is not None:
                out[len(left)] = image.transpose(2, 0, 1)
                left.append(row)
        return torch.from_numpy(out[: len(left)]), np.array(left, np.int64)

    def attempt(self, position: int) -> np.ndarray | None:
        """The image, or None when it cannot be decoded: then it is remembered and logged."""
        return next(feed(self.read, [position], whole, 0, self.skipped))

    def shape(self, position: int) -> tuple[int, int]:
        """Height and width of an image, in pixels; of one that is held without decoding it again."""
        if self.shapes is not None and position in self.shapes:
            return self.shapes[position]
        height, width = self.read(position).shape[:2]
        return height, width

    def held(self, positions: Iterable[int], workers: int = 0, limit: int = HELD) -> tuple[Split, np.ndarray]:
        """This split with the images at `positions` decoded once, by `workers` threads, and those of them that can be decoded [m] int64.

        Of the decoded images `limit` bytes stay in memory; the others are decoded again when they are read, but not for their shape.
        """
        rows = [int(p) for p in positions]
        kept: dict[int, np.ndarray] = {}
        shapes: dict[int, tuple[int, int]] = {}
        held = 0
        for row, image in zip(rows, feed(self.read, rows, whole, workers, self.skipped), strict=True):
            if image is None:
                continue
            shapes[row] = image.shape[0], image.shape[1]
            if held + image.nbytes <= limit:
                kept[row], held = image, held + image.nbytes

        def read(position: int) -> np.ndarray:
            image = kept.get(position)
            return self.read(position) if image is None else image

        there = [row for row in rows if row in shapes]
        return replace(self, read=read, drawn=np.array(rows, np.int64), shapes=shapes), np.array(there, np.int64)

    def of_rows(self, positions: Iterable[int]) -> Split:
        """The images at `positions` [n], in that order, as a split of their own."""
        rows = np.fromiter((int(p) for p in positions), np.int64)
        boxes = None if self.boxes is None else self.boxes[rows]
        return Split(tuple(self.names[i] for i in rows), self.labels[rows], lambda position: self.read(int(rows[position])), boxes)

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
        """`Split.draw` of `count` images in `train`; 0: of all."""
        if count < 0:
            raise InputError(f"a pool has at least 1 image, or 0 for all, not {count}")
        return self.train.draw(label, count or None, seed)

    def log_skipped(self) -> None:
        """One line on each split of which images were left out."""
        for what, split in (("training", self.train), ("validation", self.val)):
            if found := split.skipped.among(split.skipped.why):
                named = ", ".join(split.names[i] for i in found[:NAMED]) + (", ..." if len(found) > NAMED else "")
                log.warning(
                    "%d of %d %s images of %s cannot be decoded and were left out: %s", len(found), len(split), what, self.name, named
                )


def default_size(short_sides: Iterable[int]) -> int:
    """224 where the median short side is 160 px or more, else the nearest of 32, 64, 96 and 128."""
    median = float(np.median(list(short_sides)))
    return 224 if median >= 160 else min((32, 64, 96, 128), key=lambda size: abs(size - median))
