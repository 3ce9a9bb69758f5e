"""One batch's pass for gradient norms: the losses' gradients, one forward, one backward, squared norms of every parameter."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from infoutil_fast.gradnorm.first_look import Look, spread
from infoutil_fast.gradnorm.hooks import Call, recording, run
from infoutil_fast.gradnorm.rules import TORCH_FLOATS, has_rule
from infoutil_fast.types import InputError, first_line

Loss = Callable[[Tensor, Tensor], Tensor]
Squares = dict[str, Tensor]  # layer or parameter name -> squared norms [n] float64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What one pass is of."""

    model: nn.Module
    loss: Loss | None  # None: cross-entropy
    dtype: torch.dtype | None  # as `run` takes it
    x: Tensor  # [n, ...]
    y: Tensor  # [n] int64
    start: int  # of the first sample, for messages

    def gradients(self, logits: Tensor, layer: nn.Module | None, x: Tensor | None) -> Tensor:
        """`loss_gradients` at the logits, unrounded where the last layer gave them from x."""
        return loss_gradients(unrounded(logits, layer, x), self.y, self.loss, self.start)


def loss_gradients(logits: Tensor, targets: Tensor, loss: Loss | None, start: int) -> Tensor:
    """Gradient [n, C] of the losses in float64: in float32 p - y cancels where the net is confident."""
    n = len(targets)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        raise InputError(f"logits [{n}, classes] are needed; the model gives {list(getattr(logits, 'shape', [type(logits).__name__]))}")
    if len(bad := ((targets < 0) | (targets >= logits.shape[1])).nonzero()):
        raise InputError(f"target {targets[bad[0]].item()} at position {start + bad[0].item()}; possible: 0 to {logits.shape[1] - 1}")
    z = logits.detach().double()
    if loss is None:
        g = z.softmax(1).scatter(1, targets[:, None], 0)
        g.scatter_(1, targets[:, None], -g.sum(1, keepdim=True))  # p - 1 as minus the other p: exact however close p is to 1
    else:
        losses = loss(z.requires_grad_(), targets)
        if losses.shape != (n,):
            raise InputError(f"the loss of {n} samples has shape {list(losses.shape)}; [{n}] is needed")
        (g,) = torch.autograd.grad(losses.sum(), z)
    if len(bad := (logits.isnan() | ~g.isfinite()).any(1).nonzero()):
        raise InputError(f"the logits or their gradients are NaN or infinite at positions {(bad[:, 0] + start).tolist()}")
    return g


def unrounded(logits: Tensor, layer: nn.Module | None, x: Tensor | None) -> Tensor:
    """The logits in float64 where a last linear layer gave them from x: p - y loses as many digits by its rounding as by all before."""
    if not isinstance(logits, Tensor) or not isinstance(layer, nn.Linear) or x is None:
        return logits
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        rounded = [t if t is None else t.to(logits.dtype) for t in (x, layer.weight, layer.bias)]
        same = F.linear(*rounded)
        far = 4 * torch.finfo(torch.float32).eps * logits.abs().amax() if logits.dtype == torch.float32 and len(logits) else 0
        if same.shape != logits.shape or not ((same - logits).abs() <= far).all():  # something follows the layer
            return logits
        return F.linear(*(t if t is None else t.double() for t in rounded))


def last_of(calls: list[Call]) -> tuple[Any, Tensor | None]:
    """The last layer and its input."""
    return (calls[-1].layer, calls[-1].x) if calls else (None, None)


def last_layer(batch: Batch) -> Squares:
    """Forward only."""
    with recording(batch.model, lambda m: isinstance(m, nn.Linear)) as record, torch.no_grad():
        logits = run(batch.model, batch.x, batch.dtype)
    last = record.calls[-1] if record.calls else None
    g = batch.gradients(logits, *last_of(record.calls))
    if last is None or last.x is None or last.out is None or last.x.ndim != 2 or not torch.equal(last.out, logits):
        raise InputError("layers='last' needs a model that ends in a linear layer; layers='all' takes any model")
    return {last.name: g.square().sum(1) * (last.x.double().square().sum(1) + (last.layer.bias is not None))}


