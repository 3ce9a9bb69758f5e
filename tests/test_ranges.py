"""Numbers that a user gives stay in the range that their field declares, in Python and on the command line alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated

import numpy as np
import pytest

from infoutil_fast import ranges
from infoutil_fast.ranges import Count, NotNegative, Part, Positive, Seed, Share, Side, Whole, Within
from infoutil_fast.types import InputError

NAN, INF = float("nan"), float("inf")
GOOD = {Count: (1, 7, np.int64(3)), Whole: (0, 5), Seed: (0, 2**32 - 1), Side: (0, 4096), Positive: (1e-9, 3), NotNegative: (0, 0.0, 2.5)}
GOOD |= {Share: (1e-6, 1), Part: (0, 1.0)}
BAD = {Count: (0, -1, 2.5, True, "3", None, NAN), Whole: (-1, 1.0), Seed: (-1, 2**32, 10**23), Side: (-1, 100_000)}
BAD |= {Positive: (0, -1, NAN, INF, "x"), NotNegative: (-1e-9, NAN, INF), Share: (0, 1.01, NAN), Part: (-0.1, 2, NAN)}


@dataclass(frozen=True)
class Base:
    seed: Seed = 0


@ranges.checked
@dataclass(frozen=True)
class Settings(Base):
    epochs: Count = 3
    rate: Positive = 0.1
    kept: tuple[Count, ...] = ()
    name: str = "x"

    def __post_init__(self) -> None:
        assert math.sqrt(self.rate) > 0  # what counts on a number in range


@pytest.mark.parametrize("kind", list(GOOD), ids=str)
def test_ranges(kind: object) -> None:
    for value in GOOD[kind]:
        ranges.check("x", value, kind)
    for value in BAD[kind]:
        with pytest.raises(InputError, match=r"^x must be .*, not ") as caught:
            ranges.check("x", value, kind)
        assert "\n" not in str(caught.value)


def test_fields_are_checked_before_anything_else_looks_at_them() -> None:
    assert Settings(5, 2, 0.5, (1, 2)).kept == (1, 2)
    for wrong in ({"seed": -1}, {"epochs": 0}, {"rate": -1.0}, {"rate": NAN}, {"kept": (1, 0)}):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))} must be"):
            Settings(**wrong)
        with pytest.raises(InputError):
            replace(Settings(), **wrong)
    with pytest.raises(InputError, match="seed must be 0 or more"):
        Settings(-1)


def test_the_sentence_says_what_is_possible() -> None:
    said = {Within(1): "at least 1", Within(0): "0 or more", Within(0, above=True): "above 0", Within(0, 1): "0 or more and at most 1"}
    assert {str(within): text for within, text in said.items()} == {text: text for text in said.values()}
    assert ranges.bounds(int) is None
    assert ranges.bounds(Annotated[int, "a note"]) is None


def test_every_number_of_a_recipe_declares_its_range() -> None:
    from infoutil_fast import methods
    from infoutil_fast.scoring.score_images import ShapleyOptions
    from infoutil_fast.synthesis.experts import ExpertRecipe
    from infoutil_fast.training.recipes import StudentRecipe
    from infoutil_fast.training.teaching import Recipe

    named = [Recipe, ExpertRecipe, StudentRecipe, ShapleyOptions, *(methods.load(name).config for name in methods.available())]
    for config in named:
        numbers = {f.name for f in fields(config) if type(f.default) in (int, float)}
        assert numbers <= ranges.declared(config).keys(), config
        config()
        for name in numbers:
            with pytest.raises(InputError, match=f"^{name} must be"):
                config(**{name: NAN})
