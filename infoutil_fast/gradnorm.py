"""Per-sample gradient norms of any classifier from one forward and one backward, without forming weight gradients."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from infoutil_fast.device import evaluating
from infoutil_fast.gradcalls import Call, Look, look, recording, run, spread
from infoutil_fast.gradrules import TORCH_FLOATS, has_rule
from infoutil_fast.types import InputError

Loss = Callable[[Tensor, Tensor], Tensor]
Squares = dict[str, Tensor]  # layer or parameter name -> squared norms [n] float64

MEMORY = 1 << 29  # bytes: activations of one batch and their gradients
log = logging.getLogger(__name__)


def grad_norms(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    loss: Loss | None = None,
    layers: str = "all",
    per_layer: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    max_memory: int | None = None,
) -> Any:
    """L2 norm of each sample's loss gradient over all parameters that require one, the model in eval mode: float32 [N].

    `images` [N, C, H, W] normalised, `targets` [N] int64. `loss(logits [n, C] float64, targets [n]) -> [n]` must keep samples apart;
    default cross-entropy. `layers="last"` is forward only: the last linear layer, ||p - y||^2 (||h||^2 + 1).
    `per_layer` also returns a dict from layer (or parameter) name to squared norms, float64 [N].
    `dtype` bfloat16 or float16 runs the model under autocast, float32 without it; by default as the caller has it.
    `backend` is that of the ops: "auto", "torch", "triton" (CUDA) or "cpp" (CPU). `max_memory` bounds a batch's activations and their
    gradients, in bytes (512 MiB); with the same bound the same input gives the same bits.
    Parameters that no rule covers (bare ones, packed attention, shared or reused layers) go through `torch.func`; this is logged.
    Raises `InputError` for targets out of range, logits that are NaN or not [N, C], and layers that mix samples.
    Source: Goodfellow 2015 (arXiv:1510.01799), ghost norms (arXiv:2110.05679, 2205.10683).
    """
    if layers not in ("all", "last"):
        raise InputError(f"layers={layers!r} is not known; possible: 'all', 'last'")
    with ready(model, images, targets, dtype, max_memory):
        seen = look(model, images, dtype, copies=layers == "all")
        step = partial(_all_layers, seen=seen, backend=backend) if layers == "all" else _last_layer
        squares = scan(partial(step, model, loss, dtype), images, targets, seen.batch(max_memory or MEMORY))
    norms = sum(squares.values(), images.new_zeros(len(images), dtype=torch.float64)).sqrt().float()
    return (norms, squares) if per_layer else norms


def el2n(model: nn.Module, images: Tensor, targets: Tensor, *, dtype: torch.dtype | None = None, max_memory: int | None = None) -> Tensor:
    """EL2N, ||softmax(logits) - onehot||_2 taken in float64 (Paul et al. 2021, arXiv:2107.07075): float32 [N].

    Arguments and errors as `grad_norms`.
    """
    with ready(model, images, targets, dtype, max_memory), torch.no_grad():
        batch = look(model, images, dtype).batch(max_memory or MEMORY)
        squares = scan(lambda x, y, i: {"": loss_gradients(run(model, x, dtype), y, None, i).square().sum(1)}, images, targets, batch)
    return squares[""].sqrt().float() if squares else images.new_zeros(0, dtype=torch.float32)


def grand(models: Iterable[nn.Module], images: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """GraNd: the mean of `grad_norms` over several nets, early checkpoints of several runs (Paul et al. 2021): float32 [N].

    `models` may load them one at a time. Further arguments, and errors, as `grad_norms`; `InputError` without a net.
    """
    norms, count = torch.zeros(len(images), dtype=torch.float64, device=images.device), 0
    for model in models:
        norms += grad_norms(model, images, targets, **options)
        count += 1
    if not count:
        raise InputError("grand needs at least one net")
    return (norms / count).float()


@contextmanager
def ready(model: nn.Module, images: Tensor, targets: Tensor, dtype: torch.dtype | None, max_memory: int | None) -> Iterator[None]:
    """Check what can be checked before a forward; eval mode and autograd on within."""
    if targets.shape != images.shape[:1] or targets.is_floating_point():
        raise InputError(f"{len(images)} images need {len(images)} integer targets, not {targets.dtype} {list(targets.shape)}")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype {dtype} is not possible: float32, bfloat16, float16 or None for the model as it is")
    if max_memory is not None and max_memory < 1:
        raise InputError(f"max_memory={max_memory} is not possible: at least 1 byte")
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None:
            raise InputError(f"batch norm {name!r} has no running statistics, so it mixes samples: no gradient per sample exists")
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        yield


def scan(step: Callable[[Tensor, Tensor, int], Squares], images: Tensor, targets: Tensor, batch: int) -> Squares:
    squares: Squares = {}
    batch = -(-len(images) // max(1, -(-len(images) // batch)))  # as many batches, of one size
    for start in range(0, len(images), max(1, batch)):
        rows = slice(start, start + batch)
        y = targets[rows].to(images.device, torch.int64, copy=True)
        for name, square in step(images[rows].detach().clone(), y, start).items():
            squares.setdefault(name, square.new_zeros(len(images)))[rows] = square
    return squares


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


def _unrounded(logits: Tensor, calls: list[Call]) -> Tensor:
    """The logits in float32 where the last layer gave them in a narrow type: by that p - y loses more digits than by all before."""
    last = calls[-1] if calls and isinstance(logits, Tensor) and logits.dtype in (torch.bfloat16, torch.float16) else None
    if last is None or not isinstance(last.layer, nn.Linear) or last.x is None:
        return logits
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        weight, bias = last.layer.weight, last.layer.bias
        rounded = [t if t is None else t.to(logits.dtype) for t in (last.x, weight, bias)]
        if not torch.equal(F.linear(*rounded), logits):  # something follows the layer
            return logits
        return F.linear(rounded[0].float(), rounded[1].float(), None if bias is None else bias.float())


def _last_layer(model: nn.Module, loss: Loss | None, dtype: torch.dtype | None, x: Tensor, y: Tensor, start: int) -> Squares:
    with recording(model, lambda m: isinstance(m, nn.Linear)) as record, torch.no_grad():
        logits = run(model, x, dtype)
    calls = record.calls
    g = loss_gradients(_unrounded(logits, calls), y, loss, start)
    last = calls[-1] if calls else None
    if last is None or last.x is None or last.out is None or last.x.ndim != 2 or not torch.equal(last.out, logits):
        raise InputError("layers='last' needs a model that ends in a linear layer; layers='all' takes any model")
    return {last.name: g.square().sum(1) * (last.x.double().square().sum(1) + (last.layer.bias is not None))}


def _all_layers(
    model: nn.Module, loss: Loss | None, dtype: torch.dtype | None, x: Tensor, y: Tensor, start: int, *, seen: Look, backend: str
) -> Squares:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    copies = {name: spread(params[name], form, len(x)) for name, form in seen.copies.items()}
    with recording(model, has_rule, backend) as record:
        logits = run(model, x.clone(), dtype, copies)
    g = loss_gradients(_unrounded(logits, record.calls), y, loss, start)
    if not logits.requires_grad:
        raise InputError("the logits carry no gradient: the forward runs without autograd, or uses no parameter that requires one")
    size = g.abs().amax(1)  # [n]; the backward runs on g / size, so that no sample underflows
    unit = (g / size.clamp(min=torch.finfo(g.dtype).tiny)[:, None]).to(logits.dtype)
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
    squares = {name: _whole(g, len(x)) for name, g in zip(copies, found, strict=False) if g is not None}
    squares |= {c.name: c.square for c in record.calls if c.square is not None}
    covered = {id(p) for c in record.calls if c.square is not None for k, p in c.layer.named_parameters(recurse=False) if k in c.own}
    left = {name: p for name, p in params.items() if id(p) not in covered and name not in copies}
    if left:
        log.info("gradient norms of %s by torch.func: no rule for these parameters", ", ".join(left))
        squares |= _by_sample(model, dtype, x, unit, left)
    return {name: s.double() * size.square() for name, s in squares.items()}


def _whole(g: Tensor, n: int) -> Tensor:
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
        log.info("the model cannot be vmapped (%s): one sample at a time", str(error).strip().partition("\n")[0])
    result = {name: unit.new_zeros(len(x), dtype=torch.float64) for name in params}
    for i in range(len(x)):
        logits = run(model, x[i : i + 1].clone(), dtype)
        for name, v in zip(params, torch.autograd.grad(logits, [*params.values()], unit[i : i + 1], materialize_grads=True), strict=True):
            result[name][i] = v.double().square().sum()
    return result
