"""InfoUtil: Shapley windows, the useful ones by gradient norm, stitched, softly labelled (ICLR 2026, arXiv:2601.21296)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infoutil_fast.contract import Job, Run
from infoutil_fast.data import Source
from infoutil_fast.data.windows import random_windows, whole_windows, windows_at
from infoutil_fast.models.teacher import Teacher, refuse_nan
from infoutil_fast.runtime.memory import Stages
from infoutil_fast.runtime.seeds import file_generator
from infoutil_fast.selection.choose import Choice, Pool, PoolSettings, draw_pool, keep_best, stitched
from infoutil_fast.selection.ranking import DIRECTIONS, noisy_cells, pool_heat
from infoutil_fast.selection.usefulness import INPUTS, SCORES
from infoutil_fast.shapley.designs import plan
from infoutil_fast.shapley.maps import PAYOFFS, PatchShapley
from infoutil_fast.types import ClassShard, InputError, one_of


@dataclass(frozen=True)
class Config(PoolSettings):
    grid: int = 4  # patches a side of the Shapley map
    design: str = "border_hadamard"  # coalitions: border_hadamard, leverage, kernel, permutation, captum (the paper's), exact
    evaluations: int = 0  # forwards per image; 0: the design's own, 64, 25 (captum) or all
    payoff: str = "logit"  # of the label: logit, log_probability, probability, log_odds
    windows: str = "shapley"  # shapley, or random: the ablation without Shapley
    window: int = 0  # side of a window in patches; 0: half the grid at factor 2 and above, else the whole image
    crops: int = 5  # windows tried per image: all noisy but the last
    noise: float = 2.0  # standard deviation of the noise in deviations of the pooled map; 0: none
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
        if self.noise < 0:
            raise InputError(f"noise must be 0 or more, not {self.noise}")


# What the paper states; where it is silent Captum's defaults, half-side windows and padded scoring. Its early teacher is `label_teacher`.
PRESETS = {
    "paper": {
        "design": "captum",
        "evaluations": 25,
        "window": 2,
        "crops": 5,
        "noise": 2.0,
        "score": "grad_norm",
        "score_at": "pad",
        "direction": "high",
    }
}


def distill(source: Source, teacher: Teacher, cfg: Config, labels: Sequence[int], run: Job) -> Iterator[ClassShard]:
    """One finished shard of each class in `labels`."""
    width = cfg.window or (cfg.grid // 2 if cfg.factor > 1 else cfg.grid)
    for label in labels:
        stage = Stages(teacher.device)
        pool = draw_pool(source, label, cfg, run, stage)
        heat, crops = None, cfg.crops
        if cfg.windows == "random":
            with stage("cut"):
                tried = random_windows(pool.split, pool.positions, crops, pool.generators)
        elif width == cfg.grid:  # the whole image is the only window: no map is needed to choose it
            with stage("cut"):
                tried, crops = whole_windows(pool.split, pool.positions), 1
        else:
            with stage("shapley"):
                heat = heat_maps(pool, teacher, cfg, run)
            with stage("cut"):
                cells = noisy_cells(pool_heat(heat, width), crops, cfg.noise, pool.generators, cfg.distinct)
                tried = windows_at(pool.split, pool.positions, cells, cfg.grid, width)
        kept = keep_best(pool, tried, teacher, cfg, Choice(crops, cfg.score, cfg.score_at, cfg.direction), run, stage)
        yield stitched(kept, teacher, cfg, run, stage, heat if heat is None else heat[kept.index // crops])


def heat_maps(pool: Pool, teacher: Teacher, cfg: Config, run: Run) -> Tensor:
    """Shapley map [P, g, g] float32 of each image of the pool for its class; a sampled design draws from each file's own generator."""
    x = teacher.normalise(pool.split.batch(pool.positions, teacher.facts.size, run.workers))  # [P, 3, S, S]
    targets = torch.full((len(x),), pool.label, device=x.device)
    made = PatchShapley(
        teacher.net,
        (x.shape[1], x.shape[2], x.shape[3]),
        grid=cfg.grid,
        design=cfg.design,
        evaluations=cfg.evaluations or None,
        payoff=cfg.payoff,
        dtype=run.dtype,
        batch=run.batch or None,
        generator=file_generator(cfg.seed, pool.label, "coalitions"),  # of a design that is drawn once for all images
    )
    if made.redrawn:
        heat = torch.cat([made(x[i : i + 1], targets[i : i + 1], generator=chance) for i, chance in enumerate(pool.generators)])
    else:
        heat = made(x, targets)
    refuse_nan(heat, pool.names, teacher.facts.name)
    return heat
