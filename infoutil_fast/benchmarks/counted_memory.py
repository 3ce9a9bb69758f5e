"""Memory of trajectory matching counted tensor by tensor, by running the same code on a few images and scaling what grows with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from infoutil_fast.benchmarks.entrants import ENTRANTS, MATCHING
from infoutil_fast.models import nets
from infoutil_fast.synthesis.gradients import Inner, Matched, Segment, recursion, unroll
from infoutil_fast.synthesis.synthetic import Learning, Synthetic
from infoutil_fast.synthesis.trajectory_matching import Matching, draw_steps, sgd_of, step_along
from infoutil_fast.types import InputError, Windows, one_of

GRADIENTS: dict[str, Callable[..., Matched]] = {
    name: partial(recursion, **ENTRANTS[name].options) if ENTRANTS[name].method == "tesla" else unroll for name in MATCHING
}
AUGMENT = "color"  # one group, so that runs with other numbers of images make the same operations


class Live(TorchDispatchMode):
    """Bytes of the tensors alive, after each operation inside. A kernel's own scratch memory is not seen."""

    def __init__(self, *alive: Tensor) -> None:
        super().__init__()
        self.now, self.line = 0, [0]
        self._known = WeakIdKeyDictionary()
        for tensor in alive:
            self._hold(tensor)
        self.line = [self.now]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        self.line.append(self.now)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = size = storage.nbytes()
            self.now += size
            weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Problem:
    """An iteration of trajectory matching at some scale."""

    net: str = "convnet4-in"  # batch norms are replaced by instance norms: a trajectory has no running statistics
    size: int = 64  # side of the images, pixels
    classes: int = 1000  # outputs of the net
    images: int = 1000  # synthetic images in all
    batch: int = 100  # of them in a step of the student
    steps: int = 10  # of the student
    method: str = "tesla exact"  # tesla exact, tesla first-order, mtt

    def __post_init__(self) -> None:
        one_of("method", self.method, tuple(GRADIENTS))
        if not 1 <= self.batch <= self.images or self.steps < 1:
            raise InputError(f"needed is 1 <= batch <= images and steps of 1 or more, not {self.batch}, {self.images}, {self.steps}")


def peak(problem: Problem, small: tuple[int, int] = (2, 3)) -> dict[str, Any]:
    """Peak bytes of an iteration, counted with `small` images and scaled to `problem.batch`; nothing of that size is allocated.

    After each operation the bytes alive are a + b n in the n images of a step, so two counts give them for any n; the peak is the
    largest of these. Synthetic images that are in no step, with their gradient and momentum, are added. `parameters`: of one net.
    `stored`: the T + 1 parameter vectors of the student's path and the expert's target.
    """
    few, more = small
    low, high = (line(replace(problem, images=n, batch=n)) for n in small)
    if len(low) != len(high):
        raise InputError(f"{problem.net} makes {len(low)} operations on {few} images and {len(high)} on {more}: it cannot be scaled")
    slope = [(there - here) / (more - few) for here, there in zip(low, high, strict=True)]
    resting = 3 * 4 * 3 * problem.size**2 * (problem.images - problem.batch)  # pixels, gradient, momentum; float32
    whole = [here + grows * (problem.batch - few) for here, grows in zip(low, slope, strict=True)]
    at = max(range(len(whole)), key=whole.__getitem__)
    parameters = sum(_inner(problem).sizes) * 4
    return {
        "peak_bytes": round(whole[at]) + resting,
        "bytes_an_image": round(slope[at]),
        "parameters": parameters,
        "stored": (problem.steps + 2) * parameters,
        "operations": len(low),
    }


@lru_cache  # the same two counts serve every batch
def line(problem: Problem) -> list[int]:
    """Bytes of the tensors alive after each operation of two iterations, run on the CPU (the second has the momentum)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = _inner(problem)
        theta = torch.randn(sum(inner.sizes)) * 0.02
        images = torch.randn(problem.images, 3, problem.size, problem.size)
    cfg = Matching(syn_steps=problem.steps, batch_syn=problem.batch, augment=AUGMENT, lr_img=1e-3, lr_lr=1e-9)
    labels, nowhere = torch.arange(problem.images) % problem.classes, Windows.of([])
    segment, gradients = Segment(theta, theta * 1.01), GRADIENTS[problem.method]
    begin = Synthetic(images, labels, torch.tensor(1e-3), labels, nowhere, problem.classes)
    now = Learning(begin, lambda now: sgd_of(now, cfg))
    with Live(segment.start, segment.target, now.images, now.labels, now.lr) as live:
        for iteration in range(2):
            steps = draw_steps(problem.images, cfg, Generator().manual_seed(iteration))
            step_along(now, gradients(inner, segment, now.images, now.labels, now.lr, steps))
    return live.line


def _inner(problem: Problem) -> Inner:
    """The net as a function, without memory of its own, its batch norms replaced by instance norms."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        net = nets.build(problem.net, problem.classes, problem.size)
        for module in list(net.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(child.num_features, child.num_features))
        return Inner(net)
