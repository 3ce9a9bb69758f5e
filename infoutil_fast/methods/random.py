"""Random: whole images or random windows of random images, softly labelled: the control that no table may lack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from infoutil_fast.contract import Run
from infoutil_fast.data import Source
from infoutil_fast.data.windows import random_windows, whole_windows
from infoutil_fast.models.teacher import Teacher
from infoutil_fast.ranges import Count, Seed, Whole, checked
from infoutil_fast.runtime.memory import Stages
from infoutil_fast.selection.choose import Choice, draw, keep, shard
from infoutil_fast.types import ClassShard, one_of


@checked
@dataclass(frozen=True)
class Config:
    ipc: Count = 10  # distilled images per class
    factor: Whole = 0  # factor^2 pieces are stitched into an image; 0: 1 for whole images, else 2 from 96 px on, 1 below
    pool: Count = 300  # images per class to choose from
    seed: Seed = 0  # of the pool and the choice
    windows: str = "whole"  # whole images, or random windows (area share 0.08 to 1, as RDED's)

    def __post_init__(self) -> None:
        one_of("windows", self.windows, ("whole", "random"))


def distill(source: Source, teacher: Teacher, cfg: Config, labels: Sequence[int], run: Run) -> Iterator[ClassShard]:
    """One finished shard of each class in `labels`."""
    for label in labels:
        stage = Stages(teacher.device)
        split, pool, generators = draw(source, label, cfg, run, stage)
        with stage("cut"):
            tried = whole_windows(split, pool) if cfg.windows == "whole" else random_windows(split, pool, 1, generators)
        kept = keep(split, teacher, label, tried, cfg, Choice(1, "random", "native", "high"), run, stage)
        yield shard(teacher, label, kept, cfg.factor, run, stage)
