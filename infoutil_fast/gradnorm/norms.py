"""Per-sample gradient norms of any classifier from one forward and one backward, without forming weight gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from infoutil_fast.gradnorm.checked import check_logits
from infoutil_fast.gradnorm.compiled import in_one_graph
from infoutil_fast.gradnorm.first_look import Look, look
from infoutil_fast.gradnorm.hooks import run
from infoutil_fast.gradnorm.losses import Loss, check_targets, loss_gradients, taken
from infoutil_fast.gradnorm.one_pass import Batch, Squares, all_layers, last_layer
from infoutil_fast.runtime.device import evaluating
from infoutil_fast.runtime.statistics import keeps_apart
from infoutil_fast.types import InputError

MEMORY = 1 << 29  # bytes: activations of one batch and their gradients


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
    compile: bool = False,  # noqa: A002 - as torch calls it
) -> Any:
    """L2 norm of each sample's loss gradient over all parameters that require one, the model in eval mode: float32 [N].

    `images` [N, C, H, W] normalised, `targets` [N] int64. `loss(logits [n, C] float64, targets [n]) -> [n]` must keep samples apart;
    default cross-entropy. With a loss, targets may be anything [N, ...] (several labels an image, soft labels) and logits [N, ...]; weights
    and targets in other formats are taken in float64. `layers="last"` is forward only: the last linear layer, ||p - y||^2 (||h||^2 + 1).
    `per_layer` also returns a dict from layer (or parameter) name to squared norms, float64 [N].
    `dtype` bfloat16 or float16 runs the model under autocast, float32 without it; by default as the caller has it.
    `backend` is that of the ops: "auto", "torch", "triton" (CUDA) or "cpp" (CPU). `max_memory` bounds a batch's activations and their
    gradients, in bytes (512 MiB); with the same bound the same input gives the same bits.
    `compile` makes forward and backward one graph of `torch.compile`, half a minute once for a model and any number of images; what cannot
    be compiled, or then gives other norms for the first batch, goes on without, with a message.
    Parameters that no rule covers (of shared or reused layers, of masked attention) go through `torch.func`; this is logged. Once a model
    and graph, a few real samples are done by plain autograd one by one: what they refute (a forward or a hook of one's own, rows that are
    no samples) goes that way too.
    Raises `InputError` for targets out of range, logits that are NaN or not [N, C], and layers that mix samples.
    Source: Goodfellow 2015 (arXiv:1510.01799), ghost norms (arXiv:2110.05679, 2205.10683).
    """
    if layers not in ("all", "last"):
        raise InputError(f"layers={layers!r} is not known; possible: 'all', 'last'")
    with ready(model, images, targets, dtype, max_memory, loss):
        seen = look(model, images, dtype, copies=layers == "all")
        step: Callable[[Batch], Squares] = last_layer
        if layers == "all":
            step = partial(in_one_graph if compile else all_layers, seen=seen, backend=backend)
        squares = scan(lambda *rows: step(Batch(model, loss, dtype, *rows)), images, targets, loss, seen, max_memory)
    norms = sum(squares.values(), images.new_zeros(len(images), dtype=torch.float64)).sqrt().float()
    return (norms, squares) if per_layer else norms


def el2n(model: nn.Module, images: Tensor, targets: Tensor, *, dtype: torch.dtype | None = None, max_memory: int | None = None) -> Tensor:
    """EL2N, ||softmax(logits) - onehot||_2 taken in float64 (Paul et al. 2021, arXiv:2107.07075): float32 [N].

    Arguments and errors as `grad_norms`.
    """

    def squares(x: Tensor, y: Tensor, start: int) -> Squares:
        batch = Batch(model, None, dtype, x, y, start)
        logits = run(model, x.clone(), dtype)
        g = loss_gradients(logits, y, None, start)
        check_logits(batch.alone(logits), batch.trust())
        return {"": g.square().sum(1)}

    with ready(model, images, targets, dtype, max_memory, None), torch.no_grad():
        found = scan(squares, images, targets, None, look(model, images, dtype), max_memory)
    return found[""].sqrt().float() if found else images.new_zeros(0, dtype=torch.float32)


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
def ready(
    model: nn.Module, images: Tensor, targets: Tensor, dtype: torch.dtype | None, max_memory: int | None, loss: Loss | None
) -> Iterator[None]:
    """Check what can be checked before a forward; eval mode and autograd on within."""
    check_targets(images, targets, loss)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype {dtype} is not possible: float32, bfloat16, float16 or None for the model as it is")
    if max_memory is not None and max_memory < 1:
        raise InputError(f"max_memory={max_memory} is not possible: at least 1 byte")
    keeps_apart(model)
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        try:
            yield
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise InputError(
                "a checkpoint with use_reentrant=True in the model gives no gradient by itself: use_reentrant=False"
            ) from error


def scan(
    step: Callable[[Tensor, Tensor, int], Squares], images: Tensor, targets: Tensor, loss: Loss | None, seen: Look, max_memory: int | None
) -> Squares:
    """Squared norms of all images, batch by batch within the memory."""
    squares: Squares = {}
    batch = max(seen.rows, seen.batch(max_memory or MEMORY))
    batch = -(-len(images) // max(1, -(-len(images) // batch)))  # as many batches, of one size
    for start in range(0, len(images), max(1, batch)):
        rows = slice(start, start + batch)
        x, y = images[rows].detach().clone(), taken(targets[rows], images.device, loss)
        if len(x) < seen.rows:  # a lone sample that would lose its dimension
            x, y = (torch.cat([t, t]) for t in (x, y))
        for name, square in step(x, y, start).items():
            squares.setdefault(name, square.new_zeros(len(images)))[rows] = square[: len(images[rows])]
    return squares
