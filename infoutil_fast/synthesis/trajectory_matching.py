"""What the trajectory methods share: their settings, and an iteration that draws a segment of an expert and takes a step of SGD."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import SGD

from infoutil_fast.contract import Job
from infoutil_fast.pixels import dsa
from infoutil_fast.ranges import Count, NotNegative, Positive, Whole, checked
from infoutil_fast.synthesis.experts import Experts
from infoutil_fast.synthesis.gradients import Inner, Matched, Segment, Step
from infoutil_fast.synthesis.synthetic import Learning, LearningSettings, Synthetic, learn
from infoutil_fast.types import InputError

Gradients = Callable[[Inner, Segment, Tensor, Tensor, Tensor, Sequence[Step]], Matched]


@checked
@dataclass(frozen=True)
class Matching(LearningSettings):
    """The settings of every trajectory method."""

    syn_steps: Count = 30  # steps of the student in an iteration
    expert_epochs: Count = 2  # length of the expert's segment that the student is to match
    max_start: Count = 20  # segments start before this epoch
    batch_syn: Whole = 0  # synthetic images in a step of the student; 0: all
    lr_img: NotNegative = 100.0  # learning rate of the pixels
    lr_lr: NotNegative = 1e-5  # learning rate of the student's step size
    lr_init: Positive = 0.01  # step size of the student at the start
    augment: str = dsa.STRATEGY  # groups of DSA joined by _, empty for none

    def __post_init__(self) -> None:
        dsa.groups(self.augment)


def long_enough(experts: Experts, cfg: Matching) -> None:
    """Raise `InputError` where the experts' paths are too short for the segments."""
    last = cfg.max_start - 1 + cfg.expert_epochs
    if last > experts.epochs:
        raise InputError(
            f"segments of {cfg.expert_epochs} epochs that start before epoch {cfg.max_start} reach epoch {last}, "
            f"the experts at {experts.path} have {experts.epochs}: lower max_start"
        )


def match(
    experts: Experts,
    begin: Synthetic,
    cfg: Matching,
    run: Job,
    gradients: Gradients,
    *,
    epochs: Callable[[int], tuple[int, int]] | None = None,
    lr_y: float = 0.0,
    threshold: float = math.inf,
    relabel: Callable[[Segment, Tensor], Tensor] | None = None,
) -> tuple[Synthetic, list[float]]:
    """Learn images and step size, and labels where `lr_y` > 0, by SGD on the matching loss; also the loss of each iteration.

    epochs(iteration): segments start in [low, high); default [0, max_start). threshold: an iteration with a larger loss changes
    nothing. relabel(segment, images): logits to be used as labels in this iteration.
    """

    def iterate(now: Learning, generator: Generator) -> float:
        segment = draw_segment(experts, epochs(now.done) if epochs else (0, cfg.max_start), cfg, generator)
        if relabel is not None:
            now.labels = relabel(segment, now.images)
        steps = draw_steps(len(now.images), cfg, generator)
        found = gradients(experts.inner, segment, now.images, now.labels, now.lr, steps)
        step_along(now, found, threshold)
        return found.loss

    return learn(begin, cfg, run, lambda now: sgd_of(now, cfg, lr_y), iterate)


def draw_segment(experts: Experts, epochs: tuple[int, int], cfg: Matching, generator: Generator) -> Segment:
    """A stretch of a random expert that starts in `epochs`, the upper end left out."""
    expert, first = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((0, len(experts)), epochs))
    return experts.segment(expert, first, cfg.expert_epochs)


def draw_steps(n: int, cfg: Matching, generator: Generator) -> list[Step]:
    """Batches of shuffled passes over the n images, the last of a pass a short one, each with its augmentation."""
    steps: list[Step] = []
    while len(steps) < cfg.syn_steps:
        for index in torch.randperm(n, generator=generator).split(cfg.batch_syn or n):
            steps.append(Step(index, dsa.draw(cfg.augment, len(index), generator)))
    return steps[: cfg.syn_steps]


def sgd_of(now: Learning, cfg: Matching, lr_y: float = 0.0) -> SGD:
    """The optimiser of the public codes: of images and step size, and of the labels where `lr_y` > 0."""
    groups: list[dict[str, Any]] = [{"params": [now.images], "lr": cfg.lr_img}, {"params": [now.lr], "lr": cfg.lr_lr}]
    if lr_y > 0:
        groups.append({"params": [now.labels], "lr": lr_y, "momentum": 0.9})
    return SGD(groups, lr=1.0, momentum=0.5)


def step_along(now: Learning, found: Matched, threshold: float = math.inf) -> None:
    """One step along the gradients, none where the loss is above the threshold. Raises `InputError` for a loss that is not finite."""
    if not math.isfinite(found.loss):
        raise InputError(f"the matching loss is not finite in iteration {now.done + 1}: try a lower lr_img or lr_lr, or fewer syn_steps")
    if found.loss <= threshold:
        now.images.grad, now.lr.grad, now.labels.grad = found.images, found.lr, found.labels
        now.optimiser.step()
