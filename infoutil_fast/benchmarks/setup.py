"""How `infoutil bench methods` is set up: what is asked for, and the data, teachers and folder that all its parts work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from infoutil_fast.benchmarks import timing
from infoutil_fast.benchmarks.entrants import ENTRANTS, FREE, MATCHING
from infoutil_fast.data import Source
from infoutil_fast.pipeline.running import distill
from infoutil_fast.synthesis import published
from infoutil_fast.synthesis.experts import Experts
from infoutil_fast.types import InputError, one_of

PARTS = ("teaching", "cost", "published", "curve", "accuracy")


@dataclass(frozen=True)
class Settings:
    """What is compared, and how thoroughly."""

    ipc: int = 1  # distilled images per class
    names: tuple[str, ...] = (*FREE, *MATCHING)  # which rows: infoutil, rded, random, tesla exact, tesla first-order, mtt
    parts: tuple[str, ...] = PARTS  # which parts: teaching, cost, published, curve, accuracy
    matching: dict[str, Any] = field(default_factory=dict)  # settings of the trajectory methods
    preset: str = ""  # published settings of `tesla` or `mtt` whose full length is projected; empty: none
    measured: int = 10  # iterations, or training steps, that are timed
    repeats: int = 5  # sets of each training-free method that are timed
    seeds: int = 3  # students
    seed: int = 0  # of the first student and of the sets
    epochs: int = 0  # of the students that judge sets; 0: their protocol's
    curve_epochs: int = 300  # of the students that judge single iterates

    def __post_init__(self) -> None:
        for what, given, known in (("row", self.names, (*FREE, *MATCHING)), ("part", self.parts, PARTS)):
            for name in given:
                one_of(what, name, known)
        for name in ("ipc", "measured", "repeats", "seeds", "curve_epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.preset and self.preset not in published.TESLA | published.MTT:
            raise InputError(f"preset {self.preset!r} is not known; known: {', '.join(published.TESLA | published.MTT)}")


@dataclass(frozen=True)
class Setup:
    """The data, the teachers and where all of it goes."""

    source: Source
    teacher: str
    experts: Experts
    out: Path
    device: torch.device
    dtype: torch.dtype
    workers: int
    progress: bool

    def how(self) -> dict[str, Any]:
        return {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch."), "workers": self.workers}

    def work(self, name: str, **options: Any) -> timing.Work:
        """An entrant, for a process of its own."""
        entrant = ENTRANTS[name]
        judge = str(self.experts.path) if entrant.matching else self.teacher
        return timing.Work(self.source.spec, judge, entrant.method, {**entrant.options, **options}, **self.how())

    def set_of(self, settings: Settings, name: str, seed: int) -> Path:
        """The set of an entrant, made where it is not there yet."""
        entrant = ENTRANTS[name]
        path = self.out / "sets" / f"{name.replace(' ', '-')}-ipc{settings.ipc}-{seed}"
        judge = self.experts if entrant.matching else self.teacher
        asked = entrant.asked(ipc=settings.ipc, seed=seed, **(settings.matching if entrant.matching else {}))
        return distill(self.source, judge, path, progress=self.progress, **self.how(), **asked)


Part = tuple[dict[str, Any], Callable[[], dict[str, Any]]]  # what tells a row from the others, and the call that measures it
