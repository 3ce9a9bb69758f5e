"""Losses that users give: each sample's gradient by plain autograd in float64, or a sentence that says what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infoutil_fast.gradnorm.norms import el2n, grad_norms
from infoutil_fast.influence import grad_dots
from infoutil_fast.types import InputError

N, CLASSES = 7, 4
WEIGHT = torch.tensor([0.1, 2.0, 3.0, 0.5])  # float32, as everybody has them


def net(outputs: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, outputs))


def labels() -> Tensor:
    return torch.randint(0, CLASSES, (N,))


def soft() -> Tensor:
    return torch.randn(N, CLASSES).softmax(1)


def flags() -> Tensor:
    return torch.rand(N, CLASSES) > 0.5


def binary(z: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, t.to(z.dtype), reduction="none")


def smooth_by_hand(z: Tensor, t: Tensor) -> Tensor:
    wanted = torch.full((CLASSES,), 0.1 / CLASSES).expand(len(t), -1).scatter_add(1, t[:, None], torch.full((len(t), 1), 0.9))
    return -(wanted * z.log_softmax(1)).sum(1)


LOSSES: dict[str, tuple[Callable[[], Any], Callable[[], Tensor], int]] = {  # loss, targets, logits
    "class weights": (lambda: nn.CrossEntropyLoss(weight=WEIGHT, reduction="none"), labels, CLASSES),
    "class weights in a function": (lambda: lambda z, t: F.cross_entropy(z, t, weight=WEIGHT, reduction="none"), labels, CLASSES),
    "weights by hand": (lambda: lambda z, t: F.cross_entropy(z, t, reduction="none") * WEIGHT[t], labels, CLASSES),
    "label smoothing": (lambda: nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none"), labels, CLASSES),
    "smoothing by hand": (lambda: smooth_by_hand, labels, CLASSES),
    "both": (lambda: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1, reduction="none"), labels, CLASSES),
    "ignored labels": (lambda: nn.CrossEntropyLoss(ignore_index=2, reduction="none"), labels, CLASSES),
    "focal": (
        lambda: lambda z, t: (1 - z.softmax(1).gather(1, t[:, None])[:, 0]) ** 2 * F.cross_entropy(z, t, reduction="none"),
        labels,
        4,
    ),
    "soft labels": (lambda: nn.CrossEntropyLoss(reduction="none"), soft, CLASSES),
    "distillation": (lambda: lambda z, t: F.kl_div(z.log_softmax(1), t, reduction="none").sum(1), soft, CLASSES),
    "several labels, flags": (lambda: lambda z, t: binary(z, t).sum(1), flags, CLASSES),
    "several labels, numbers": (lambda: lambda z, t: binary(z, t).mean(1), lambda: flags().long(), CLASSES),
    "several labels, weighted": (
        lambda: lambda z, t: F.binary_cross_entropy_with_logits(z, t, pos_weight=WEIGHT, reduction="none").sum(1),
        lambda: flags().float(),
        CLASSES,
    ),
    "one logit": (lambda: lambda z, t: binary(z[:, 0], t), lambda: torch.randint(0, 2, (N,)), 1),
    "one logit, a column": (lambda: nn.BCEWithLogitsLoss(reduction="none"), lambda: torch.rand(N, 1), 1),
    "regression": (lambda: lambda z, t: (z - t).square().sum(1), lambda: torch.randn(N, CLASSES), CLASSES),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_gradient_is_that_of_each_sample_s_loss(name: str) -> None:
    make, targets, outputs = LOSSES[name]
    loss, y, model, images = make(), targets(), net(outputs), torch.randn(N, 3, 6, 6)
    params, grads = list(model.parameters()), []
    wide = (lambda t: t.float()) if y.is_floating_point() else (lambda t: t)
    for i in range(N):
        grads.append(torch.autograd.grad(loss(model(images[i : i + 1]), wide(y[i : i + 1])).sum(), params))
    expected = torch.stack([sum((v.double().square().sum() for v in g), torch.zeros(())).sqrt() for g in grads]).float()
    torch.testing.assert_close(grad_norms(model, images, y, loss=loss), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(grad_norms(model, images, y, loss=loss, max_memory=1), expected, rtol=1e-4, atol=1e-7)
    along = {k: torch.randn_like(p) for k, p in model.named_parameters()}
    dots = torch.stack([sum(((v * along[k]).sum() for k, v in zip(along, g, strict=True)), torch.zeros(())) for g in grads])
    torch.testing.assert_close(grad_dots(model, images, y, along, loss=loss), dots, rtol=1e-3, atol=1e-4 * float(dots.abs().max()))


def test_logits_of_any_shape_with_a_loss_of_one_s_own() -> None:
    images = torch.randn(N, 3, 6, 6)
    flat, dense = nn.Sequential(net(1), nn.Flatten(0)), nn.Conv2d(3, CLASSES, 3)
    y, maps = torch.randint(0, 2, (N,)), torch.randint(0, CLASSES, (N, 4, 4))
    torch.testing.assert_close(
        grad_norms(flat, images, y, loss=binary), grad_norms(flat[0], images, y, loss=lambda z, t: binary(z[:, 0], t)), rtol=1e-5, atol=0
    )
    found = grad_norms(dense, images, maps, loss=lambda z, t: F.cross_entropy(z, t, reduction="none").mean((1, 2)))
    for i in range(N):
        grads = torch.autograd.grad(F.cross_entropy(dense(images[i : i + 1]), maps[i : i + 1]), list(dense.parameters()))
        torch.testing.assert_close(found[i].double(), sum(g.double().square().sum() for g in grads).sqrt(), rtol=1e-4, atol=0)


MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrast": lambda z, t: (z @ z.T / 10).logsumexp(1),
    "mean": lambda z, t: F.cross_entropy(z - z.mean(0), t, reduction="none"),
    "its share": lambda z, t: F.cross_entropy(z, t, reduction="none") / len(t),
    "weights of the batch": lambda z, t: F.cross_entropy(z, t, WEIGHT.double(), reduction="none") / WEIGHT[t].sum(),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_loss_that_mixes_samples_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"the loss of the sample at position \d depends on other samples of its batch"):
        grad_norms(net(), torch.randn(N, 3, 6, 6), labels(), loss=MIXED[name])


def test_what_does_not_fit_is_said() -> None:
    model, images, y = net(), torch.randn(N, 3, 6, 6), labels()
    with pytest.raises(InputError, match=r"7 integer targets, not torch.float32 \[7, 4\]; targets of other kinds need a loss"):
        grad_norms(model, images, soft())
    with pytest.raises(InputError, match=r"need targets \[7, ...\], not \[6\]"):
        grad_norms(model, images, y[1:], loss=binary)
    with pytest.raises(InputError, match=r"has shape \[7, 4\]; \[7\] is needed, such as the sum over the labels"):
        grad_norms(model, images, flags(), loss=binary)
    with pytest.raises(InputError, match=r"the loss cannot be taken of logits \[7, 4\] and targets int64 \[7\]"):
        grad_norms(model, images, y, loss=binary)
    with pytest.raises(InputError, match=r"the loss cannot be taken .* out of bounds"):
        grad_norms(model, images, y + CLASSES, loss=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(InputError, match="carries no gradient"):
        grad_norms(model, images, y, loss=lambda z, t: F.cross_entropy(z.detach(), t, reduction="none"))
    for score in (grad_norms, el2n):
        with pytest.raises(InputError, match="one logit, whose softmax is always 1"):
            score(net(1), images, torch.zeros(N, dtype=torch.int64))
