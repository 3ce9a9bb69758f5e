"""The layer calls of a forward, recorded for gradient norms, and what a first look at a model finds out for all further calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from infoutil_fast.gradrules import has_rule, layer_sqnorm


def casting(kind: str, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` if that is narrow, as the caller has it if None, on devices of a kind."""
    low = torch.is_autocast_enabled(kind) if dtype is None else dtype != torch.float32
    # no cache: two uses of one weight would look like one in the graph
    return torch.autocast(kind, dtype if dtype and low else torch.get_autocast_dtype(kind), enabled=low, cache_enabled=False)


def run(model: Any, x: Tensor, dtype: torch.dtype | None, values: dict[str, Tensor] | None = None) -> Any:
    """A forward under `casting`; `values` stand for parameters."""
    with casting(x.device.type, dtype):
        return functional_call(model, values, (x,)) if values else model(x)


@dataclass
class Call:
    """One call of a layer in a forward."""

    name: str
    layer: Any
    x: Tensor | None  # until the norm is taken
    version: int  # of x, which may be changed in place later
    shape: torch.Size  # of the output
    out: Tensor | None  # the output, only without autograd: a hook of the graph holds this call, which must not hold the graph
    own: set[str] = field(default_factory=set)  # the parameters whose only use this call is
    square: Tensor | None = None  # [n]

    def take(self, backend: str, g: Tensor) -> None:
        """The norm from the output's gradient, then let go of the input."""
        if self.own and self.x is not None:
            with torch.no_grad():
                self.square = layer_sqnorm(self.layer, self.x, g.reshape(self.shape), self.own, backend)
        self.x = None


