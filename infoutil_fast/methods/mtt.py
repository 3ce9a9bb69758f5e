"""MTT: images that lead a student along the experts' trajectories, by the full unroll (CVPR 2022, arXiv:2203.11932)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from infoutil_fast import recipes
from infoutil_fast.data import Source
from infoutil_fast.experts import Experts, open_experts
from infoutil_fast.matching import Matching, finish, match, random_positions, start
from infoutil_fast.memory import Stages
from infoutil_fast.selection import Run
from infoutil_fast.trajectory import unroll
from infoutil_fast.types import ClassShard

open_teacher = open_experts  # what `--teacher` names
PRESETS = recipes.MTT


@dataclass(frozen=True)
class Config(Matching):
    """All of them are shared with the other trajectory methods."""


def distill(source: Source, experts: Experts, cfg: Config, labels: Sequence[int], run: Run) -> Iterator[ClassShard]:
    """All classes at once; shards of `labels`."""
    stage = Stages(experts.device)
    with stage("match"):
        begin = start(source, experts, cfg, random_positions(source, cfg), None, run)
        made, losses = match(experts, begin, cfg, run, unroll)
    yield from finish(experts, made, losses, labels, run, stage)
