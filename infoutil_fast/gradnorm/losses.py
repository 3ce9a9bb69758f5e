"""The losses' gradients at the logits, in float64: of cross-entropy, or of any loss that keeps samples apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from infoutil_fast.types import InputError, first_line

Loss = Callable[[Tensor, Tensor], Tensor]
ROUNDING = 1e-6  # relative: what two ways of taking one gradient in float64 may differ by


def check_targets(images: Tensor, targets: Tensor, loss: Loss | None) -> None:
    """Raise `InputError` unless there is a target for each image: a class number, or whatever a loss of one's own takes."""
    n = len(images)
    if loss is None and (targets.shape != images.shape[:1] or targets.is_floating_point()):
        hint = "; targets of other kinds need a loss of their own" if targets.shape[:1] == images.shape[:1] else ""
        raise InputError(f"{n} images need {n} integer targets, not {targets.dtype} {list(targets.shape)}{hint}")
    if targets.shape[:1] != images.shape[:1]:
        raise InputError(f"{n} images need targets [{n}, ...], not {list(targets.shape)}")


def taken(targets: Tensor, device: torch.device, loss: Loss | None) -> Tensor:
    """Own copies of targets in the wide formats: class numbers int64, real ones float64, flags as they are where a loss takes them."""
    kind = torch.float64 if targets.is_floating_point() else torch.bool if loss and targets.dtype == torch.bool else torch.int64
    return targets.detach().to(device, kind, copy=True)


def loss_gradients(logits: Tensor, targets: Tensor, loss: Loss | None, start: int) -> Tensor:
    """Gradient [n, C] of the losses in float64: in float32 p - y cancels where the net is confident. [n, ...] with a loss of one's own."""
    n = len(targets)
    fits = isinstance(logits, Tensor) and logits.ndim > 0 and len(logits) == n and logits.is_floating_point()
    if not fits or (loss is None and logits.ndim != 2):
        raise InputError(f"logits [{n}, classes] are needed; the model gives {list(getattr(logits, 'shape', [type(logits).__name__]))}")
    g = _of_cross_entropy(logits, targets, start) if loss is None else _of_own(logits, targets, loss, start)
    if len(bad := (logits.isnan() | ~g.isfinite()).reshape(n, -1).any(1).nonzero()):
        raise InputError(f"the logits or their gradients are NaN or infinite at positions {(bad[:, 0] + start).tolist()}")
    return g


def _of_cross_entropy(logits: Tensor, targets: Tensor, start: int) -> Tensor:
    if logits.shape[1] == 1:
        raise InputError("the model gives one logit, whose softmax is always 1: pass a loss, such as binary cross-entropy")
    if len(bad := ((targets < 0) | (targets >= logits.shape[1])).nonzero()):
        raise InputError(f"target {targets[bad[0]].item()} at position {start + bad[0].item()}; possible: 0 to {logits.shape[1] - 1}")
    g = logits.detach().double().softmax(1).scatter(1, targets[:, None], 0)
    return g.scatter_(1, targets[:, None], -g.sum(1, keepdim=True))  # p - 1 as minus the other p: exact however close p is to 1


class _Wide(TorchFunctionMode):
    """Every real tensor that an operation is given comes in float64: class weights and soft labels meet logits of that format."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, (args, kwargs or {}))
        return func(*wide[0], **wide[1])


def _losses(loss: Loss, z: Tensor, targets: Tensor) -> Any:
    try:
        return loss(z, targets)
    except RuntimeError:  # of formats, if anything
        with _Wide():
            return loss(z, targets)


def _of_own(logits: Tensor, targets: Tensor, loss: Loss, start: int) -> Tensor:
    n, z = len(targets), logits.detach().double().requires_grad_()
    try:
        losses = _losses(loss, z, targets)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        given = f"logits {list(z.shape)} and targets {str(targets.dtype).removeprefix('torch.')} {list(targets.shape)}"
        raise InputError(f"the loss cannot be taken of {given}: {first_line(error)}") from error
    shape = list(losses.shape) if isinstance(losses, Tensor) else [type(losses).__name__]
    if shape not in ([n], [n, 1]):
        hint = ", such as the sum over the labels" if shape[:1] == [n] else ""
        raise InputError(f"the loss of {n} samples has shape {shape}; [{n}] is needed{hint}")
    losses = losses.reshape(n)
    if not losses.requires_grad:
        raise InputError("the loss carries no gradient: it must be computed from the logits by torch")
    weight = 1 + torch.arange(n, device=z.device, dtype=torch.float64) / n
    (g,) = torch.autograd.grad(losses.sum(), z, retain_graph=True)
    (weighted,) = torch.autograd.grad(losses @ weight, z)
    apart = (weighted - weight.view(-1, *[1] * (z.ndim - 1)) * g).reshape(n, -1).abs().amax(1)
    mixed = (apart > ROUNDING * g.abs().max()).nonzero()[:, 0].tolist() or _changed_alone(loss, z.detach(), targets, losses)
    if mixed:
        at = start + mixed[0]
        raise InputError(f"the loss of the sample at position {at} depends on other samples of its batch: no gradient per sample exists")
    return g


def _changed_alone(loss: Loss, z: Tensor, targets: Tensor, losses: Tensor) -> list[int]:
    """Of the first and the last sample, those with another loss when alone; a loss that takes none alone says nothing."""
    found = []
    for i in {0, len(z) - 1} if len(z) > 1 else ():
        try:
            with torch.no_grad():
                alone = _losses(loss, z[i : i + 1], targets[i : i + 1])
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue
        if isinstance(alone, Tensor) and alone.shape in ((1,), (1, 1)):
            off = (alone.reshape(()) - losses[i]).abs()
            if off.isfinite() and off > ROUNDING * losses[i].abs().clamp(min=1e-3):
                found.append(i)
    return found


def unrounded(logits: Tensor, layer: nn.Module | None, x: Tensor | None) -> Tensor:
    """The logits in float64 where a last linear layer gave them from x: p - y loses as many digits by its rounding as by all before."""
    if not isinstance(logits, Tensor) or not isinstance(layer, nn.Linear) or x is None or not logits.isfinite().all():
        return logits
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        rounded = [t if t is None else t.to(logits.dtype) for t in (x, layer.weight, layer.bias)]
        if x.shape[-1:] != layer.weight.shape[1:]:
            return logits
        same = F.linear(*rounded)
        far = 4 * torch.finfo(torch.float32).eps * logits.abs().amax() if logits.dtype == torch.float32 and len(logits) else 0
        if same.shape != logits.shape or not ((same - logits).abs() <= far).all():  # something follows the layer
            return logits
        return F.linear(*(t if t is None else t.double() for t in rounded))


def scaled(g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients [n, ...] over their largest element, in the format of the logits, so that no sample underflows; and these elements [n]."""
    size = g.abs().reshape(len(g), -1).amax(1)
    return (g / size.clamp(min=torch.finfo(g.dtype).tiny).view(-1, *[1] * (g.ndim - 1))).to(dtype), size
