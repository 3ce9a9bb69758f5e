"""A validation split made from the training images, where the data come without one: seeded, and told in the source's spec."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from infoutil_fast.data.source import Split
from infoutil_fast.types import InputError

TAIL = re.compile(r"@split=(?P<share>[^@,]*)(?:,seed=(?P<seed>[^@,]*))?$")


@dataclass(frozen=True)
class Holdout:
    """Which share of each class is held out, drawn by `seed`."""

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not 0 <= self.seed < 1 << 63:
            raise InputError(f"split must be a share above 0 and below 1, with a seed of 0 or more, not {self.share} and {self.seed}")

    def __str__(self) -> str:
        return f"@split={self.share:g},seed={self.seed}"

    def of(self, whole: Split, classes: tuple[str, ...]) -> tuple[Split, Split]:
        """Training and validation images: of n of a class round(share * n) are held out, at least one and not all.

        Raises `InputError` for a class of fewer than two images.
        """
        held = []
        for label, name in enumerate(classes):
            there = len(whole.of_class(label))
            if there < 2:
                raise InputError(f"class {name!r} has {there} image{'s' * (there != 1)}: a split needs at least 2 of each class")
            held.append(whole.draw(label, min(max(round(self.share * there), 1), there - 1), self.seed))
        inside = np.zeros(len(whole), bool)
        inside[np.concatenate(held)] = True
        return whole.of_rows(np.flatnonzero(~inside)), whole.of_rows(np.flatnonzero(inside))


def cut(spec: str) -> tuple[str, Holdout | None]:
    """`SPEC@split=0.1,seed=0` as the spec of all the data, and what is to be held out of it; None where it does not say."""
    found = TAIL.search(spec)
    if found is None:
        return spec, None
    try:
        return spec[: found.start()], Holdout(float(found["share"]), int(found["seed"] or 0))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{spec!r} ends in {found[0]}: needed is @split=0.1 or @split=0.1,seed=7") from error


def refuse(what: str, holdout: Holdout | None) -> None:
    """Raise `InputError` where a split is asked for and the data have one."""
    if holdout is not None:
        raise InputError(f"{what} has a validation split of its own: leave out {str(holdout)[1:]}")
