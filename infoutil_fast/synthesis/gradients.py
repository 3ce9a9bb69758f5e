"""Gradients of trajectory matching: the full unroll (MTT), and the same at one inner graph's memory (TESLA, exact or first-order)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from infoutil_fast.pixels import dsa
from infoutil_fast.types import InputError, one_of

MODES = ("exact", "first_order")


class Inner:
    """A net as a function of one flat vector of parameters, in the order of `net.named_parameters()`."""

    def __init__(self, net: nn.Module):
        if any(True for _ in net.buffers()):
            raise InputError("a trajectory holds parameters only, no running statistics: take a net without batch norm (convnet3-in)")
        self.net = net
        self.shapes = {name: p.shape for name, p in net.named_parameters()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]

    def logits(self, theta: Tensor, x: Tensor) -> Tensor:
        """Logits [b, C] of float images under the parameters `theta` [P]."""
        parts = theta.split(self.sizes)  # one node: its backward is one concatenation
        named = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        return functional_call(self.net, named, (x,))

    def loss(self, theta: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy; labels int64 [b], or logits [b, C] whose softmax is the target."""
        return F.cross_entropy(self.logits(theta, x), labels.softmax(1) if labels.is_floating_point() else labels)


@dataclass(frozen=True)
class Step:
    """Which synthetic images a step of the student takes, and how they are augmented."""

    index: Tensor  # [b] int64
    augmentation: dsa.Draw | None = None


@dataclass(frozen=True)
class Segment:
    """The stretch of an expert's path to be matched."""

    start: Tensor  # [P], where the student starts
    target: Tensor  # [P], where it should arrive

    def scale(self) -> Tensor:
        """The squared distance that the loss is divided by. Raises `InputError` where the expert did not move."""
        distance = (self.start - self.target).square().sum()
        if not distance > 0:
            raise InputError("start and target of the expert are the same (or not finite): its path is at rest or has diverged")
        return distance


@dataclass(frozen=True)
class Matched:
    """The matching loss and its gradients."""

    loss: float  # |theta_T - target|^2 / |start - target|^2
    images: Tensor  # like the images
    labels: Tensor | None  # like the labels; None where they are class numbers
    lr: Tensor  # []


def unroll(inner: Inner, segment: Segment, images: Tensor, labels: Tensor, lr: Tensor, steps: Sequence[Step]) -> Matched:
    """Back-propagation through all T steps, T graphs alive at once (MTT, arXiv:2203.11932, algorithm 1).

    images [n, C, H, W] and lr [] float; labels int64 [n] or logits [n, classes].
    """
    images, lr = (leaf.detach().requires_grad_() for leaf in (images, lr))
    soft = labels.is_floating_point()
    labels = labels.detach().requires_grad_(soft)
    theta = segment.start.detach().requires_grad_()
    for step in steps:
        x = dsa.apply(images[step.index], step.augmentation)
        (slope,) = torch.autograd.grad(inner.loss(theta, x, labels[step.index]), theta, create_graph=True)
        theta = theta - lr * slope
    loss = (theta - segment.target).square().sum() / segment.scale()
    found = torch.autograd.grad(loss, [images, lr, *([labels] if soft else [])])
    return Matched(float(loss.detach()), found[0], found[2] if soft else None, found[1])


def recursion(
    inner: Inner,
    segment: Segment,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: Sequence[Step],
    mode: str = "exact",
    halve: bool = False,
) -> Matched:
    """The same loss with one inner graph alive at a time: only T + 1 parameter vectors grow with the steps.

    With g_i the student's gradient at step i and v_T = 2 (theta_T - target) / |start - target|^2, backwards from the last step, the
    scalar s_i = v_{i+1}' g_i is differentiated once: dL/dx_i = -lr ds_i/dx_i (labels alike), dL/dlr -= s_i and
    v_i = v_{i+1} - lr ds_i/dtheta_i, the adjoint of the step. mode "exact" does that and equals `unroll`; "first_order" keeps
    v_i = v_T, as TESLA (arXiv:2211.10586, equations 7 to 9) publishes. halve: image gradients times one half, as the public code has them.
    """
    one_of("mode", mode, MODES)
    path = _forward(inner, segment.start.detach(), images, labels, lr.detach(), steps)
    rate, scale, soft = float(lr.detach()), segment.scale(), labels.is_floating_point()
    miss = path[-1] - segment.target
    v = 2 * miss / scale
    of_images, of_lr = torch.zeros_like(images), torch.zeros_like(lr)
    of_labels = torch.zeros_like(labels) if soft else None
    for step, theta in zip(reversed(steps), reversed(path[:-1]), strict=True):
        theta = theta.requires_grad_()
        index = step.index.to(images.device)
        x, y = images[index].detach().requires_grad_(), labels[index].detach().requires_grad_(soft)
        loss = inner.loss(theta, dsa.apply(x, step.augmentation), y)
        (slope,) = torch.autograd.grad(loss, theta, create_graph=True)
        s = v @ slope
        del slope, loss
        found = torch.autograd.grad(s, [x, *([y] if soft else []), *([theta] if mode == "exact" else [])])
        of_images.index_add_(0, index, found[0], alpha=-rate)
        if of_labels is not None:
            of_labels.index_add_(0, index, found[1], alpha=-rate)
        of_lr -= s.detach()
        if mode == "exact":
            v = v - rate * found[-1]
    return Matched(float(miss.square().sum() / scale), of_images / 2 if halve else of_images, of_labels, of_lr)


def _forward(inner: Inner, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor, steps: Sequence[Step]) -> list[Tensor]:
    """theta_0 .. theta_T, each [P], detached."""
    path = [theta]
    for step in steps:
        theta = path[-1].detach().requires_grad_()
        x = dsa.apply(images[step.index].detach(), step.augmentation)
        (slope,) = torch.autograd.grad(inner.loss(theta, x, labels[step.index].detach()), theta)
        path.append(theta.detach() - lr * slope)
    return path
