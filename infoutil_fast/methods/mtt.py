"""MTT: images that lead a student along the experts' trajectories, by the full unroll (CVPR 2022, arXiv:2203.11932)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from infoutil_fast.contract import Run
from infoutil_fast.data import Source
from infoutil_fast.runtime.memory import Stages
from infoutil_fast.synthesis import published
from infoutil_fast.synthesis.experts import Experts, open_experts
from infoutil_fast.synthesis.gradients import unroll
from infoutil_fast.synthesis.synthetic import Matching, random_positions, start
from infoutil_fast.synthesis.trajectory_matching import finish, match
from infoutil_fast.types import ClassShard

open_teacher = open_experts  # what `--teacher` names
PRESETS = published.MTT


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
