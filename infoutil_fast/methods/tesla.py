"""TESLA: trajectory matching at constant memory, exact or first-order as published (ICML 2023, arXiv:2211.10586)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infoutil_fast.contract import EXPERTS, JOINT, Job
from infoutil_fast.data import Source
from infoutil_fast.ranges import checked
from infoutil_fast.runtime.memory import Stages
from infoutil_fast.synthesis import published
from infoutil_fast.synthesis.experts import Experts
from infoutil_fast.synthesis.gradients import MODES, Inner, Matched, Segment, Step, recursion
from infoutil_fast.synthesis.synthetic import finish, from_real, random_positions
from infoutil_fast.synthesis.trajectory_matching import Matching, long_enough, match
from infoutil_fast.types import ClassShard, InputError, one_of

LEARNS_FROM, CLASSES = EXPERTS, JOINT
PRESETS = published.TESLA
check = long_enough


@checked
@dataclass(frozen=True)
class Config(Matching):
    mode: str = "exact"  # gradient: exact (that of the full unroll), first_order (as published: the adjoint frozen)
    halve: bool = False  # halve the image gradient, as the public code does
    teacher_labels: bool = False  # labels of an iteration are the logits of its expert at the segment's end

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("mode", self.mode, MODES)
        if self.halve and self.mode == "exact":
            raise InputError("halve belongs to mode first_order: the exact gradient is not halved anywhere")


def distill(source: Source, experts: Experts, cfg: Config, labels: Sequence[int], run: Job) -> Iterator[ClassShard]:
    """All classes at once; shards of `labels`. Teacher labels in the set are those of the last iteration."""

    def gradients(inner: Inner, segment: Segment, images: Tensor, y: Tensor, lr: Tensor, steps: Sequence[Step]) -> Matched:
        return recursion(inner, segment, images, y, lr, steps, cfg.mode, cfg.halve)

    def teacher(segment: Segment, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([experts.inner.logits(segment.target, part) for part in images.split(256)])

    stage = Stages(experts.device)
    with stage("match"):
        first = None
        if cfg.teacher_labels:  # only their shape matters here: every iteration makes its own
            first = torch.zeros(cfg.ipc * len(source.classes), len(source.classes), device=experts.device)
        begin = from_real(source, random_positions(source, cfg), experts.view, experts.size, run, labels=first, lr=cfg.lr_init)
        made, losses = match(experts, begin, cfg, run, gradients, relabel=teacher if cfg.teacher_labels else None)
    yield from finish(made, losses, experts.view, labels, run, stage)
