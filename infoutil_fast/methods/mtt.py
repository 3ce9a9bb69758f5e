"""MTT: images that lead a student along the experts' trajectories, by the full unroll (CVPR 2022, arXiv:2203.11932)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from infoutil_fast.contract import EXPERTS, JOINT, Job
from infoutil_fast.data import Source
from infoutil_fast.ranges import checked
from infoutil_fast.runtime.memory import Stages
from infoutil_fast.synthesis import published
from infoutil_fast.synthesis.experts import Experts
from infoutil_fast.synthesis.gradients import unroll
from infoutil_fast.synthesis.synthetic import finish, from_real, random_positions
from infoutil_fast.synthesis.trajectory_matching import Matching, long_enough, match
from infoutil_fast.types import ClassShard

LEARNS_FROM, CLASSES = EXPERTS, JOINT
PRESETS = published.MTT
check = long_enough


@checked
@dataclass(frozen=True)
class Config(Matching):
    """All of them are shared with the other trajectory methods."""


def distill(source: Source, experts: Experts, cfg: Config, labels: Sequence[int], run: Job) -> Iterator[ClassShard]:
    """All classes at once; shards of `labels`."""
    stage = Stages(experts.device)
    with stage("match"):
        begin = from_real(source, random_positions(source, cfg), experts.view, experts.size, run, lr=cfg.lr_init)
        made, losses = match(experts, begin, cfg, run, unroll)
    yield from finish(made, losses, experts.view, labels, run, stage)
