"""What PatchShapley is measured against: Captum's KernelShap, and the batched loop that one writes by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import KernelShap
from record import time_call
from torch import Tensor, nn

from infoutil_fast.shapley import tracing
from infoutil_fast.types import Coalitions

GRID = 4
Maps = Callable[[], Tensor]  # [N, GRID, GRID]


def captum(model: nn.Module, images: Tensor, targets: Tensor, evaluations: int, at_once: int) -> Tensor:
    """Maps [N, GRID, GRID] by KernelShap in float32, an image a call as Captum advises, `at_once` evaluations a forward."""
    h, w = images.shape[2:]
    row, col = (torch.arange(n, device=images.device) * GRID // n for n in (h, w))
    patches = (row[:, None] * GRID + col)[None, None]  # [1, 1, H, W]
    method = KernelShap(model)
    maps = [
        method.attribute(
            image[None], baselines=0, target=target, feature_mask=patches, n_samples=evaluations, perturbations_per_eval=at_once
        )
        for image, target in zip(images, targets.tolist(), strict=True)
    ]
    return torch.cat(maps)[:, 0, :: h // GRID, :: w // GRID]


def loop(
    net: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, coalitions: Coalitions, dtype: torch.dtype, batch: int
) -> Tensor:
    """Maps [N, GRID, GRID]: masks upsampled, multiplied with the images, `batch` forwards at once, read out in float64."""
    B, C, H, W = images.shape
    M = len(coalitions.masks)
    masks = F.interpolate(coalitions.masks.view(M, 1, GRID, GRID).to(dtype), (H, W))  # [M, 1, H, W], nearest
    values = []
    with torch.inference_mode():
        for some, classes in zip(images.to(dtype).split(max(1, batch // M)), targets.split(max(1, batch // M)), strict=True):
            logits = []
            for part in masks.split(min(batch, M)):
                shown = (some[:, None] * part).view(-1, C, H, W).contiguous(memory_format=torch.channels_last)
                logits.append(net(shown).double().unflatten(0, (len(some), -1)))
            z = torch.cat(logits, 1)  # [b, M, K]
            values.append(z.gather(2, classes[:, None, None].expand(-1, M, 1))[..., 0])
        return (torch.cat(values) @ coalitions.solve.T).view(B, GRID, GRID)


def loops(
    model: nn.Module, images: Tensor, targets: Tensor, coalitions: Coalitions, dtype: torch.dtype, batches: Iterable[int], compiled: bool
) -> dict[int, Maps]:
    """The loop by batch; compiled, each with a net of its own for its one shape. Batches that these images cannot fill are left out."""
    fit = [batch for batch in batches if batch <= len(images) * len(coalitions.masks)]
    found: dict[int, Maps] = {}
    options: dict[str, Any] = {"mode": "max-autotune"} if images.is_cuda else {"options": {"freezing": True}}
    for batch in fit:
        net: Any = copy.deepcopy(model).to(dtype)
        if compiled:
            net = torch.compile(net, dynamic=False, **options)
        found[batch] = partial(loop, net, images, targets, coalitions, dtype, batch)
    return found


def quickest(calls: dict[int, Maps], device: str, compiled: bool = False) -> tuple[int, Maps]:
    """The fastest: by the best of three calls where that is soon done, else by one. A first call that compiles does not count."""
    took = {}
    for key, call in calls.items():
        if compiled:
            call()
        first = time_call(call, device)[0]
        took[key] = min(first, *(time_call(call, device)[0] for _ in range(2))) if first < 2 else first
    best = min(took, key=lambda key: took[key])
    print("at their best:", {key: f"{seconds * 1e3:.0f} ms" for key, seconds in took.items()})
    return best, calls[best]


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Of one forward of an image [1, C, H, W]: convolutions and linear layers."""
    graph = tracing.traced(model)
    assert not isinstance(graph, str), graph
    tracing.measure(graph, image)
    return sum(tracing.multiply_adds(graph, node) for node in graph.graph.nodes)
