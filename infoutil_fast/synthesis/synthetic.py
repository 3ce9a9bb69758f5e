"""Synthetic images, their labels and step size under way: the real start, the optimiser, checkpoints, iterates."""

from __future__ import annotations

import logging
import math
import pickle
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from infoutil_fast.contract import Run
from infoutil_fast.data import Source
from infoutil_fast.data.windows import whole_windows
from infoutil_fast.pixels import dsa
from infoutil_fast.runtime.files import write_bytes
from infoutil_fast.sets.store import ITERATES
from infoutil_fast.synthesis.experts import Experts
from infoutil_fast.synthesis.gradients import Matched
from infoutil_fast.types import InputError, Windows

log = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # between two checkpoints; when they are written changes no byte of the set


STATE = "state.pt"  # the checkpoint, removed with the last class


SURE = 20.0  # logit of the label where labels are hard: 1 - 1e-9 C after the softmax


@dataclass(frozen=True)
class Matching:
    """The settings of every trajectory method."""

    ipc: int = 10  # distilled images per class
    pool: int = 5000  # images per class to choose from: the real images that the synthetic ones start as
    seed: int = 0  # of the start images, and of the segments, batches and augmentation of every iteration
    iterations: int = 5000  # updates of the synthetic images
    syn_steps: int = 30  # steps of the student in an iteration
    expert_epochs: int = 2  # length of the expert's segment that the student is to match
    max_start: int = 20  # segments start before this epoch
    batch_syn: int = 0  # synthetic images in a step of the student; 0: all
    lr_img: float = 100.0  # learning rate of the pixels
    lr_lr: float = 1e-5  # learning rate of the student's step size
    lr_init: float = 0.01  # step size of the student at the start
    augment: str = dsa.STRATEGY  # groups of DSA joined by _, empty for none
    keep_every: int = 0  # iterations from one iterate kept in the set's folder to the next, the start among them; 0: none
    factor: ClassVar[int] = 1  # whole images, not stitched

    def __post_init__(self) -> None:
        dsa.groups(self.augment)
        for name in ("iterations", "syn_steps", "expert_epochs", "max_start"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("batch_syn", "lr_img", "lr_lr", "keep_every"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not self.lr_init > 0:
            raise InputError(f"lr_init must be above 0, not {self.lr_init}")


@dataclass(frozen=True)
class Synthetic:
    """Images as the student sees them, their labels and its step size."""

    images: Tensor  # [n, 3, S, S] float32, class by class
    labels: Tensor  # [n] int64, or [n, C] float32 logits
    lr: Tensor  # []
    hard: Tensor  # [n] int64, the class of each image
    windows: Windows  # [n], the real images that they started as


def start(source: Source, experts: Experts, cfg: Matching, positions: np.ndarray, labels: Tensor | None, run: Run) -> Synthetic:
    """The real images at `positions` [n], class by class; labels are class numbers where no logits [n, C] are given."""
    split, device = source.train, experts.device
    pixels = split.batch(positions, experts.size, run.workers).to(device)
    hard = torch.from_numpy(split.labels[positions]).to(device)
    lr = torch.tensor(cfg.lr_init, device=device)
    return Synthetic(experts.view.see(pixels), hard if labels is None else labels, lr, hard, whole_windows(split, positions))


def random_positions(source: Source, cfg: Matching) -> np.ndarray:
    """`ipc` random images of each class's pool that can be decoded, class by class, [C ipc] int64."""
    chosen = []
    for label, name in enumerate(source.classes):
        pool = shuffled_pool(source, label, cfg)
        readable = (position for position in pool if source.train.attempt(int(position)) is not None)
        chosen.append(np.fromiter(islice(readable, cfg.ipc), np.int64))
        if len(chosen[-1]) < cfg.ipc:
            raise InputError(
                f"{len(chosen[-1])} of the {len(pool)} images drawn of class {name!r} can be decoded, ipc {cfg.ipc} needs as many"
            )
    return np.concatenate(chosen)


def shuffled_pool(source: Source, label: int, cfg: Matching) -> np.ndarray:
    return np.random.default_rng([cfg.seed, label]).permutation(source.pool(label, cfg.pool, cfg.seed))


class Learning:
    """Images, labels and step size under way, their optimiser, and the losses so far."""

    def __init__(self, begin: Synthetic, cfg: Matching, lr_y: float):
        self.cfg, self.lr_y = cfg, lr_y
        self.images, self.labels, self.lr = begin.images.clone(), begin.labels.clone(), begin.lr.clone()
        groups: list[dict[str, Any]] = [{"params": [self.images], "lr": cfg.lr_img}, {"params": [self.lr], "lr": cfg.lr_lr}]
        if lr_y > 0:
            groups.append({"params": [self.labels], "lr": lr_y, "momentum": 0.9})
        self.optimiser = torch.optim.SGD(groups, lr=1.0, momentum=0.5)
        self.losses: list[float] = []

    def update(self, found: Matched, threshold: float) -> None:
        """One step of SGD; none where the loss is above the threshold."""
        if not math.isfinite(found.loss):
            raise InputError(
                f"the matching loss is not finite in iteration {len(self.losses) + 1}: try a lower lr_img or lr_lr, or fewer syn_steps"
            )
        self.losses.append(found.loss)
        if found.loss <= threshold:
            self.images.grad, self.lr.grad, self.labels.grad = found.images, found.lr, found.labels if self.lr_y > 0 else None
            self.optimiser.step()

    def keep(self, folder: Path | None) -> None:
        """Write this iterate beside the set where it is one of those to keep."""
        if folder is not None and self.cfg.keep_every and len(self.losses) % self.cfg.keep_every == 0:
            iterate = {"images": self.images.cpu(), "labels": self.labels.cpu(), "lr": self.lr.cpu()}
            write_bytes(folder / ITERATES / f"{len(self.losses):05d}.pt", _bytes(iterate))

    def save(self, file: Path) -> None:
        state = {"images": self.images, "labels": self.labels, "lr": self.lr, "optimiser": self.optimiser.state_dict()}
        write_bytes(file, _bytes({**state, "losses": self.losses}))

    def restore(self, file: Path | None) -> None:
        """Continue from `file` where it is: fills the tensors in place."""
        if file is None or not file.exists():
            return
        try:
            state = torch.load(file, weights_only=True, map_location=self.images.device)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise InputError(f"{file} cannot be read ({type(error).__name__}): delete it to start again") from error
        for name in ("images", "labels", "lr"):
            getattr(self, name).copy_(state[name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.losses = list(state["losses"])
        log.info("%s: going on after iteration %d", file.parent, len(self.losses))


def _bytes(value: object) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
