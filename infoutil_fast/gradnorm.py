"""Per-sample gradient norms of any classifier from one forward and one backward, without forming weight gradients."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, grad, vmap

from infoutil_fast.device import evaluating
from infoutil_fast.types import InputError

Loss = Callable[[Tensor, Tensor], Tensor]
Squares = dict[str, Tensor]  # layer or parameter name -> squared norms [n] float64

LAYER_FLOATS = 1 << 22  # work space of one layer: 16 MiB of float32
BATCH_BYTES = 1 << 29  # activations of one batch and their gradients
log = logging.getLogger(__name__)


def grad_norms(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    loss: Loss | None = None,
    layers: str = "all",
    per_layer: bool = False,
    max_batch: int | None = None,
) -> Any:
    """L2 norm of each sample's loss gradient over all parameters that require one, the model in eval mode: float32 [N].

    `images` [N, C, H, W] normalised, `targets` [N] int64. `loss(logits [n, C] float64, targets [n]) -> [n]` must keep samples apart;
    default cross-entropy. `layers="last"` is forward only: the last linear layer, ||p - y||^2 (||h||^2 + 1).
    `per_layer` also returns a dict from layer (or parameter) name to squared norms, float64 [N].
    Parameters that no rule covers (bare ones, packed attention, shared or reused layers) go through `torch.func`; this is logged.
    Raises `InputError` for targets out of range, logits that are NaN or not [N, C], and layers that mix samples.
    Source: Goodfellow 2015 (arXiv:1510.01799), ghost norms (arXiv:2110.05679, 2205.10683).
    """
    if layers not in ("all", "last"):
        raise InputError(f"layers={layers!r} is not known; possible: 'all', 'last'")
    with _ready(model, images, targets, max_batch):
        if layers == "all":
            alone, batch = _probe(model, images[:1])
            squares = _scan(partial(_all_layers, model, loss, alone), images, targets, max_batch or batch)
        else:
            squares = _scan(partial(_last_layer, model, loss), images, targets, max_batch or 128)
    norms = sum(squares.values(), images.new_zeros(len(images), dtype=torch.float64)).sqrt().float()
    return (norms, squares) if per_layer else norms


def el2n(model: nn.Module, images: Tensor, targets: Tensor, *, max_batch: int | None = None) -> Tensor:
    """EL2N, ||softmax(logits) - onehot||_2 taken in float64 (Paul et al. 2021, arXiv:2107.07075): float32 [N]. Errors as `grad_norms`."""
    with _ready(model, images, targets, max_batch), torch.no_grad():
        squares = _scan(lambda x, y, i: {"": _logit_grad(model(x), y, None, i).square().sum(1)}, images, targets, max_batch or 128)
    return squares[""].sqrt().float() if squares else images.new_zeros(0, dtype=torch.float32)


@contextmanager
def _ready(model: nn.Module, images: Tensor, targets: Tensor, max_batch: int | None) -> Iterator[None]:
    """Check what can be checked before a forward; eval mode and autograd on within."""
    if targets.shape != images.shape[:1] or targets.is_floating_point():
        raise InputError(f"{len(images)} images need {len(images)} integer targets, not {targets.dtype} {list(targets.shape)}")
    if max_batch is not None and max_batch < 1:
        raise InputError(f"max_batch={max_batch} is not possible: at least 1")
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None:
            raise InputError(f"batch norm {name!r} has no running statistics, so it mixes samples: no gradient per sample exists")
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        yield


def _scan(step: Callable[[Tensor, Tensor, int], Squares], images: Tensor, targets: Tensor, batch: int) -> Squares:
    squares: Squares = {}
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        y = targets[rows].to(images.device, torch.int64, copy=True)
        for name, square in step(images[rows].detach().clone(), y, start).items():
            squares.setdefault(name, square.new_zeros(len(images)))[rows] = square
    return squares


def _logit_grad(logits: Tensor, targets: Tensor, loss: Loss | None, start: int) -> Tensor:
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


class _Call(NamedTuple):
    name: str
    layer: Any
    x: Tensor
    version: int  # of x, which may be changed in place later
    out: Any  # GradientEdge of the output as it was before any change in place; without autograd the output


@contextmanager
def _recording(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def hook(name: str, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if out._is_view():  # a change in place would cut the view out of the graph
            out = out.clone()
        if args:
            calls.append(_Call(name, layer, args[0].detach(), args[0]._version, get_gradient_edge(out) if out.requires_grad else out))
        return out

    hooks = [m.register_forward_hook(partial(hook, name), prepend=True) for name, m in model.named_modules() if wanted(m)]
    try:
        yield calls
    finally:
        for h in hooks:
            h.remove()


def _ruled(m: nn.Module) -> bool:
    plain = getattr(m, "max_norm", None) is None and not getattr(m, "scale_grad_by_freq", False)  # an embedding's options
    return plain and type(m) in RULES and any(p.requires_grad for p in m.parameters(recurse=False))


def _probe(model: nn.Module, image: Tensor) -> tuple[set[str], int]:
    """From a forward of one sample: the layers whose inputs' first dimension counts samples, and how many samples to take at once."""
    with _recording(model, _ruled) as calls, torch.no_grad():
        if len(image):
            model(image.detach().clone())
    return {c.name for c in calls if len(c.x) == 1}, max(1, min(256, BATCH_BYTES // (3 * sum(c.out.nbytes for c in calls) + 1)))


def _last_layer(model: nn.Module, loss: Loss | None, x: Tensor, y: Tensor, start: int) -> Squares:
    with _recording(model, lambda m: isinstance(m, nn.Linear)) as calls, torch.no_grad():
        logits = model(x)
    g = _logit_grad(logits, y, loss, start)
    if not calls or calls[-1].x.ndim != 2 or not torch.equal(calls[-1].out, logits):
        raise InputError("layers='last' needs a model that ends in a linear layer; layers='all' takes any model")
    last = calls[-1]
    return {last.name: g.square().sum(1) * (last.x.double().square().sum(1) + (last.layer.bias is not None))}


def _all_layers(model: nn.Module, loss: Loss | None, alone: set[str], x: Tensor, y: Tensor, start: int) -> Squares:
    with _recording(model, _ruled) as calls:
        logits = model(x.clone())
    g = _logit_grad(logits, y, loss, start)
    if not logits.requires_grad:
        raise InputError("the logits carry no gradient: the forward runs without autograd, or uses no parameter that requires one")
    size = g.abs().amax(1)  # [n]; the backward runs on g / size, so that no sample underflows
    unit = (g / size.clamp(min=torch.finfo(g.dtype).tiny)[:, None]).to(logits.dtype)
    calls = [c for c in calls if c.name in alone and isinstance(c.out, GradientEdge) and len(c.x) == len(x) and c.x._version == c.version]
    grads = torch.autograd.grad(logits, [c.out for c in calls], unit, allow_unused=True) if calls else ()
    uses, squares = _uses(logits, calls), {}
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for call, out_grad in zip(calls, grads, strict=True):
            own = {k: p for k, p in call.layer.named_parameters(recurse=False) if uses[p] == 2}
            own = own if out_grad is not None and own.keys() <= {"weight", "bias"} else {}
            if own:
                squares[call.name] = _layer(call, out_grad, own)
            left = {name: p for name, p in left.items() if all(p is not q for q in own.values())}
    if left:
        log.info("gradient norms of %s by torch.func: no rule for these parameters", ", ".join(left))
        squares |= _by_sample(model, x, unit, left)
    return {name: s.double() * size.square() for name, s in squares.items()}


def _uses(logits: Tensor, calls: list[_Call]) -> Counter[Tensor]:
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


def _by_sample(model: nn.Module, x: Tensor, unit: Tensor, params: dict[str, nn.Parameter]) -> Squares:
    """Squared norms [n] of `params` from whole gradients, vmapped over as many samples as fit, or one by one."""

    def squares(image: Tensor, g: Tensor) -> Squares:
        at = {name: p.detach() for name, p in params.items()}
        grads = grad(lambda values: (functional_call(model, values, (image[None].clone(),))[0] * g).sum())(at)
        return {name: v.double().square().sum() for name, v in grads.items()}

    rows = max(1, 8 * LAYER_FLOATS // sum(p.numel() for p in params.values()))
    try:
        with torch.no_grad():
            return vmap(squares, chunk_size=rows)(x, unit)
    except RuntimeError as error:
        log.info("the model cannot be vmapped (%s): one sample at a time", str(error).strip().partition("\n")[0])
    result = {name: unit.new_zeros(len(x), dtype=torch.float64) for name in params}
    for i in range(len(x)):
        logits = model(x[i : i + 1].clone())
        for name, v in zip(params, torch.autograd.grad(logits, [*params.values()], unit[i : i + 1], materialize_grads=True), strict=True):
            result[name][i] = v.double().square().sum()
    return result


def _layer(call: _Call, g: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Squared norms [n] of one call over its parameters `own`, in float32 at least, a few samples at a time."""
    rows, parts = max(1, LAYER_FLOATS // (call.x[0].numel() + g[0].numel() + _work(call.layer, g[0].numel()))), []
    for pair in zip(call.x.split(rows), g.split(rows), strict=True):
        x_part, g_part = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in pair)
        weight = RULES[type(call.layer)](call.layer, x_part, g_part) if "weight" in own else 0
        parts.append(g_part.new_zeros(len(g_part)) + weight + (_summed(call.layer, g_part) if "bias" in own else 0))
    return torch.cat(parts)


def _direct(t: int, k: int, o: int) -> bool:
    """Whether ||U'G||^2 takes fewer multiplications than sum(UU' * GG'), for U [T, K] and G [T, O]."""
    return k * o <= t * (k + o)


def _work(layer: Any, size: int) -> int:
    """Floats that a rule needs for one sample whose output gradient has `size`, by the same choice."""
    if isinstance(layer, nn.Embedding):
        return (size // layer.embedding_dim) ** 2
    groups = getattr(layer, "groups", 1)
    t, k, o = size // layer.weight.shape[0], layer.weight[0].numel(), layer.weight.shape[0] // groups
    return groups * (t * k + (k * o if _direct(t, k, o) else 2 * t * t))


def _product(u: Tensor, g: Tensor) -> Tensor:
    """||sum_t u_t g_t'||^2 [n] from u [n, T, K] and g [n, T, O]."""
    if _direct(u.shape[1], u.shape[2], g.shape[2]):
        return (g.mT @ u).square().sum((1, 2))
    return ((u @ u.mT) * (g @ g.mT)).sum((1, 2)).clamp(min=0)


def _summed(layer: Any, g: Tensor) -> Tensor:
    """||sum_t g_t||^2 [n]: the bias rule, g [n, ..., O] for linear and layer norm, [n, O, ...] for the others."""
    if isinstance(layer, nn.Linear | nn.LayerNorm):
        inner = 1 if isinstance(layer, nn.Linear) else len(layer.normalized_shape)
        return g.reshape(len(g), -1, g.shape[-inner:].numel()).sum(1).square().sum(1)
    return (g.sum(tuple(range(2, g.ndim))) if g.ndim > 2 else g).square().sum(1)


def _conv(layer: Any, x: Tensor, g: Tensor) -> Tensor:
    if any(layer._reversed_padding_repeated_twice):
        x = F.pad(x, layer._reversed_padding_repeated_twice, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    x, g = x.movedim(1, -1).contiguous(), g.movedim(1, -1)  # [n, *in, C], [n, *out, O]
    n, groups, c = len(x), layer.groups, x.shape[-1] // layer.groups
    steps, taps = ([s * d for s, d in zip(x.stride()[1:-1], by, strict=True)] for by in (layer.stride, layer.dilation))
    u = x.as_strided((n, groups, *g.shape[1:-1], *layer.kernel_size, c), (x.stride(0), c, *steps, *taps, 1))
    u = u.reshape(n * groups, g[0, ..., 0].numel(), -1)  # [n * groups, T, K]
    g = g.reshape(n, -1, groups, g.shape[-1] // groups).transpose(1, 2).flatten(0, 1)
    return _product(u, g).reshape(n, groups).sum(1)


def _running_norm(layer: Any, x: Tensor, g: Tensor) -> Tensor:
    if layer.running_mean is None:
        return _summed(layer, F.instance_norm(x, eps=layer.eps) * g)
    return _summed(layer, F.batch_norm(x, layer.running_mean.to(x.dtype), layer.running_var.to(x.dtype), eps=layer.eps) * g)


def _embedding(layer: nn.Embedding, x: Tensor, g: Tensor) -> Tensor:
    x, g = x.reshape(len(x), -1), g.reshape(len(g), -1, g.shape[-1])  # [n, T], [n, T, O]
    same = (x[:, :, None] == x[:, None]) & (x != (-1 if layer.padding_idx is None else layer.padding_idx))[:, None]
    return (same * (g @ g.mT)).sum((1, 2)).clamp(min=0)


RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {  # squared norms [n] of the weight's gradient
    nn.Linear: lambda m, x, g: _product(x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d), _running_norm),
    nn.GroupNorm: lambda m, x, g: _summed(m, F.group_norm(x, m.num_groups, eps=m.eps) * g),
    nn.LayerNorm: lambda m, x, g: _summed(m, F.layer_norm(x, m.normalized_shape, eps=m.eps) * g),
    nn.Embedding: _embedding,
}
