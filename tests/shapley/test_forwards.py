"""Models that are not what their layers say, that mix samples, or that take images in their own way: right maps, or a refusal."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from enumeration import by_definition
from torch import Tensor, nn

from infoutil_fast import InputError, patch_shapley
from infoutil_fast.shapley.forwards import Forwards
from infoutil_fast.shapley.maps import PatchShapley


def by_enumeration(model: nn.Module, images: Tensor, targets: Tensor, payoff: Callable[[Tensor, int], Tensor], fill: float = 0.0) -> Tensor:
    """Shapley values [N, 4] of a 2 x 2 grid, an image's coalitions in one batch."""
    maps, (h, w) = [], images.shape[2:]
    patch = (torch.arange(h) * 2 // h)[:, None] * 2 + torch.arange(w) * 2 // w
    for image, target in zip(images, targets.tolist(), strict=True):
        kept = [s for k in range(5) for s in itertools.combinations(range(4), k)]
        shown = torch.stack([torch.where(torch.isin(patch, torch.tensor(s, dtype=torch.int64)), image, torch.tensor(fill)) for s in kept])
        with torch.no_grad():
            z = model.eval()(shown).double()
        maps.append(by_definition({s: float(payoff(z[i], target)) for i, s in enumerate(kept)}, 4))
    return torch.stack(maps)


def logit(z: Tensor, target: int) -> Tensor:
    return z[target]


def net(*first: nn.Module, outputs: int = 5) -> nn.Module:
    layers = first or (nn.Conv2d(3, 8, 3, padding=1),)
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, outputs))


def normed() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(8)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return norm


def patched() -> nn.Module:
    model = net(nn.Conv2d(3, 8, 3, padding=1), normed())
    conv = model[0]
    conv.forward = lambda t: F.conv2d(t, conv.weight * 0.5, conv.bias, padding=1)
    return model


def patched_norm() -> nn.Module:
    model = net(nn.Conv2d(3, 8, 3, padding=1), normed())
    norm, forward = model[1], nn.BatchNorm2d.forward
    norm.forward = lambda t: forward(norm, t).flip(-1)
    return model


