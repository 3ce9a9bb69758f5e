"""Dot products of per-sample gradients with a direction, against whole gradients in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_norms import CLASSES, Block, Vit
from torch import Tensor, nn

from infoutil_fast.influence import grad_dots
from infoutil_fast.models.nets import build
from infoutil_fast.types import InputError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on the first use of forward mode


def by_sample(model: nn.Module, images: Tensor, targets: Tensor, direction: dict[str, Tensor]) -> Tensor:
    model = copy.deepcopy(model).double().eval()
    params = [p for name, p in model.named_parameters() if name in direction]
    along = [direction[name].double() for name, _ in model.named_parameters() if name in direction]
    dots = []
    for image, target in zip(images.double(), targets, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(image[None]), target[None]), params)
        dots.append(sum((g * v).sum() for g, v in zip(grads, along, strict=True)))
    return torch.stack(dots)


@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("kind", ["convnet2-w5", "resnet10-small", "vit"])
def test_dots_with_a_direction(kind: str, max_memory: int | None) -> None:
    model = Vit(8, 5, Block(8)) if kind == "vit" else build(kind, CLASSES, 8)
    images, targets = torch.randn(5, 3, 8, 8), torch.randint(0, CLASSES, (5,))
    names = [name for name, _ in model.named_parameters()]
    for chosen in (names, names[1::3]):
        direction = {name: torch.randn_like(p) for name, p in model.named_parameters() if name in chosen}
        got = grad_dots(model.train(), images, targets, direction, max_memory=max_memory)
        assert got.dtype == torch.float32
        assert model.training
        want = by_sample(model, images, targets, direction)
        scale = want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * scale)


def test_a_gradient_as_the_direction_gives_its_square() -> None:
    model, images, targets = build("convnet2-w5", CLASSES, 8).eval(), torch.randn(1, 3, 8, 8), torch.tensor([2])
    grads = torch.autograd.grad(F.cross_entropy(model(images), targets), list(model.parameters()))
    direction = dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))
    square = sum(g.double().square().sum() for g in grads)
    torch.testing.assert_close(grad_dots(model, images, targets, direction).double()[0], square, rtol=1e-4, atol=0)


def test_nothing_to_do_and_what_does_not_fit() -> None:
    model, images, targets = build("convnet2-w5", CLASSES, 8), torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    assert torch.equal(grad_dots(model, images, targets, {}), torch.zeros(2))
    assert grad_dots(model, images[:0], targets[:0], {"0.bias": torch.ones(5)}).shape == (0,)
    with pytest.raises(InputError, match=r"has no parameter 'head'; it has 0.weight, 0.bias"):
        grad_dots(model, images, targets, {"head": torch.zeros(1)})
    with pytest.raises(InputError, match=r"direction '0.bias' is \[3\] and the parameter \[5\]"):
        grad_dots(model, images, targets, {"0.bias": torch.zeros(3)})
    with pytest.raises(InputError, match="target 9 at position 1"):
        grad_dots(model, images, torch.tensor([0, 9]), {"0.bias": torch.ones(5)})
