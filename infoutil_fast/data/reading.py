"""The one reader of images: decoded once each and in order, by threads, without those that cannot be decoded, which are named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Lock
from typing import TypeVar

import numpy as np
from PIL import Image

from infoutil_fast.data.decode import PIXELS
from infoutil_fast.types import UnreadableError

log = logging.getLogger(__name__)
NAMED = 10  # undecodable files that are named one by one, and again at the end

T = TypeVar("T")
Read = Callable[[int], np.ndarray]  # position -> [H, W, 3] uint8; raises `UnreadableError`


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


def feed(
    read: Read, positions: Iterable[int], make: Callable[[int, np.ndarray], T], workers: int = 0, skipped: Skipped | None = None
) -> Iterator[T | None]:
    """What `make` gives for each of `positions` and its image, in order, in `workers` threads (0: in this one): each is decoded once.

    skipped: remembers and logs what cannot be decoded, for which None comes, without another try where it is there already. Without it
    `UnreadableError` is raised.
    """

    def one(position: int) -> T | None:
        if skipped is None:
            return make(position, read(position))
        if position in skipped.why:
            return None
        try:
            image = read(position)
        except UnreadableError as error:
            skipped.add(position, error)
            return None
        return make(position, image)

    return threaded(one, (int(p) for p in positions), workers)


def threaded(function: Callable[[int], T], values: Iterable[int], workers: int) -> Iterator[T]:
    """`function` of each value, in order, in `workers` threads; few more results than threads wait at any time."""
    if workers < 1:
        yield from map(function, values)
        return
    left = iter(values)
    with ThreadPoolExecutor(workers) as threads:
        waiting = [threads.submit(function, value) for value in islice(left, 2 * workers)]
        try:
            while waiting:
                yield waiting.pop(0).result()
                waiting += [threads.submit(function, value) for value in islice(left, 1)]
        finally:  # also when the reader stops early, as at Ctrl-C
            for future in waiting:
                future.cancel()


def whole(position: int, image: np.ndarray) -> np.ndarray:
    """The image as it is stored, for `feed`."""
    return image


def squared(size: int) -> Callable[[int, np.ndarray], np.ndarray]:
    """`square` for `feed`."""
    return lambda position, image: square(image, size)


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
