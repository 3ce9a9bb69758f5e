"""What the trajectory methods share: real start images, the outer loop over iterations with its checkpoints, and the finished set."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm

from infoutil_fast.contract import Run
from infoutil_fast.data import Source
from infoutil_fast.pixels import dsa
from infoutil_fast.runtime.files import write_bytes
from infoutil_fast.runtime.memory import Stages
from infoutil_fast.synthesis.experts import Experts
from infoutil_fast.synthesis.gradients import Inner, Matched, Segment, Step
from infoutil_fast.synthesis.synthetic import SAVE_SECONDS, STATE, SURE, Learning, Matching, Synthetic, _bytes
from infoutil_fast.types import ClassShard, InputError

log = logging.getLogger(__name__)

Gradients = Callable[[Inner, Segment, Tensor, Tensor, Tensor, Sequence[Step]], Matched]


def check(experts: Experts, cfg: Matching) -> None:
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
    run: Run,
    gradients: Gradients,
    *,
    epochs: Callable[[int], tuple[int, int]] | None = None,
    lr_y: float = 0.0,
    threshold: float = math.inf,
    relabel: Callable[[Segment, Tensor], Tensor] | None = None,
) -> tuple[Synthetic, list[float]]:
    """Learn images and step size, and labels where `lr_y` > 0, by SGD on the matching loss; also the loss of each iteration.

    epochs(iteration): segments start in [low, high); default [0, max_start). threshold: an iteration with a larger loss changes
    nothing. relabel(segment, images): logits to be used as labels in this iteration. Everything random comes from (seed, iteration),
    so that a run that goes on from its checkpoint in `run.folder` ends with the same bytes.
    """
    check(experts, cfg)
    now = Learning(begin, cfg, lr_y)
    file = None if run.folder is None else run.folder / STATE
    now.restore(file)
    saved = time.monotonic()
    bar = tqdm(total=cfg.iterations, initial=len(now.losses), desc="match", unit="iteration", disable=None if run.progress else True)
    now.keep(run.folder)
    for iteration in range(len(now.losses), cfg.iterations):
        generator = Generator().manual_seed(cfg.seed * 1_000_003 + iteration)
        segment = draw_segment(experts, epochs(iteration) if epochs else (0, cfg.max_start), cfg, generator)
        if relabel is not None:
            now.labels = relabel(segment, now.images)
        steps = draw_steps(len(now.images), cfg, generator)
        now.update(gradients(experts.inner, segment, now.images, now.labels, now.lr, steps), threshold)
        bar.set_postfix(loss=f"{now.losses[-1]:.3f}", lr=f"{float(now.lr):.4f}", refresh=False)
        bar.update()
        if file is not None and (time.monotonic() - saved >= SAVE_SECONDS or iteration + 1 == cfg.iterations):
            now.save(file)
            saved = time.monotonic()
        now.keep(run.folder)
        if run.watch is not None:
            run.watch(iteration + 1)
    bar.close()
    if not now.images.isfinite().all():
        raise InputError("the images are not finite after the last iteration: try a lower lr_img")
    return replace(begin, images=now.images, labels=now.labels, lr=now.lr), now.losses


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


def finish(experts: Experts, made: Synthetic, losses: list[float], labels: Sequence[int], run: Run, stage: Stages) -> Iterator[ClassShard]:
    """The shards of `labels`; beforehand the last iterate in `run.folder` under the public codes' names, and the losses."""
    if run.folder is not None:
        for name, value in (("images", made.images), ("labels", made.labels), ("lr", made.lr)):
            write_bytes(run.folder / f"{name}_best.pt", _bytes(value.cpu()))
        write_bytes(run.folder / "losses.csv", "".join(f"{i + 1},{loss:.6g}\n" for i, loss in enumerate(losses)).encode())
        if experts.view.zca is not None:
            experts.view.zca.save(run.folder / "zca.safetensors")
    logits = made.labels if made.labels.is_floating_point() else SURE * F.one_hot(made.labels, len(experts.facts.classes)).float()
    for label in labels:
        own = torch.nonzero(made.hard == label)[:, 0]
        pixels, windows = made.images[own], made.windows[own.cpu().numpy()]
        yield ClassShard(
            label,
            experts.view.unsee(pixels).cpu(),
            logits[own, None].cpu(),
            windows,
            np.zeros(len(own), np.float32),
            seconds=dict(stage.seconds),
            peak_bytes=dict(stage.peak_bytes),
            pixels=pixels.cpu(),
        )
    if run.folder is not None:  # every class is written by now
        (run.folder / STATE).unlink(missing_ok=True)


def estimate(distill: Callable[..., Iterator[ClassShard]], source: Source, experts: Experts, cfg: Matching, run: Run) -> dict[str, Any]:
    """Seconds and memory of a whole run from three iterations done now; nothing is written."""
    few = min(3, cfg.iterations)
    trial = replace(run, folder=None, progress=False)
    shard = next(distill(source, experts, replace(cfg, iterations=few), [0], trial))
    return {
        "classes": len(source.classes),
        "images_made": cfg.ipc * len(source.classes),
        "seconds": round(shard.seconds["match"] / few * cfg.iterations, 1),
        "peak_bytes": max(shard.peak_bytes.values()),
        "measured_on": f"{few} of {cfg.iterations} iterations",
    }
