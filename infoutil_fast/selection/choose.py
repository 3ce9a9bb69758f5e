"""What the training-free methods share: score the windows tried, keep the best, stitch them, ask the teacher for labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from infoutil_fast.contract import Run
from infoutil_fast.data import Source, Split
from infoutil_fast.data.windows import take
from infoutil_fast.models.teacher import Teacher, refuse_nan
from infoutil_fast.pixels.augment import resize
from infoutil_fast.runtime.memory import Stages
from infoutil_fast.runtime.seeds import file_generator
from infoutil_fast.selection import rded_crops
from infoutil_fast.selection.ranking import best_of_image, rank, stitch
from infoutil_fast.selection.usefulness import window_scores
from infoutil_fast.types import ClassShard, InputError, Windows


class Common(Protocol):
    """What the configuration of every training-free method has."""

    @property
    def ipc(self) -> int: ...
    @property
    def factor(self) -> int: ...
    @property
    def pool(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Choice:
    """By what the windows tried are chosen."""

    per_image: int  # windows tried of each image
    score: str
    score_at: str
    direction: str
    floats: bool = False  # windows resized and scored as floats, stored with the fraction dropped (RDED's code)


@dataclass(frozen=True)
class Kept:
    """The windows that a class keeps, best first."""

    windows: Windows  # [n]
    crops: Tensor  # [n, 3, s, s] uint8
    scores: Tensor  # [n] float32
    index: np.ndarray  # [n] int64, place among all the windows tried
    pool: Tensor  # [P] float32, the score of each image of the pool: that of its best window


def draw(source: Source, label: int, cfg: Common, run: Run, stage: Stages) -> tuple[Split, np.ndarray, list[Generator]]:
    """The class's pool without the images that cannot be decoded: held in memory, their positions [P], and the randomness of each.

    Raises `InputError` when fewer are left than the class keeps windows.
    """
    drawn = source.pool(label, cfg.pool, cfg.seed)
    with stage("read"):
        split, positions = source.train.held(drawn, run.workers)
    if len(positions) < cfg.ipc * cfg.factor**2:
        raise InputError(
            f"{len(positions)} of the {len(drawn)} images drawn of class {source.classes[label]!r} can be decoded, "
            f"ipc {cfg.ipc} at factor {cfg.factor} needs {cfg.ipc * cfg.factor**2}: raise pool, or repair the files named above"
        )
    return split, positions, [file_generator(cfg.seed, label, split.names[i]) for i in positions]


def keep(split: Split, teacher: Teacher, label: int, tried: Windows, cfg: Common, choice: Choice, run: Run, stage: Stages) -> Kept:
    """Score the windows tried, image by image; of each image keep the one that is best, of those the best that the class needs."""
    with stage("cut"):
        side = teacher.facts.size // cfg.factor
        crops = rded_crops.float_crops(split, tried, side) if choice.floats else take(split, tried, side, run.workers)
    with stage("utility"):
        names = [split.names[i] for i in tried.image]
        chance = file_generator(cfg.seed, label, "scores")
        if choice.score == "random" and split.drawn is not None:  # one for each image drawn: an undecodable one does not move the others
            every = torch.rand(len(split.drawn) * choice.per_image, generator=chance)
            scores = every[torch.from_numpy(np.isin(split.drawn, tried.image)).repeat_interleave(choice.per_image)]
        else:
            scores = window_scores(teacher, crops, names, label, choice.score, choice.score_at, chance, run.batch)
        refuse_nan(scores[:, None], names, teacher.facts.name)
    with stage("select"):
        one = best_of_image(scores, choice.per_image, choice.direction)
        index = one[rank(scores[one], cfg.ipc * cfg.factor**2, choice.direction)]
        best = rded_crops.truncated(crops[index]) if choice.floats else crops[index]
    return Kept(tried[index.numpy()], best, scores[index], index.numpy(), scores[one])


def shard(teacher: Teacher, label: int, kept: Kept, factor: int, run: Run, stage: Stages, heat: Tensor | None = None) -> ClassShard:
    """Stitch each factor^2 consecutive windows; soft labels are the label teacher's logits of each window at its own full side."""
    oracle = run.label_teacher or teacher
    with stage("label"):
        logits = oracle.logits(resize(kept.crops, oracle.facts.size), batch=run.batch)
        refuse_nan(logits, [f"window {i} of class {label}" for i in range(len(logits))], oracle.facts.name)
    return ClassShard(
        label,
        stitch(kept.crops, factor),
        logits.cpu().unflatten(0, (-1, factor * factor)),
        kept.windows,
        kept.scores.numpy(),
        {"pool_score": kept.pool.numpy(), **({} if heat is None else {"heat": heat.cpu().numpy()})},
        dict(stage.seconds),
        dict(stage.peak_bytes),
    )
