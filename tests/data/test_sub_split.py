"""A part of a split is a split: the images asked for, in the order asked for."""

from __future__ import annotations

import numpy as np
import pytest

from infoutil_fast.data import Split
from infoutil_fast.types import UnreadableError


@pytest.fixture
def split(rng: np.random.Generator) -> Split:
    """Eleven images of different sides, of which number 4 cannot be decoded."""
    images = [rng.integers(0, 256, (5 + i, 9, 3), np.uint8) for i in range(11)]

    def read(position: int) -> np.ndarray:
        if position == 4:
            raise UnreadableError("f4.png cannot be read as an image")
        return images[position]

    return Split(tuple(f"f{i}.png" for i in range(11)), rng.integers(0, 3, 11), read, rng.integers(0, 5, (11, 4)))


@pytest.mark.parametrize("positions", [[], [10], [7, 2, 9, 0], range(3, 8)])
def test_names_labels_boxes_and_pixels_are_those_of_the_positions(split: Split, positions: list[int]) -> None:
    part = split.of_rows(np.array(positions, np.int64))
    assert len(part) == len(positions)
    assert part.names == tuple(split.names[p] for p in positions)
    assert part.labels.tolist() == [split.labels[p] for p in positions]
    assert part.labels.dtype == split.labels.dtype
    assert part.boxes is not None
    assert part.boxes.shape == (len(positions), 4)
    assert (part.boxes == split.boxes[list(positions)]).all()
    for row, position in enumerate(positions):
        if position != 4:
            assert (part.read(row) == split.read(position)).all()
    assert sorted(part.of_class(1)) == [row for row, p in enumerate(positions) if split.labels[p] == 1]


def test_a_part_of_a_part_and_one_without_boxes(split: Split) -> None:
    bare = Split(split.names, split.labels, split.read).of_rows([9, 8, 3]).of_rows([2, 0])
    assert bare.names == ("f3.png", "f9.png")
    assert bare.boxes is None
    assert (bare.read(1) == split.read(9)).all()


def test_an_image_that_cannot_be_decoded_is_told_by_its_place_in_the_part(split: Split) -> None:
    part = split.of_rows([6, 4, 1])
    pixels, left = part.readable(range(3), 8)
    assert left.tolist() == [0, 2]
    assert pixels.shape == (2, 3, 8, 8)
    assert part.skipped.among(range(3)) == [1]
    assert not split.skipped.why, "the whole split was not read"
