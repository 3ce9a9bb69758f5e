"""DATM: trajectory matching with learned soft labels and segments of growing difficulty (ICLR 2024, arXiv:2310.05773)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infoutil_fast.contract import EXPERTS, JOINT, Job, Run
from infoutil_fast.data import Source
from infoutil_fast.ranges import Count, NotNegative, Whole, checked
from infoutil_fast.runtime.memory import Stages
from infoutil_fast.synthesis import published
from infoutil_fast.synthesis.experts import Experts
from infoutil_fast.synthesis.gradients import MODES, Inner, Matched, Segment, Step, recursion, unroll
from infoutil_fast.synthesis.synthetic import finish, from_real, shuffled_pool
from infoutil_fast.synthesis.trajectory_matching import Matching, long_enough, match
from infoutil_fast.types import ClassShard, InputError, one_of

LEARNS_FROM, CLASSES = EXPERTS, JOINT
PRESETS = published.DATM
check = long_enough
JUDGES = 10  # experts that judge the start images and give their labels, after their last epoch


@checked
@dataclass(frozen=True)
class Config(Matching):
    iterations: Count = 10_000  # updates of the synthetic images
    min_start: Whole = 0  # segments start at this epoch or later
    cur_start: Count = 10  # segments of the first iteration start before this epoch
    expansion_end: Whole = 1000  # iteration from which segments start anywhere before max_start; 0: from the first on
    lr_y: NotNegative = 2.0  # learning rate of the labels
    threshold: NotNegative = 0.0  # an iteration whose matching loss is larger changes nothing; 0: none
    mode: str = "exact"  # gradient: unroll (T inner graphs), exact (the same, one graph), first_order

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("mode", self.mode, ("unroll", *MODES))
        if not 0 <= self.min_start < self.cur_start <= self.max_start:
            raise InputError(f"needed is 0 <= min_start < cur_start <= max_start, not {self.min_start}, {self.cur_start}, {self.max_start}")


def window(cfg: Config, iteration: int) -> tuple[int, int]:
    """Segments start in [low, high); high grows from cur_start to max_start."""
    if iteration >= cfg.expansion_end:
        return cfg.min_start, cfg.max_start
    return cfg.min_start, cfg.cur_start + (cfg.max_start - cfg.cur_start) * iteration // cfg.expansion_end


def distill(source: Source, experts: Experts, cfg: Config, labels: Sequence[int], run: Job) -> Iterator[ClassShard]:
    """All classes at once; shards of `labels`."""

    def gradients(inner: Inner, segment: Segment, images: Tensor, y: Tensor, lr: Tensor, steps: Sequence[Step]) -> Matched:
        if cfg.mode == "unroll":
            return unroll(inner, segment, images, y, lr, steps)
        return recursion(inner, segment, images, y, lr, steps, cfg.mode)

    stage = Stages(experts.device)
    with stage("start"):
        positions, logits = right_images(source, experts, cfg, run)
        begin = from_real(source, positions, experts.view, experts.size, run, labels=logits, lr=cfg.lr_init)
    with stage("match"):
        made, losses = match(
            experts,
            begin,
            cfg,
            run,
            gradients,
            epochs=lambda iteration: window(cfg, iteration),
            lr_y=cfg.lr_y,
            threshold=cfg.threshold or math.inf,
        )
    yield from finish(made, losses, experts.view, labels, run, stage)


def right_images(source: Source, experts: Experts, cfg: Config, run: Run) -> tuple[np.ndarray, Tensor]:
    """Of each class the first `ipc` images of its shuffled pool that an expert gets right: positions [n] and label logits [n, C]."""
    positions, logits = zip(*(right_of_class(source, label, experts, cfg, run) for label in range(len(source.classes))), strict=True)
    return np.concatenate(positions), torch.cat(logits)


def right_of_class(source: Source, label: int, experts: Experts, cfg: Config, run: Run) -> tuple[np.ndarray, Tensor]:
    """Those of one class [ipc], with the mean logits [ipc, C] of the experts that are right.

    Raises `InputError` where there are too few.
    """
    pool = shuffled_pool(source, label, cfg)
    found, means = [pool[:0]], []
    for part in np.array_split(pool, -(-len(pool) // 256)):
        images, there = source.train.readable(part, experts.size, run.workers)
        if not len(there):
            continue
        each = torch.stack([experts.logits(images, expert) for expert in range(min(JUDGES, len(experts)))])  # [E, b, C]
        right = each.argmax(2) == label  # [E, b]
        count = right.sum(0)
        mean = (each * right[:, :, None]).sum(0) / count.clamp_min(1)[:, None]  # [b, C]
        found.append(part[there][(count > 0).cpu().numpy()])
        means.append(mean[count > 0])
        if sum(map(len, found)) >= cfg.ipc:
            break
    kept = np.concatenate(found)[: cfg.ipc]
    if len(kept) < cfg.ipc:
        raise InputError(
            f"the experts are right on {len(kept)} of {len(pool)} images of class {source.classes[label]!r}, "
            f"ipc {cfg.ipc} needs as many: lower ipc, raise pool, or train the experts longer"
        )
    return kept, torch.cat(means)[: cfg.ipc]
