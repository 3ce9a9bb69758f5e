"""Chance level is judged by a binomial test of the images that there are, not by a share."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from infoutil_fast.models.teacher import at_chance, tail


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 1000])
def test_the_tail_of_the_binomial(classes: int) -> None:
    p = Fraction(1, classes)
    for images in (1, 2, 8, 16, 61):
        for hits in range(images + 1):
            exact = sum(comb(images, k) * p**k * (1 - p) ** (images - k) for k in range(hits, images + 1))
            assert tail(hits, images, classes) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(
    ("hits", "images", "classes", "chance"),
    [
        (8, 8, 2, False),
        (16, 16, 2, False),
        (13, 16, 2, False),
        (12, 16, 2, False),
        (8, 16, 2, True),
        (10, 16, 2, True),
        (3, 3, 3, False),
        (1, 3, 3, True),
        (1, 2, 2, False),  # nobody could tell
        (2, 4, 2, False),
        (60, 512, 10, True),
        (80, 512, 10, False),
        (10, 10, 1, False),
        (5, 512, 1000, False),
        (1, 512, 1000, True),
    ],
)
def test_chance(hits: int, images: int, classes: int, chance: bool) -> None:
    assert at_chance(hits, images, classes) == chance


def test_guessing_is_seldom_taken_for_knowledge() -> None:
    hits = np.random.default_rng(0).binomial(512, 0.1, 4000)
    assert np.mean([not at_chance(int(hit), 512, 10) for hit in hits]) < 0.005