def scaled(g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients [n, C] over their largest element, in the format of the logits, so that no sample underflows; and these elements [n]."""
    size = g.abs().amax(1)
    return (g / size.clamp(min=torch.finfo(g.dtype).tiny)[:, None]).to(dtype), size


def all_layers(batch: Batch, *, seen: Look, backend: str, calls: dict[str, set[str]] | None = None) -> Squares:
    """One forward and one backward. `calls`, if given, gets the parameters that each layer's call covers, where these are all there are."""
    model, dtype, x = batch.model, batch.dtype, batch.x
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    copies = {name: spread(params[name], form, len(x)) for name, form in seen.copies.items()}
    with recording(model, has_rule, backend) as record:
        logits = run(model, x.clone(), dtype, copies)
    g = batch.gradients(logits, *last_of(record.calls))
    if not logits.requires_grad:
        raise InputError("the logits carry no gradient: the forward runs without autograd, or uses no parameter that requires one")
    unit, size = scaled(g, logits.dtype)
    uses = _uses(logits, [c for c in record.calls if c.out is None])
    for c in record.calls:
        if c.x is not None and c.x.shape[1:] in seen.shapes.get(c.name, ()) and c.out is None and len(c.x) == len(x):
            own = {k for k, p in c.layer.named_parameters(recurse=False) if uses[p] == 2}
            c.own = own if own <= {"weight", "bias"} and c.x._version == c.version else set()
    found: Sequence[Tensor | None] = []
    ends: list[Any] = [*copies.values(), *record.ends]
    if ends:  # only gradients of layer outputs are propagated: down to the layers that come first, none of weights
        with torch.autocast(x.device.type, enabled=False):
            found = torch.autograd.grad(logits, ends, unit, allow_unused=True)
    squares = {name: whole(g, len(x)) for name, g in zip(copies, found, strict=False) if g is not None}
    squares |= {c.name: c.square for c in record.calls if c.square is not None}
    covered = {id(p) for c in record.calls if c.square is not None for k, p in c.layer.named_parameters(recurse=False) if k in c.own}
    left = {name: p for name, p in params.items() if id(p) not in covered and name not in copies}
    if left:
        log.info("gradient norms of %s by torch.func: no rule for these parameters", ", ".join(left))
        squares |= _by_sample(model, dtype, x, unit, left)
    elif calls is not None:
        calls |= {c.name: c.own for c in record.calls if c.square is not None}
    return {name: s.double() * size.square() for name, s in squares.items()}


def whole(g: Tensor, n: int) -> Tensor:
    """Squared norms [n] of gradients [n, ...]."""
    return g.reshape(n, -1).to(torch.promote_types(g.dtype, torch.float32)).square().sum(1)


def _uses(logits: Tensor, calls: list[Call]) -> Counter[Tensor]:
    """How often each parameter is met in the graph, plus how often in `calls`: 2 where one call is its only use."""
    uses: Counter[Tensor] = Counter(p for c in calls for p in c.layer.parameters(recurse=False))
    seen, todo = set(), [logits.grad_fn]
    while todo:
        for node, _ in getattr(todo.pop(), "next_functions", ()):
            if hasattr(node, "variable"):
                uses[node.variable] += 1
            elif node not in seen:
                seen.add(node)
                todo.append(node)
    return uses


def _by_sample(model: nn.Module, dtype: torch.dtype | None, x: Tensor, unit: Tensor, params: dict[str, nn.Parameter]) -> Squares:
    """Squared norms [n] of `params` from whole gradients, vmapped over as many samples as fit, or one by one."""

    def squares(image: Tensor, g: Tensor) -> Squares:
        at = {name: p.detach() for name, p in params.items()}
        grads = grad(lambda values: (run(partial(functional_call, model, values), image[None].clone(), dtype)[0] * g).sum())(at)
        return {name: v.double().square().sum() for name, v in grads.items()}

    rows = max(1, 8 * TORCH_FLOATS // sum(p.numel() for p in params.values()))
    try:
        with torch.no_grad():
            return vmap(squares, chunk_size=rows)(x, unit)
    except RuntimeError as error:
        log.info("the model cannot be vmapped (%s): one sample at a time", first_line(error))
    result = {name: unit.new_zeros(len(x), dtype=torch.float64) for name in params}
    for i in range(len(x)):
        logits = run(model, x[i : i + 1].clone(), dtype)
        for name, v in zip(params, torch.autograd.grad(logits, [*params.values()], unit[i : i + 1], materialize_grads=True), strict=True):
            result[name][i] = v.double().square().sum()
    return result
