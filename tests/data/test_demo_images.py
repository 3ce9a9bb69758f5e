"""The demo set: the same bytes everywhere, boxes that hold the object, and nothing but the object that tells the class."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from infoutil_fast.data import demo_images

RNG = np.random.default_rng()


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    RNG.bit_generator.state = np.random.default_rng(seed).bit_generator.state


@pytest.fixture(scope="module")
def val() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return demo_images.draw("val")


def test_bytes_are_the_same_on_every_platform() -> None:
    digest = hashlib.sha256()
    for index in range(16):
        digest.update(demo_images.paint(("train", "val")[index % 2], index, index // 2)[0].tobytes())
    assert digest.hexdigest()[:16] == "226e8c4c18cb03e4"


def test_painting_one_picture_gives_that_of_the_set(val: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    images, labels, boxes = val
    for index in RNG.integers(0, len(images), 5).tolist():
        image, box = demo_images.paint("val", index, int(labels[index]))
        np.testing.assert_array_equal(image, images[index])
        assert box == tuple(boxes[index])


def test_classes_have_equal_counts(val: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    images, labels, _ = val
    assert images.shape == (400, 64, 64, 3)
    assert np.bincount(labels).tolist() == [50] * len(demo_images.CLASSES)
    assert not images.flags.writeable


@pytest.mark.parametrize("label", range(len(demo_images.CLASSES)))
def test_the_box_holds_the_object_and_fits_it(label: int) -> None:
    for index in RNG.integers(0, 2000, 6).tolist():
        image, (top, left, bottom, right) = demo_images.paint("train", index, label)
        bare, _ = demo_images.paint("train", index, label, bare=True)
        changed = (image != bare).any(-1)
        assert top >= 0
        assert bottom <= demo_images.SIZE
        assert left >= 0
        assert right <= demo_images.SIZE
        inside = changed[top:bottom, left:right]
        assert changed.sum() == inside.sum()
        assert inside.mean() > 0.25
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))  # a border of faint cover may round to no change
        assert max(rows[0], columns[0], bottom - top - 1 - rows[-1], right - left - 1 - columns[-1]) <= 1


def test_the_background_does_not_know_the_class() -> None:
    index = int(RNG.integers(0, 2000))
    bare = [demo_images.paint("train", index, label, bare=True)[0] for label in range(len(demo_images.CLASSES))]
    assert all((image == bare[0]).all() for image in bare)


def test_splits_and_indices_differ() -> None:
    index = int(RNG.integers(0, 400))
    image = demo_images.paint("train", index, 0)[0]
    assert (image != demo_images.paint("val", index, 0)[0]).mean() > 0.5
    assert (image != demo_images.paint("train", index + 1, 0)[0]).mean() > 0.5


def test_objects_are_of_the_promised_size_anywhere(val: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    boxes = val[2]
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= 14
    assert sides.max() <= 26
    assert boxes[:, :2].min() <= 2
    assert boxes[:, 2:].max() >= demo_images.SIZE - 2
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert abs(centres.mean(0) - demo_images.SIZE / 2).max() < 3


def test_nearest_mean_on_raw_pixels_stays_near_chance(val: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """The place, the colours and the background say nothing: only a net that looks at shapes can learn the set."""
    images, labels, _ = val
    pixels = images.reshape(len(images), -1).astype(np.float32)
    means = np.stack([pixels[:200][labels[:200] == c].mean(0) for c in range(len(demo_images.CLASSES))])
    distance = ((pixels[200:, None] - means) ** 2).sum(-1)
    assert (distance.argmin(1) == labels[200:]).mean() < 0.3