class Turned(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


class Tanned(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.tanh(), self.bias, padding=1)


class Branch(nn.Module):
    """torch.fx cannot trace it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) > -1e9 else x


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("unseen", torch.arange(5) > 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).masked_fill(self.unseen, float("-inf"))


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.conv(x).relu(), 1).squeeze())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: net(nn.Conv2d(3, 8, 3, padding=1), normed()),
    "forward replaced": patched,
    "norm replaced": patched_norm,
    "subclass": lambda: net(Tanned(3, 8, 3, padding=1), normed()),
    "subclass that turns": lambda: net(Turned(3, 8, 3, padding=1), normed()),
    "weight norm": lambda: net(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1)), normed()),
    "masked classes": Masked,
    "squeezed": Squeezed,
    "untraceable": lambda: Branch(net()),
}


@pytest.mark.parametrize("batch", [None, 1, 5])
@pytest.mark.parametrize("kind", MODELS)
def test_the_maps_are_those_of_the_model(kind: str, batch: int | None) -> None:
    model, images, targets = MODELS[kind]().eval(), torch.randn(3, 3, 24, 20), torch.tensor([1, 2, 0])
    found = patch_shapley(model, images, targets, grid=2, design="exact", batch=batch).flatten(1).double()
    want = by_enumeration(model, images, targets, logit)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_what_differs_on_the_call_s_own_image_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The net is spoilt after the noise of the plan has passed it."""
    model, images, targets = net().eval(), torch.randn(2, 3, 24, 20), torch.tensor([1, 3])
    plan = PatchShapley(model, (3, 24, 20), grid=2, design="exact")
    forwards: Forwards = plan._with(torch.float32)
    whole, back = forwards.net, getattr(forwards, "back", None)
    monkeypatch.setattr(forwards, "net", lambda x: whole(x) * 1.01)
    if forwards.split is not None:
        monkeypatch.setattr(forwards, "back", lambda *maps: back(*maps) * 1.01)
    with caplog.at_level(logging.WARNING):
        found = plan(images, targets).flatten(1).double()
    assert "plain forwards of the model itself: what was traced was off by" in caplog.text
    want = by_enumeration(model, images, targets, logit)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_the_check_is_of_the_weights_that_were_planned() -> None:
    model, images, targets = net().eval(), torch.randn(2, 3, 24, 20), torch.tensor([1, 3])
    want = by_enumeration(model, images, targets, logit)
    plan = PatchShapley(model, (3, 24, 20), grid=2, design="exact")
    with torch.no_grad():
        model[0].weight.mul_(3)
    found = plan(images, targets).flatten(1).double()
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


class Mixing(nn.Module):
    def __init__(self, way: str):
        super().__init__()
        self.way, self.inner = way, net()

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "statistics":
            x = F.batch_norm(x, None, None, training=True)
        return self.inner(x - x.mean(0) if self.way == "mean" else F.dropout(x, 0.5) if self.way == "dropout" else x)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("way", ["statistics", "mean", "dropout"])
def test_mixed_samples_are_refused(way: str, traced: bool) -> None:
    model = Mixing(way) if traced else Branch(Mixing(way))
    with pytest.raises(InputError, match="with those beside it in a call"):
        patch_shapley(model.eval(), torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), grid=2, design="exact")
    named = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), net())
    with pytest.raises(InputError, match="batch norm '0' has no running statistics"):
        patch_shapley(named, torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), grid=2, design="exact")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_untraceable_model_in_another_format_is_given_images_of_it(dtype: torch.dtype) -> None:
    model, images, targets = Branch(net()).eval(), torch.randn(2, 3, 24, 20), torch.tensor([1, 3])
    want = by_enumeration(model, images, targets, logit)
    given = images.to(dtype) if dtype == torch.bfloat16 else images
    found = patch_shapley(model.to(dtype), given, targets, grid=2, design="exact").flatten(1).double()
    close = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, want, rtol=0, atol=close * float(want.abs().max()))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("payoff", ["logit", "probability", "log_probability", "log_odds"])
def test_one_logit_is_that_of_a_yes(payoff: str, flat: bool) -> None:
    model, images, targets = net(outputs=1).eval(), torch.randn(2, 3, 24, 20), torch.zeros(2, dtype=torch.int64)
    read = {
        "logit": lambda z, t: z[0],
        "probability": lambda z, t: z[0].sigmoid(),
        "log_probability": lambda z, t: F.logsigmoid(z[0]),
        "log_odds": lambda z, t: z[0],
    }[payoff]
    want = by_enumeration(model, images, targets, read)
    given = nn.Sequential(model, nn.Flatten(0)) if flat else model
    found = patch_shapley(given, images, targets, grid=2, design="exact", payoff=payoff).flatten(1).double()
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    with pytest.raises(InputError, match="from 0 to 0, not 1 to 1"):
        patch_shapley(model, images, targets + 1, grid=2, design="exact", payoff=payoff)


def test_one_fill_for_all_images_and_what_is_none() -> None:
    model, images, targets, fill = net().eval(), torch.randn(3, 3, 12, 10), torch.tensor([1, 3, 0]), torch.randn(3, 12, 10)
    want = patch_shapley(model, images, targets, grid=2, design="exact", fill=fill)
    for given in (fill[None], fill.expand(3, -1, -1, -1)):
        torch.testing.assert_close(patch_shapley(model, images, targets, grid=2, design="exact", fill=given), want)
    plan = PatchShapley(model, (3, 12, 10), grid=2, design="exact", fill=fill[None])
    torch.testing.assert_close(plan.logits(images), PatchShapley(model, (3, 12, 10), grid=2, design="exact", fill=fill).logits(images))
    with pytest.raises(InputError, match=r"fill must be a number, \[3\], \[3, 12, 10\] or \[3, 3, 12, 10\], not \[2, 3, 12, 10\]"):
        patch_shapley(model, images, targets, grid=2, design="exact", fill=fill.expand(2, -1, -1, -1))
