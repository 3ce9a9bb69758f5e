"""Shapley values: the axioms, and equality with the definition by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from infoutil_fast import InputError, nets, patch_shapley
from infoutil_fast.shapley import PAYOFFS, border_hadamard, captum, exact, plan
from infoutil_fast.types import Coalitions


def by_definition(values: dict[tuple[int, ...], float], d: int) -> torch.Tensor:
    """Equation 4 of the paper, one marginal contribution after the other."""
    phi = torch.zeros(d, dtype=torch.float64)
    for i in range(d):
        others = [j for j in range(d) if j != i]
        for k in range(d):
            for s in itertools.combinations(others, k):
                phi[i] += (values[tuple(sorted((*s, i)))] - values[s]) / (d * math.comb(d - 1, k))
    return phi


def additive_game(masks: torch.Tensor, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random game with interactions of up to `order` patches: its values under `masks`, and its Shapley values in closed form."""
    d = masks.shape[1]
    values = torch.full((len(masks),), float(torch.randn(())), dtype=torch.float64)
    phi = torch.zeros(d, dtype=torch.float64)
    for k in range(1, order + 1):
        for s in itertools.combinations(range(d), k):
            c = float(torch.randn(()))
            values += c * masks[:, list(s)].all(1)
            phi[list(s)] += c / k
    return values, phi


class Sum(nn.Module):
    """Two classes; class 1 is a weighted sum of pixels and one product, so that every value is known."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = (x.flatten(1) * self.weight).sum(1)
        return torch.stack([-total, total], 1)


def test_exact_design_is_the_definition():
    d = 5
    coalitions = exact(d)
    payoffs = torch.randn(1 << d, dtype=torch.float64)
    values = {tuple(torch.nonzero(m).flatten().tolist()): float(v) for m, v in zip(coalitions.masks, payoffs, strict=True)}
    assert len(values) == 1 << d
    torch.testing.assert_close(coalitions.solve @ payoffs, by_definition(values, d), rtol=0, atol=1e-12)


@pytest.mark.parametrize("evaluations", [34, 64, 94, 154])
def test_border_hadamard_is_exact_for_games_of_pairs(evaluations):
    coalitions = border_hadamard(16, evaluations)
    assert coalitions.masks.shape == (evaluations, 16)
    values, phi = additive_game(coalitions.masks, order=2)
    torch.testing.assert_close(coalitions.solve @ values, phi, rtol=0, atol=1e-10)


def test_every_coalition_of_the_default_design_is_different():
    assert len(border_hadamard(16, 64).masks.unique(dim=0)) == 64


@pytest.mark.parametrize("part", ["border", "hadamard"])
def test_closed_forms_are_the_constrained_least_squares(part):
    """estimators.md 1.1: minimise the weighted residual of v(S) - v0 - z phi under sum(phi) = v1 - v0."""
    coalitions = border_hadamard(16, 34) if part == "border" else border_hadamard(16, 64)
    payoffs = torch.randn(len(coalitions.masks), dtype=torch.float64)
    rows = slice(2, 34) if part == "border" else slice(34, 64)
    z, v = coalitions.masks[rows].double(), payoffs[rows]
    empty, full = payoffs[0], payoffs[1]
    projection = torch.eye(16, dtype=torch.float64) - 1 / 16
    b = v - empty - (full - empty) * z.sum(1) / 16
    expected = torch.linalg.pinv(z @ projection) @ b + (full - empty) / 16
    if part == "border":
        found = coalitions.solve @ payoffs
    else:
        weight = 13 / 21
        border = border_hadamard(16, 34).solve @ payoffs[:34]
        found = (coalitions.solve @ payoffs - (1 - weight) * border) / weight
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("design", ["border_hadamard", "exact"])
def test_efficiency_and_linearity(design):
    coalitions = plan(design, 16)
    a, b = torch.randn(2, len(coalitions.masks), dtype=torch.float64)
    size = coalitions.masks.sum(1)
    gain = a[size == 16] - a[size == 0]
    torch.testing.assert_close((coalitions.solve @ a).sum(), gain[0], rtol=0, atol=1e-9)
    together = coalitions.solve @ (2 * a - 3 * b)
    torch.testing.assert_close(together, 2 * (coalitions.solve @ a) - 3 * (coalitions.solve @ b), rtol=0, atol=1e-9)


def test_dummy_and_symmetric_patches():
    """Patch 3 does nothing; patches 5 and 9 do the same."""
    masks = exact(10).masks
    twins = masks[:, 5].double() + masks[:, 9].double()
    values = torch.randn(1 << 10, dtype=torch.float64)
    rest = masks.clone()
    rest[:, [3, 5, 9]] = False
    index = (rest * (1 << torch.arange(10))).sum(1)
    phi = exact(10).solve @ (values[index] + twins.square() + twins)
    assert abs(float(phi[3])) < 1e-10
    assert abs(float(phi[5] - phi[9])) < 1e-10


def test_captum_design_solves_as_captum_does():
    """scikit-learn's regression with an intercept on 0/1 rows, ends weighted 1e6: that is what Captum's KernelShap fits."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    coalitions = captum(6, 40, torch.Generator().manual_seed(int(torch.randint(1 << 30, ()))))
    payoffs = torch.randn(40, dtype=torch.float64)
    weight = torch.ones(40)
    weight[:2] = 1e6
    fitted = linear_model.LinearRegression().fit(coalitions.masks.double().numpy(), payoffs.numpy(), sample_weight=weight.numpy())
    torch.testing.assert_close(coalitions.solve @ payoffs, torch.from_numpy(fitted.coef_), rtol=0, atol=1e-5)
    assert coalitions.masks[0].all()
    assert not coalitions.masks[1].any()
    assert all(0 < n < 6 for n in coalitions.masks[2:].sum(1).tolist())


