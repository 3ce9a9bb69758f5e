"""How useful a window is to train on: gradient norm, loss, EL2N or chance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from infoutil_fast.augment import resize
from infoutil_fast.gradnorm import el2n, grad_norms
from infoutil_fast.teacher import Teacher
from infoutil_fast.types import one_of

SCORES = ("grad_norm", "last_layer", "el2n", "loss", "random")
INPUTS = ("native", "pad", "resize")


def fit_input(teacher: Teacher, crops: Tensor, how: str) -> Tensor:
    """Crops uint8 [n, 3, s, s] as normalised net input [n, 3, S, S].

    "pad": on a frame of the mean colour, the teacher's side (RDED). "resize": enlarged to the teacher's side. "native": as they
    are, a quarter of the work at factor 2; enlarged where the net takes one side only (a ConvNet's linear layer).
    """
    size, side = teacher.facts.size, crops.shape[2]
    one_of("score_at", how, INPUTS)
    if how == "resize" or (how == "native" and teacher.facts.name.startswith("conv")):
        return teacher.normalise(resize(crops, size))
    x = teacher.normalise(crops)
    if how == "native" or side == size:
        return x
    before = (size - side) // 2
    after = size - side - before
    return F.pad(x, (before, after, before, after)).contiguous(memory_format=torch.channels_last)


def window_scores(teacher: Teacher, crops: Tensor, label: int, score: str, how: str, generator: Generator, batch: int = 128) -> Tensor:
    """One score of each window, float32 [n] on the CPU; float32 forwards. Raises `InputError` for an unknown score."""
    one_of("score", score, SCORES)
    if score == "random":
        return torch.rand(len(crops), generator=generator)
    parts = []
    for part in crops.split(batch):
        x = fit_input(teacher, part, how)
        targets = torch.full((len(x),), label, device=x.device)
        if score == "grad_norm":
            found = grad_norms(teacher.net, x, targets)
        elif score == "last_layer":
            found = grad_norms(teacher.net, x, targets, layers="last")
        elif score == "el2n":
            found = el2n(teacher.net, x, targets)
        else:
            with torch.inference_mode():
                found = F.cross_entropy(teacher.net(x).double(), targets, reduction="none")
        parts.append(found.float().cpu())
    return torch.cat(parts)
