"""Gradient norms in one compiled graph: the same as whole gradients in float64, or a message and the plain pass."""

from __future__ import annotations

import copy
import gc
import logging
import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from test_norms import CLASSES, KINKS, Block, Vit, state, total, whole_gradients
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from infoutil_fast.gradnorm import compiled as graphs
from infoutil_fast.gradnorm.norms import grad_norms
from infoutil_fast.models.nets import build
from infoutil_fast.types import InputError

compiled = partial(grad_norms, compile=True)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        print("seed", torch.seed())
        yield


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Graphs are made and differentiated as always but run as they are; holds the number of operations of each."""
    sizes: list[int] = []
    compile_whole = torch.compile

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        sizes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def compile_(model: nn.Module, **options: Any) -> Any:
        return compile_whole(model, backend=aot_autograd(fw_compiler=counting), **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_)
    yield sizes
    torch._dynamo.reset()


def assert_compiled(model: nn.Module, images: Tensor, caplog: pytest.LogCaptureFixture, dtype: torch.dtype | None = None) -> None:
    targets = torch.randint(0, CLASSES, (len(images),))
    plain, by_layer = grad_norms(model, images, targets, dtype=dtype, per_layer=True)
    with caplog.at_level(logging.WARNING):
        norms, squares = compiled(model, images, targets, dtype=dtype, per_layer=True)
    assert "torch.compile" not in caplog.text
    assert squares.keys() == by_layer.keys()
    narrow = dtype not in (None, torch.float32)
    expected = plain if narrow else total(whole_gradients(model, images, targets)).float()
    torch.testing.assert_close(norms, expected, rtol=0.05 if narrow else KINKS, atol=0)
    whole = float(norms.square().max())
    for name, square in squares.items():
        torch.testing.assert_close(square, by_layer[name], rtol=0.2 if narrow else 5 * KINKS, atol=whole * (1e-2 if narrow else 1e-6))


def mixed() -> nn.Module:
    """Convolutions of all kinds and every norm that has a rule."""
    layers = [
        nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False),
        nn.GroupNorm(2, 8),
        nn.SiLU(inplace=True),
        nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect", groups=2),
        nn.InstanceNorm2d(6, affine=True),
        nn.GELU(),
        nn.Conv2d(6, 12, 1),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(2),
        nn.Conv1d(12, 5, 2, stride=2),
        nn.BatchNorm1d(5),
        nn.LayerNorm(3),
        nn.Linear(3, 4),
        nn.Flatten(),
        nn.Linear(20, CLASSES),
    ]
    net = nn.Sequential(*layers)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return net


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    assert_compiled(build("convnet2-w6", CLASSES, 8), torch.randn(5, 3, 8, 8), caplog, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_on_the_device(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model, images, targets = build("resnet10-small", CLASSES, 32).cuda(), torch.randn(5, 3, 32, 32).cuda(), torch.arange(5).cuda()
    with caplog.at_level(logging.WARNING):
        norms = compiled(model, images, targets, dtype=dtype)
    assert "torch.compile" not in caplog.text
    torch.testing.assert_close(
        norms, grad_norms(model, images, targets, dtype=dtype), rtol=KINKS if dtype == torch.float32 else 0.05, atol=0
    )


def test_all_layers(traced: list[int], caplog: pytest.LogCaptureFixture) -> None:
    assert_compiled(mixed(), torch.randn(4, 3, 9, 11), caplog)
    assert len(traced) == 2  # forward, backward


def test_residual_net(traced: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model = build("resnet10-small", CLASSES, 8)
    model.relu.inplace = True
    assert_compiled(model, torch.randn(3, 3, 8, 8), caplog)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_vision_transformer(packed: bool, count: int, traced: list[int], caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    block = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) if packed else Block(8)
    assert_compiled(Vit(8, 5, block), torch.randn(count, 3, 8, 8), caplog)


def test_any_number_of_images_by_one_graph(traced: list[int]) -> None:
    model, images, targets = build("convnet2-w5", CLASSES, 8), torch.randn(7, 3, 8, 8), torch.randint(0, CLASSES, (7,))
    expected = grad_norms(model, images, targets)
    for n in (5, 7, 1, 2):
        torch.testing.assert_close(compiled(model, images[:n], targets[:n]), expected[:n], rtol=KINKS, atol=0)
    batches = compiled(model, images, targets, max_memory=3 * 4 * 5 * 8 * 8 * 8)
    torch.testing.assert_close(batches, expected, rtol=KINKS, atol=0)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(compiled(model, strided, targets), expected, rtol=KINKS, atol=0)
    assert len(traced) == 2


def test_the_same_input_gives_the_same_bits(traced: list[int]) -> None:
    model, images, targets = build("convnet2-w5", CLASSES, 8), torch.randn(5, 3, 8, 8), torch.randint(0, CLASSES, (5,))
    first = compiled(model, images, targets)
    assert torch.equal(first, compiled(model, images, targets))


@pytest.mark.parametrize("change", ["in place", "data", "assigned", "buffer", "frozen"])
def test_changes_of_the_model_are_followed(change: str, traced: list[int]) -> None:
    model, other = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, CLASSES)) for _ in range(2))
    images, targets = torch.randn(4, 3, 4, 4), torch.randint(0, CLASSES, (4,))
    before = compiled(model, images, targets)
    if change == "in place":
        model.load_state_dict(other.state_dict())
    elif change == "data":
        model[0].weight.data = other[0].weight.data
    elif change == "assigned":
        model.load_state_dict(other.state_dict(), assign=True)
    elif change == "buffer":
        model[1].running_var = torch.full((4,), 3.0)
    else:
        model[0].requires_grad_(False)
    after = compiled(model, images, targets)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, total(whole_gradients(model, images, targets)).float(), rtol=2e-5, atol=0)


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.default_rng(int(x.sum().item() * 0)).random())


class Changing(nn.Module):
    """Another net while it is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 3 if torch.compiler.is_compiling() else x


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)).relu())


class ChangedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x.flatten(1)), inplace=True)


BODIES = {
    "untraceable": (lambda: nn.Sequential(nn.Flatten(), Untraceable()), ""),
    "another net": (lambda: nn.Sequential(nn.Flatten(), Changing()), "differ by"),
    "a shared weight": (Shared, "no rule"),
    "changed in place": (ChangedInPlace, "view"),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_cannot_be_compiled_goes_on_without(name: str, caplog: pytest.LogCaptureFixture, traced: list[int]) -> None:
    body, why = BODIES[name]
    model, images, targets = nn.Sequential(body(), nn.Linear(12, CLASSES)), torch.randn(3, 3, 2, 2), torch.randint(0, CLASSES, (3,))
    with caplog.at_level(logging.WARNING):
        norms = compiled(model, images, targets)
    assert "without torch.compile" in caplog.text
    assert why in caplog.text
    assert torch.equal(norms, grad_norms(model, images, targets))
    caplog.clear()
    compiled(model, images, targets)
    assert not caplog.text  # said once


def test_the_model_is_left_as_it_was_and_let_go_of(traced: list[int]) -> None:
    model, images, targets = build("resnet10-small", CLASSES, 8).train(), torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    before, pixels = state(model), images.clone()
    weights = copy.deepcopy(model.state_dict())
    compiled(model, images, targets)
    after = state(model)
    assert before[0] == after[0]
    torch.testing.assert_close(before[1], after[1])
    torch.testing.assert_close(dict(weights), dict(model.state_dict()), rtol=0, atol=0)
    assert torch.equal(images, pixels)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    assert not graphs._known


def test_bad_input_is_refused_as_without(traced: list[int]) -> None:
    model, images = build("convnet2-w5", CLASSES, 8), torch.randn(3, 3, 8, 8)
    for made in (0, 2):  # the first call, and one of a compiled model
        with pytest.raises(InputError, match=f"target {CLASSES} at position 1"):
            compiled(model, images, torch.tensor([0, CLASSES, 2]))
        assert len(traced) == made
        compiled(model, images, torch.tensor([0, 1, 2]))
    images[2] = torch.nan
    with pytest.raises(InputError, match=r"positions \[2\]"):
        compiled(model, images, torch.tensor([0, 1, 2]))