def test_captum_sizes_follow_the_shapley_kernel():
    d, n = 16, 20000
    sizes = captum(d, n).masks[2:].sum(1)
    k = torch.arange(1, d, dtype=torch.float64)
    expected = (d - 1) / (k * (d - k))
    expected /= expected.sum()
    found = torch.bincount(sizes, minlength=d)[1:d] / (n - 2)
    assert float((found - expected).abs().max()) < 5 * float((expected * (1 - expected) / n).sqrt().max())


@pytest.mark.parametrize(("grid", "shape"), [(4, (2, 3, 17, 23)), ((2, 3), (1, 1, 7, 5)), (3, (3, 2, 3, 3))])
def test_patch_shapley_of_a_linear_net_is_each_patch_s_own_sum(grid, shape):
    n, c, h, w = shape
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    images = torch.randn(n, c, h + 2, w + 1)[:, :, 1:-1, 1:]  # sliced: not contiguous
    net = Sum(torch.randn(c * h * w))
    fill = float(torch.randn(()))
    targets = torch.randint(0, 2, (n,))
    found = patch_shapley(
        net, images, targets, grid=grid, fill=fill, design="exact" if rows * columns != 16 else "border_hadamard", batch=7
    )
    contribution = ((images - fill) * net.weight.view(c, h, w)).sum(1)  # [n, h, w]
    expected = torch.zeros(n, rows, columns)
    for y in range(h):
        for x in range(w):
            expected[:, y * rows // h, x * columns // w] += contribution[:, y, x]
    expected *= (2 * targets - 1)[:, None, None]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("payoff", list(PAYOFFS))
def test_patch_shapley_agrees_with_enumeration_on_a_net(payoff):
    net = nets.build("convnet2-w16", 5, 12)
    images, targets = torch.randn(2, 3, 12, 12), torch.randint(0, 5, (2,))
    found = patch_shapley(net, images, targets, grid=(2, 3), design="exact", payoff=payoff, batch=5)
    net.eval()
    for n in range(2):
        values = {}
        for k in range(7):
            for s in itertools.combinations(range(6), k):
                shown = torch.zeros(3, 12, 12)
                for i in s:
                    y, x = divmod(i, 3)
                    shown[:, 6 * y : 6 * y + 6, 4 * x : 4 * x + 4] = images[n, :, 6 * y : 6 * y + 6, 4 * x : 4 * x + 4]
                with torch.no_grad():
                    values[s] = float(PAYOFFS[payoff](net(shown[None]).double())[0, targets[n]])
        torch.testing.assert_close(found[n].flatten().double(), by_definition(values, 6), rtol=1e-4, atol=1e-6)


def test_default_design_is_close_to_exact_and_captum_s_25_is_not():
    """A single case must not decide: the median over several random nets."""
    errors = {"border_hadamard": [], "captum": []}
    for _ in range(3):
        net = nets.build("convnet2-w8", 4, 8)
        images, targets = torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2,))
        truth = patch_shapley(net, images, targets, design="exact", batch=4096)
        for design, found in errors.items():
            error = (patch_shapley(net, images, targets, design=design) - truth).square().sum((1, 2))
            found += (error / (truth - truth.mean((1, 2), keepdim=True)).square().sum((1, 2))).tolist()
    median = {design: sorted(found)[len(found) // 2] for design, found in errors.items()}
    assert median["border_hadamard"] < 0.1 < median["captum"]


def test_micro_batch_does_not_change_the_values():
    net = nets.build("convnet3-w16", 10, 32)
    images, targets = torch.randn(5, 3, 32, 32), torch.randint(0, 10, (5,))
    one, other = (patch_shapley(net, images, targets, batch=batch) for batch in (13, 256))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_sampled_design_draws_for_each_image_from_its_generator():
    net = nets.build("convnet2-w16", 3, 16)
    image, target = torch.randn(1, 3, 16, 16), torch.tensor([1])
    same = [patch_shapley(net, image, target, design="captum", generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    other = patch_shapley(net, image, target, design="captum", generator=torch.Generator().manual_seed(8))
    assert torch.equal(*same)
    assert not torch.equal(same[0], other)


def test_model_is_left_as_it_was_even_when_it_fails():
    net = nets.build("convnet2-w16", 3, 16)
    net[1].eval()
    modes = [m.training for m in net.modules()]
    patch_shapley(net, torch.randn(1, 3, 16, 16), torch.tensor([0]))
    with pytest.raises(RuntimeError):
        patch_shapley(net, torch.randn(1, 3, 20, 20), torch.tensor([0]))
    assert [m.training for m in net.modules()] == modes


def test_empty_batch():
    net = nets.build("convnet2-w16", 3, 16)
    assert patch_shapley(net, torch.empty(0, 3, 16, 16), torch.empty(0, dtype=torch.int64)).shape == (0, 4, 4)


def test_own_coalitions():
    masks = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    solve = torch.tensor([[-0.5, 0.5, -0.5, 0.5], [-0.5, -0.5, 0.5, 0.5]], dtype=torch.float64)
    net, images = Sum(torch.randn(12)), torch.randn(1, 3, 2, 2)
    own = patch_shapley(net, images, torch.tensor([1]), grid=(1, 2), design=Coalitions(masks, solve))
    torch.testing.assert_close(own, patch_shapley(net, images, torch.tensor([1]), grid=(1, 2), design="exact"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"design": "magic"}, "design 'magic' is not known"),
        ({"payoff": "luck"}, "payoff 'luck' is not known"),
        ({"grid": 3}, "16 patches, not 9"),
        ({"evaluations": 50}, "34 \\+ 30 k evaluations"),
        ({"grid": 17, "design": "exact"}, "1 to 16 patches"),
        ({"grid": (17, 1), "design": "captum"}, "grid"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "need as many targets"),
        ({"targets": torch.tensor([9])}, "targets"),
    ],
)
def test_bad_input_is_named(change, message):
    net = nets.build("convnet2-w16", 3, 16)
    arguments = {"targets": torch.tensor([0]), **change}
    with pytest.raises(InputError, match=message):
        patch_shapley(net, torch.randn(1, 3, 16, 16), arguments.pop("targets"), **arguments)
