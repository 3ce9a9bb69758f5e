"""The one reader of images: each is decoded once and in order, and its size is never a reason to decode it again."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
import torch

from infoutil_fast.data.reading import Skipped, feed, threaded, whole
from infoutil_fast.data.source import Split
from infoutil_fast.data.windows import random_windows, take, whole_windows, windows_at
from infoutil_fast.types import UnreadableError


def counted(images: list[np.ndarray | None]) -> tuple[Split, Counter[int]]:
    """A split of images (None: undecodable) and how often each is decoded."""
    decoded: Counter[int] = Counter()
    lock = threading.Lock()

    def read(position: int) -> np.ndarray:
        with lock:
            decoded[position] += 1
        image = images[position]
        if image is None:
            raise UnreadableError(f"{position} is broken")
        return image

    return Split(tuple(f"{i}.png" for i in range(len(images))), np.zeros(len(images), np.int64), read), decoded


def drawn(sides: list[int]) -> list[np.ndarray | None]:
    rng = np.random.default_rng()
    return [rng.integers(0, 256, (side, side + 1, 3), dtype=np.uint8) if side else None for side in sides]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_images_come_once_and_in_order(workers: int) -> None:
    split, decoded = counted(drawn([5, 1, 0, 9, 3, 0, 7]))
    skipped = Skipped()
    found = list(feed(split.read, [6, 2, 0, 1, 5], whole, workers, skipped))
    assert [None if image is None else image.shape[0] for image in found] == [7, None, 5, 1, None]
    assert decoded == dict.fromkeys((6, 2, 0, 1, 5), 1)
    assert skipped.among(range(7)) == [2, 5]
    assert list(feed(split.read, [2, 5], whole, workers, skipped)) == [None, None]  # known: not tried again
    assert decoded[2] == 1
    with pytest.raises(UnreadableError, match="2 is broken"):
        list(feed(split.read, [0, 2], whole, workers))


@pytest.mark.parametrize("limit", [1 << 30, 0])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_held_pool_is_decoded_once_or_again_for_its_pixels_alone(limit: int, workers: int) -> None:
    split, decoded = counted(drawn([9, 0, 12, 5]))
    held, there = split.held(range(4), workers, limit)
    assert there.tolist() == [0, 2, 3]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    placed = [windows_at(held, there, torch.zeros(3, 2, dtype=torch.int64), 4, 2), random_windows(held, there, 5, generators)]
    placed.append(whole_windows(held, there))
    assert decoded == {0: 1, 1: 1, 2: 1, 3: 1}
    for windows in placed:
        assert take(held, windows, 6, workers).shape == (len(windows), 3, 6, 6)
    assert decoded[0] == (1 if limit else 1 + len(placed))
    assert decoded[1] == 1


def test_a_reader_that_stops_early_leaves_no_thread_at_work() -> None:
    split, decoded = counted(drawn([4] * 50))
    images = feed(split.read, range(50), whole, 2)
    next(images)
    images.close()
    assert sum(decoded.values()) <= 6
    assert list(threaded(lambda value: -value, range(3), 2)) == [0, -1, -2]


@pytest.mark.parametrize("size", [1, 8])
def test_images_of_one_pixel(size: int) -> None:
    split, _ = counted([np.array([[[1, 2, 3]]], np.uint8)])
    where = np.zeros(1, np.int64)
    colour = torch.tensor([1, 2, 3], dtype=torch.uint8)[None, :, None, None]
    assert torch.equal(split.batch([0], size), colour.expand(1, 3, size, size))
    for windows in (
        windows_at(split, where, torch.tensor([[0, 4, 8]]), 4, 2),
        random_windows(split, where, 3, [torch.Generator()]),
        whole_windows(split, where),
    ):
        assert (windows.size == 1).all()
        assert torch.equal(take(split, windows, size), colour.expand(len(windows), 3, size, size))
