"""Soft labels: what a teacher says of the windows that a distilled image is made of."""

from __future__ import annotations

from torch import Tensor

from infoutil_fast.models.teacher import Teacher, refuse_nan
from infoutil_fast.pixels.augment import resize


def soft_labels(teacher: Teacher, crops: Tensor, windows: int, label: int, batch: int) -> Tensor:
    """Logits [n, windows, C] float32 on the CPU of uint8 crops [n * windows, 3, s, s] of one class, each seen at the teacher's full side.

    Raises `InputError` where a logit is not finite.
    """
    logits = teacher.logits(resize(crops, teacher.facts.size), batch=batch)  # [n * windows, C]
    refuse_nan(logits, [f"window {i} of class {label}" for i in range(len(logits))], teacher.facts.name)
    return logits.cpu().unflatten(0, (-1, windows))
