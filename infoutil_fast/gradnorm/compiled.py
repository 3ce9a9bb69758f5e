"""Gradient norms in one compiled graph: each layer's output passes a tap with a slot whose gradient is the layer's squared norm."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from infoutil_fast.gradnorm.first_look import Look, how, spread
from infoutil_fast.gradnorm.hooks import attach, casting
from infoutil_fast.gradnorm.losses import scaled
from infoutil_fast.gradnorm.one_pass import Batch, Squares, all_layers, whole
from infoutil_fast.gradnorm.rules import layer_sqnorm
from infoutil_fast.types import InputError, first_line

CLOSE = (1e-2, 0.2)  # squared norms of a layer by a compiled graph and by the plain pass may differ so much: in float32; in narrow formats
log = logging.getLogger(__name__)


def _tap(layer: nn.Module, own: Collection[str], backend: str) -> Any:
    """(out, x, slot [n]) -> out; the gradient of `slot` is the squared norm of each sample's gradient of the layer's parameters `own`."""

    class Tap(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, out: Tensor, x: Tensor, slot: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return out.view_as(out)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor]:
            (x,) = ctx.saved_tensors
            with torch.autocast(g.device.type, enabled=False):
                return g, None, layer_sqnorm(layer, x, g, own, backend).double()

    return Tap


class _Tapped(nn.Module):
    """A twin of a model in eval mode, of the same storages, whose parameters require no gradient, with taps behind the layers in `own`."""

    def __init__(self, model: nn.Module, own: Mapping[str, Collection[str]], backend: str):
        super().__init__()
        same: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        same |= {id(b): b for b in model.buffers()}
        self.net = copy.deepcopy(model, same).eval()
        for m in self.net.modules():
            if getattr(m, "inplace", False):  # autograd allows no change in place behind a tap, and the compiler needs none
                m.inplace = False  # type: ignore[assignment]
        self.own, self.backend = own, backend
        self.taps: dict[str, Any] = {}  # made in the first forward, which is not compiled
        self.last: nn.Module | None = None  # of these layers
        self.slots: dict[str, Tensor] = {}
        self.x: Tensor  # what went into it
        attach(self.net, self._add, lambda name, layer: name in own)

    def _add(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if name not in self.taps:
            self.taps[name], self.last = _tap(layer, self.own[name], self.backend), layer
        x = args[0].detach()
        self.x = x.to(out.dtype) if x.is_floating_point() else x  # as autocast gave it to the layer
        return self.taps[name].apply(out, self.x, self.slots[name])

    def forward(self, x: Tensor, slots: dict[str, Tensor], values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        self.slots = slots
        logits = functional_call(self.net, values, (x,)) if values else self.net(x)
        return logits, self.x


class Taps:
    """A model's forward as one compiled graph, whose backward leaves squared norms in the slots that come with it.

    Weights and buffers are the model's own: changes in place are followed. Made for layers that each run once and own their parameters.
    """

    def __init__(self, model: nn.Module, own: Mapping[str, Collection[str]], copies: Mapping[str, tuple[int, ...]], backend: str):
        """own: layer -> its parameters that count; copies: parameter -> shape of one sample's copy. Raises what deepcopy does."""
        self.copies = {name: (p, copies[name]) for name, p in model.named_parameters() if name in copies}
        self.tapped = _Tapped(model, own, backend)
        self.compiled = torch.compile(self.tapped, fullgraph=True)

    def squares(self, batch: Batch) -> Squares:
        """Squared norms [n] of n images by layer and copied parameter."""
        x, n = batch.x, len(batch.x)
        x = x.repeat(2, *[1] * (x.ndim - 1)) if n == 1 else x  # a single row would be compiled for itself
        x = x.clone(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)  # always the same strides
        slots = {name: x.new_zeros(len(x), dtype=torch.float64, requires_grad=True) for name in self.tapped.own}
        values = {name: spread(p, form, len(x)) for name, (p, form) in self.copies.items()}
        for t in (x, *slots.values(), *values.values()):
            torch._dynamo.maybe_mark_dynamic(t, 0)
        with casting(x.device.type, batch.dtype):
            if not self.tapped.taps:
                self.tapped(x, slots, values)
            logits, last = self.compiled(x, slots, values)
        logits = logits[:n]
        unit, size = scaled(batch.gradients(logits, self.tapped.last, last[:n]), logits.dtype)
        with torch.autocast(x.device.type, enabled=False):
            found = torch.autograd.grad(logits, [*slots.values(), *values.values()], unit)
        squares = {name: g if name in slots else whole(g, len(x)) for name, g in zip((*slots, *values), found, strict=True)}
        return {name: s[:n].double() * size.square() for name, s in squares.items()}


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, Taps | None]]] = weakref.WeakKeyDictionary()


def in_one_graph(batch: Batch, *, seen: Look, backend: str) -> Squares:
    """`all_layers` by `Taps`, made and tried on the first batch of a model; by itself where they do not do, and a message says why."""
    model = batch.model
    storages = tuple((id(t), t.data_ptr(), t.requires_grad) for t in (*model.parameters(), *model.buffers()))
    known, key = _known.setdefault(model, {}), (how(batch.x, batch.dtype), backend)
    try:
        if key not in known or known[key][0] != storages:
            known[key] = storages, _tried(batch, seen, backend)
        taps = known[key][1]
        if taps is not None:
            return taps.squares(batch)
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, NotImplementedError, ImportError) as error:
        log.warning("gradient norms of this model go on without torch.compile: %s", first_line(error))
        known[key] = storages, None
    return all_layers(batch, seen=seen, backend=backend)


def _tried(batch: Batch, seen: Look, backend: str) -> Taps:
    """Taps whose norms of this batch are those of the plain pass. Raises `RuntimeError` where there are none."""
    own: dict[str, set[str]] = {}
    expected = all_layers(batch, seen=seen, backend=backend, calls=own)
    if not own:
        raise RuntimeError("it has parameters that no rule covers")
    taps = Taps(batch.model, own, seen.copies, backend)
    found = taps.squares(batch)
    total = sum(expected.values(), batch.y.new_zeros(len(batch.y), dtype=torch.float64))
    least = total.norm() / 1000  # what a layer has below this is rounding alone
    off = max(float((found[name] - s).norm() / (s.norm() + least)) for name, s in expected.items())
    low = torch.is_autocast_enabled(batch.x.device.type) if batch.dtype is None else batch.dtype != torch.float32
    if not off < CLOSE[low]:
        raise RuntimeError(f"its norms would differ by {off:.1e}")
    return taps
