"""InfoUtil: Shapley windows, the useful ones by gradient norm, stitched, softly labelled (ICLR 2026, arXiv:2601.21296)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infoutil_fast.contract import Run
from infoutil_fast.data import Source
from infoutil_fast.data.windows import random_windows, whole_windows, windows_at
from infoutil_fast.models.teacher import Teacher, refuse_nan
from infoutil_fast.ranges import Count, NotNegative, Seed, Whole, checked
from infoutil_fast.runtime.memory import Stages
from infoutil_fast.runtime.seeds import file_generator
from infoutil_fast.selection.choose import Choice, draw, keep, shard
from infoutil_fast.selection.ranking import DIRECTIONS, noisy_cells, pool_heat
from infoutil_fast.selection.usefulness import INPUTS, SCORES
from infoutil_fast.shapley.designs import plan
from infoutil_fast.shapley.maps import PAYOFFS, PatchShapley
from infoutil_fast.types import ClassShard, InputError, one_of


@checked
@dataclass(frozen=True)
class Config:
    ipc: Count = 10  # distilled images per class
    factor: Whole = 0  # factor^2 windows are stitched into an image; 0: 2 from 96 px on, 1 below
    pool: Count = 300  # images per class to choose from
    seed: Seed = 0  # of the pool and the noise
    grid: Count = 4  # patches a side of the Shapley map
    design: str = "border_hadamard"  # coalitions: border_hadamard, leverage, kernel, permutation, captum (the paper's), exact
    evaluations: Whole = 0  # forwards per image; 0: the design's own, 64, 25 (captum) or all
    payoff: str = "logit"  # of the label: logit, log_probability, probability, log_odds
    windows: str = "shapley"  # shapley, or random: the ablation without Shapley
    window: Whole = 0  # side of a window in patches; 0: half the grid at factor 2 and above, else the whole image
    crops: Count = 5  # windows tried per image: all noisy but the last
    noise: NotNegative = 2.0  # standard deviation of the noise in deviations of the pooled map; 0: none
    distinct: bool = False  # the windows tried of one image differ
    score: str = "grad_norm"  # utility: grad_norm, last_layer, el2n, loss, or random: the ablation without norm
    score_at: str = "native"  # size of a window when it is scored: native, pad, resize
    direction: str = "low"  # scores to keep: low (easy windows), high (the paper), medium

    def __post_init__(self) -> None:
        one_of("windows", self.windows, ("shapley", "random"))
        one_of("payoff", self.payoff, tuple(PAYOFFS))
        one_of("score", self.score, SCORES)
        one_of("score_at", self.score_at, INPUTS)
        one_of("direction", self.direction, DIRECTIONS)
        if self.windows == "shapley":
            plan(self.design, self.grid**2, self.evaluations or None)
        if not 0 <= self.window <= self.grid:
            raise InputError(f"window must be 1 to grid = {self.grid} patches, or 0 for the rule, not {self.window}")


# What the paper states; where it is silent Captum's defaults, half-side windows and padded scoring. Its early teacher is `label_teacher`.
PAPER = {
    "design": "captum",
    "evaluations": 25,
    "window": 2,
    "crops": 5,
    "noise": 2.0,
    "score": "grad_norm",
    "score_at": "pad",
    "direction": "high",
}


def distill(source: Source, teacher: Teacher, cfg: Config, labels: Sequence[int], run: Run) -> Iterator[ClassShard]:
    """One finished shard of each class in `labels`."""
    size, width = teacher.facts.size, cfg.window or (cfg.grid // 2 if cfg.factor > 1 else cfg.grid)
    for label in labels:
        stage = Stages(teacher.device)
        split, pool, generators = draw(source, label, cfg, run, stage)
        names = [split.names[i] for i in pool]
        heat, crops = None, cfg.crops
        if cfg.windows == "random":
            with stage("cut"):
                tried = random_windows(split, pool, crops, generators)
        elif width == cfg.grid:  # the whole image is the only window: no map is needed to choose it
            with stage("cut"):
                tried, crops = whole_windows(split, pool), 1
        else:
            with stage("shapley"):
                images = split.batch(pool, size, run.workers)
                heat = heat_maps(teacher, images, label, cfg, run, generators)
                refuse_nan(heat, names, teacher.facts.name)
            with stage("cut"):
                cells = noisy_cells(pool_heat(heat, width), crops, cfg.noise, generators, cfg.distinct)
                tried = windows_at(split, pool, cells, cfg.grid, width)
        kept = keep(split, teacher, label, tried, cfg, Choice(crops, cfg.score, cfg.score_at, cfg.direction), run, stage)
        yield shard(teacher, label, kept, cfg.factor, run, stage, heat if heat is None else heat[kept.index // crops])


def heat_maps(teacher: Teacher, images: Tensor, label: int, cfg: Config, run: Run, generators: list[torch.Generator]) -> Tensor:
    """Shapley map [n, g, g] float32 of uint8 images for their label; a sampled design draws from each file's own generator."""
    x = teacher.normalise(images)
    targets = torch.full((len(x),), label, device=x.device)
    made = PatchShapley(
        teacher.net,
        (x.shape[1], x.shape[2], x.shape[3]),
        grid=cfg.grid,
        design=cfg.design,
        evaluations=cfg.evaluations or None,
        payoff=cfg.payoff,
        dtype=run.dtype,
        batch=run.shapley_batch,
        generator=file_generator(cfg.seed, label, "coalitions"),  # of a design that is drawn once for all images
    )
    if not made.redrawn:
        return made(x, targets)
    return torch.cat([made(x[i : i + 1], targets[i : i + 1], generator=generator) for i, generator in enumerate(generators)])
