"""How useful a window is to train on: gradient norm, loss, EL2N or chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from infoutil_fast.gradnorm.norms import el2n, grad_norms
from infoutil_fast.models.teacher import Teacher
from infoutil_fast.pixels.augment import resize
from infoutil_fast.selection.rded_crops import float32_loss
from infoutil_fast.types import InputError, one_of

SCORES = ("grad_norm", "last_layer", "el2n", "loss", "random")
INPUTS = ("native", "pad", "resize")
WINDOWS_AT = (*INPUTS, "source")  # source: cut anew at the teacher's full side, not enlarged from its side in the set


def fit_input(teacher: Teacher, crops: Tensor, how: str) -> Tensor:
    """Crops [n, 3, s, s], uint8 or float in 0 to 1, as normalised net input [n, 3, S, S].

    "pad": on a frame of the mean colour, the teacher's side (RDED). "resize": enlarged to the teacher's side. "native": as they
    are, a quarter of the work at factor 2.
    """
    size, side = teacher.facts.size, crops.shape[2]
    if crops.is_floating_point():
        crops = crops * 255
    if how == "resize":
        return teacher.normalise(resize(crops, size))
    x = teacher.normalise(crops)
    if how == "native" or side == size:
        return x
    before = (size - side) // 2
    after = size - side - before
    return F.pad(x, (before, after, before, after)).contiguous(memory_format=torch.channels_last)


def accepts(net: nn.Module, side: int) -> bool:
    """Whether a net runs on images of `side` pixels: not where a linear layer or position embedding fixes the size."""
    parameter = next(net.parameters())
    try:
        with torch.no_grad():
            net(torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def window_scores(
    teacher: Teacher,
    crops: Tensor,
    names: Sequence[str],
    label: int,
    score: str,
    how: str,
    generator: Generator,
    batch: int = 128,
) -> Tensor:
    """One score of each window (`crops` as in `fit_input`, cut from the files `names`), float32 [n] on the CPU; float32 forwards.

    `how` as `fit_input`; "native" windows are enlarged for a net that takes one side only (a ConvNet, a ViT).
    Raises `InputError` for an unknown score and where an output is not finite.
    """
    one_of("score", score, (*SCORES, "float32_loss"))
    one_of("score_at", how, WINDOWS_AT)
    if score == "random":
        return torch.rand(len(crops), generator=generator)
    if how == "source":
        how = "resize"  # nothing to resize: they were cut at the full side
    if how == "native" and not accepts(teacher.net, crops.shape[2]):
        how = "resize"
    parts = []
    for start in range(0, len(crops), batch):
        x = fit_input(teacher, crops[start : start + batch], how)
        targets = torch.full((len(x),), label, device=x.device)
        try:
            parts.append(_batch_scores(teacher.net, x, targets, score).float().cpu())
        except InputError as error:
            raise InputError(f"{error} (windows in turn of {names[start]} to {names[start + len(x) - 1]})") from error
    return torch.cat(parts)


def _batch_scores(net: nn.Module, x: Tensor, targets: Tensor, score: str) -> Tensor:
    if score == "grad_norm":
        return grad_norms(net, x, targets)
    if score == "last_layer":
        return grad_norms(net, x, targets, layers="last")
    if score == "el2n":
        return el2n(net, x, targets)
    if score == "float32_loss":
        with torch.inference_mode():
            return float32_loss(net(x), targets)
    with torch.inference_mode():
        return F.cross_entropy(net(x).double(), targets, reduction="none")