@dataclass
class Record:
    """What a forward left: the calls, in order, and the edges of those below which no gradient goes."""

    backend: str
    calls: list[Call] = field(default_factory=list)
    ends: list[GradientEdge] = field(default_factory=list)

    def add(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """A forward hook: a call's norm is taken in the backward, as soon as its output's gradient is there, whatever is changed later."""
        base = out._base if out._is_view() else None
        if base is not None and (base.numel() != out.numel() or not (base.is_contiguous() and out.is_contiguous())):
            out, base = out.clone(), None  # a change in place would cut a part of another tensor out of the graph
        tap = out if base is None else base
        if args:
            x = args[0].detach()
            x = x.to(out.dtype) if x.is_floating_point() else x  # as autocast gave it to the layer; the wider one may go
            self.calls.append(Call(name, layer, x, x._version, out.shape, None if out.requires_grad else out))
            if out.requires_grad:
                tap.register_hook(partial(self.calls[-1].take, self.backend))
            if out.requires_grad and not args[0].requires_grad:
                self.ends.append(get_gradient_edge(tap))
        return out


Add = Callable[[str, Any, tuple[Tensor, ...], Tensor], Tensor]  # a forward hook with the layer's name before its arguments


def attend(
    add: Add,
    name: str,
    layer: nn.MultiheadAttention,
    packed: nn.Linear | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Self-attention with its packed projection as a linear layer that hooks see; anything else as torch has it."""
    options: dict[str, Any] = dict(
        zip(("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"), args, strict=False)
    )
    options |= kwargs
    masked = any(options.get(mask) is not None for mask in ("key_padding_mask", "attn_mask")) or options.get("is_causal", False)
    plain = layer._qkv_same_embed_dim and layer.bias_k is None and not layer.add_zero_attn and query.ndim == 3
    if not plain or masked or options.get("need_weights", True) or query is not key or key is not value:
        return type(layer).forward(layer, query, key, value, *args, **kwargs)
    x = query if layer.batch_first else query.transpose(0, 1)  # [n, T, E]
    qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    if packed is not None:
        qkv = add(f"{name}.in_proj", packed, (x,), qkv)
    q, k, v = qkv.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, T, E / heads] each
    out = layer.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return out if layer.batch_first else out.transpose(0, 1), None


def attach(model: nn.Module, add: Add, wanted: Callable[[str, nn.Module], bool]) -> Callable[[], None]:
    """Call `add` after each wanted layer, also the projections within attention, named NAME.in_proj; what is returned takes it back."""
    hooks = [m.register_forward_hook(partial(add, name), prepend=True) for name, m in model.named_modules() if wanted(name, m)]
    attentions = [(name, m) for name, m in model.named_modules() if type(m) is nn.MultiheadAttention and "forward" not in vars(m)]
    for name, attention in attentions:
        packed = nn.Linear(1, 1, bias=False, device="meta")
        packed.weight, packed.bias = attention.in_proj_weight, attention.in_proj_bias
        seen = packed if attention._qkv_same_embed_dim and wanted(f"{name}.in_proj", packed) else None
        attention.forward = partial(attend, add, name, attention, seen)  # type: ignore[method-assign]

    def undo() -> None:
        for h in hooks:
            h.remove()
        for _, attention in attentions:
            del attention.forward

    return undo


def how(images: Tensor, dtype: torch.dtype | None) -> tuple[Any, ...]:
    """What a pass depends on besides the model: number formats, device, the shape of an image."""
    kind = images.device.type
    return dtype, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), images.shape[1:], images.dtype, images.device


@contextmanager
def recording(model: nn.Module, wanted: Callable[[nn.Module], bool], backend: str = "auto") -> Iterator[Record]:
    """The calls of wanted layers within."""
    record = Record(backend)
    undo = attach(model, record.add, lambda name, layer: wanted(layer))
    try:
        yield record
    finally:
        undo()


@dataclass(frozen=True)
class Look:
    """What one forward of a single sample shows."""

    shapes: Mapping[str, set[torch.Size]]  # of the layers whose inputs' first dimension counts samples: their further dimensions
    held: int  # bytes of all layer outputs of a sample
    copies: dict[str, tuple[int, ...]]  # parameter of no recorded layer -> the shape of one sample's copy, where copies [n, ...] do as well

    def batch(self, memory: int) -> int:
        """Samples at once: their activations and the gradients of those within `memory` bytes."""
        return max(1, min(256, memory // (3 * self.held + 1)))


_looks: weakref.WeakKeyDictionary[nn.Module, dict[Any, Look]] = weakref.WeakKeyDictionary()


def look(model: nn.Module, images: Tensor, dtype: torch.dtype | None, copies: bool = False) -> Look:
    """From a forward of the first sample; done once for a model and shape of images. `copies`: try them for the bare parameters too."""
    key = how(images, dtype), copies, tuple(map(id, model.modules())), tuple(p.requires_grad for p in model.parameters())
    known = _looks.setdefault(model, {})
    if key not in known and len(images):
        known[key] = _first_look(model, images[:1].detach(), dtype, copies)
    return known.get(key) or Look({}, 0, {})


def _first_look(model: nn.Module, image: Tensor, dtype: torch.dtype | None, copies: bool) -> Look:
    with recording(model, has_rule) as record, torch.no_grad():
        run(model, image.clone(), dtype)
    shapes: dict[str, set[torch.Size]] = {}
    for c in record.calls:
        if c.x is not None and len(c.x) == 1:
            shapes.setdefault(c.name, set()).add(c.x.shape[1:])
    covered = {id(p) for c in record.calls for p in c.layer.parameters(recurse=False)}
    bare = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered}
    found = _copies(model, image, bare) if copies else {}
    held = sum(c.out.nbytes for c in record.calls if c.out is not None) + sum(bare[name].nbytes for name in found)
    return Look(shapes, held, found)


def _copies(model: nn.Module, image: Tensor, bare: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Which bare parameters may be given once a sample (class tokens, position tables, layer scales): tried with two, shape by shape."""
    found: dict[str, tuple[int, ...]] = {}
    for shape in dict.fromkeys(p.shape for p in bare.values()):
        alike = {name: p for name, p in bare.items() if p.shape == shape}
        forms = [(*[1] * ones, *shape) for ones in range(3)] if shape[:1] != (1,) else [tuple(shape[1:])]
        fits = next((form for form in forms if _apart(model, image, alike, form)), None)
        if fits is not None:
            found |= dict.fromkeys(alike, fits)
    return found


def spread(p: Tensor, form: tuple[int, ...], n: int) -> Tensor:
    """`n` equal copies [n, *form] of a parameter, a leaf of the graph."""
    return p.detach().reshape(form).expand(n, *form).requires_grad_()


def _apart(model: nn.Module, image: Tensor, params: Mapping[str, Tensor], form: tuple[int, ...]) -> bool:
    """Whether for two samples the gradients of copies [2, *form] of `params` are those that each sample's logits have in the parameters.

    Compared are the gradients and not the logits alone: code that changes a part of a parameter finds another part in a copy.
    """
    x = torch.cat([image, image.flip(-1)])
    copies = {name: spread(p, form, 2) for name, p in params.items()}
    with torch.enable_grad():
        logits = run(model, x.clone(), torch.float32)
        if not isinstance(logits, Tensor) or not logits.requires_grad:
            return False
        try:
            same = run(model, x.clone(), torch.float32, copies)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):  # of the model: the copies do not fit
            return False
        if same.shape != logits.shape or not same.requires_grad:
            return False
        for i in range(2):
            expected = torch.autograd.grad(logits[i].square().sum(), [*params.values()], retain_graph=True, allow_unused=True)
            found = torch.autograd.grad(same[i].square().sum(), [*copies.values()], retain_graph=True, allow_unused=True)
            if not all(_is_alone(f, e, i) for f, e in zip(found, expected, strict=True)):
                return False
    return True


def _is_alone(found: Tensor | None, expected: Tensor | None, i: int) -> bool:
    """Whether the gradient of two copies is the expected one in copy `i` and nothing in the other; both unused are alike too."""
    if found is None or expected is None:
        return found is expected
    difference = (found[i].reshape(expected.shape) - expected).double().norm()
    close = difference <= (1e-3 if expected.dtype.itemsize > 2 else 0.05) * expected.double().norm()
    return bool(close and expected.any() and not found[1 - i].any())
