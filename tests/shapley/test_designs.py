"""Coalition designs: the axioms, and equality with the definition, with least squares and with Captum's regression."""

from __future__ import annotations

import itertools

import pytest
import torch
from enumeration import by_definition

from infoutil_fast import InputError
from infoutil_fast.shapley.designs import DESIGNS, border_hadamard, border_share, column_order, exact, own_size, plan
from infoutil_fast.shapley.hadamard import hadamard, order
from infoutil_fast.shapley.maps import read_out
from infoutil_fast.shapley.sampling import SAMPLED, captum, leverage, permutation
from infoutil_fast.types import Coalitions


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


def test_exact_design_is_the_definition():
    d = 5
    coalitions = exact(d)
    payoffs = torch.randn(1 << d, dtype=torch.float64)
    values = {tuple(torch.nonzero(m).flatten().tolist()): float(v) for m, v in zip(coalitions.masks, payoffs, strict=True)}
    assert len(values) == 1 << d
    torch.testing.assert_close(coalitions.solve @ payoffs, by_definition(values, d), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("d", "evaluations"), [(16, 34), (16, 64), (16, 94), (16, 90), (9, None), (5, 20), (12, 60), (20, None), (25, 131), (64, None)]
)
def test_border_hadamard_is_exact_for_games_of_pairs(d, evaluations):
    coalitions = border_hadamard(d, evaluations)
    assert coalitions.masks.shape == (evaluations - evaluations % 2 if evaluations else own_size(d), d)
    values, phi = additive_game(coalitions.masks, order=2)
    torch.testing.assert_close(coalitions.solve @ values, phi, rtol=0, atol=1e-9)


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
        weight = 1 - border_share(16, 1)
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


@pytest.mark.parametrize("d", [2, 3, 5, 8, 9, 12, 16, 20, 25, 36, 49, 64])
@pytest.mark.parametrize("design", [design for design in DESIGNS if design not in ("captum", "exact")])
def test_every_design_is_exact_for_additive_games_once_its_rows_determine_them(design, d):
    coalitions = plan(design, d, 8 * d + 8)
    weight = torch.randn(d, dtype=torch.float64)
    found = coalitions.solve @ (coalitions.masks.double() @ weight + 3.5)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize("design", list(DESIGNS))
def test_designs_take_at_most_the_evaluations_and_always_the_ends(design):
    for budget in (37, 64, 101) if design != "exact" else (512,):
        masks = plan(design, 9, budget).masks
        assert len(masks) <= budget
        assert not masks.all(1).logical_not().all()
        assert masks.any(1).logical_not().any()


@pytest.mark.parametrize(("d", "evaluations"), [(6, 40), (8, 120), (9, 300)])
def test_leverage_draws_without_replacement_in_pairs_of_every_size(d, evaluations):
    masks = leverage(d, evaluations).masks
    assert len(masks.unique(dim=0)) == len(masks)
    assert torch.equal(masks[2::2], ~masks[3::2])
    assert set(masks.sum(1).tolist()) == set(range(d + 1))


def test_leverage_with_all_coalitions_is_exact():
    d = 7
    coalitions = leverage(d, 1 << d)
    assert len(coalitions.masks.unique(dim=0)) == 1 << d
    table = torch.randn(1 << d, dtype=torch.float64)
    number = (coalitions.masks.long() << torch.arange(d)).sum(1)
    torch.testing.assert_close(coalitions.solve @ table[number], exact(d).solve @ table, rtol=0, atol=1e-9)


def test_permutation_is_the_mean_of_marginal_contributions():
    d = 5
    coalitions = permutation(d, 2 + 3 * (d - 1))
    payoffs = torch.randn(len(coalitions.masks), dtype=torch.float64)
    chains = coalitions.masks[2:].view(3, d - 1, d)
    phi = torch.zeros(d, dtype=torch.float64)
    for k, chain in enumerate(chains):
        steps = torch.cat([coalitions.masks[:1], chain, coalitions.masks[1:2]])
        values = torch.cat([payoffs[:1], payoffs[2 + k * (d - 1) : 2 + (k + 1) * (d - 1)], payoffs[1:2]])
        for before, after, gain in zip(steps, steps[1:], values.diff(), strict=False):
            phi[(after & ~before).nonzero().item()] += gain / 3
    torch.testing.assert_close(coalitions.solve @ payoffs, phi, rtol=0, atol=1e-12)
    assert torch.equal(chains[0], ~chains[1].flip(0))  # every order is followed by its reverse


@pytest.mark.parametrize("design", list(SAMPLED))
def test_sampled_designs_repeat_with_their_generator(design):
    one, same, other = (plan(design, 10, 60, torch.Generator().manual_seed(seed)).masks for seed in (4, 4, 5))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("design", ["leverage", "kernel", "permutation"])
def test_bias_of_sampled_designs_is_far_below_their_noise(design):
    """Least squares over drawn rows is a ratio of estimates: a little bias is its nature, and goes with the budget."""
    d, draws = 6, 400
    table = torch.randn(1 << d, dtype=torch.float64)
    truth = exact(d).solve @ table
    found = []
    for _ in range(draws):
        coalitions = plan(design, d, 40)
        found.append(coalitions.solve @ table[(coalitions.masks.long() << torch.arange(d)).sum(1)])
    found = torch.stack(found)
    bias, noise = (found.mean(0) - truth).norm(), found.std(0).norm()
    assert float(bias / noise) < 0.35  # .02 to .18 over 1,500 draws, and 400 draws add 1 / sqrt(400)


def test_hadamard_orders():
    for n in (2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64):
        h = hadamard(n)
        assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.int64))
        assert (h[0] == 1).all()
    assert [order(d) for d in (1, 3, 9, 16, 17, 50, 64)] == [2, 4, 12, 16, 20, 56, 64]
    with pytest.raises(ValueError, match="order 6"):
        hadamard(6)


def test_column_orders_are_permutations_and_differ():
    orders = [tuple(column_order(k, 16).tolist()) for k in range(12)]
    assert all(sorted(o) == list(range(16)) for o in orders)
    assert len(set(orders)) == len(orders)


def test_larger_budgets_begin_with_the_masks_of_smaller_ones():
    small, large = border_hadamard(16, 64), border_hadamard(16, 154)
    assert torch.equal(large.masks[:64], small.masks)


def test_small_grids_are_enumerated():
    assert border_hadamard(4).name.startswith("exact")
    assert len(border_hadamard(9, 512).masks) == 512


@pytest.mark.parametrize("design", [design for design in DESIGNS if design != "exact"])
def test_estimated_error_follows_the_true_one(design):
    """The medians over random games with interactions of up to four patches; additive games have no error.

    A design's own disagreement is within a factor of 6 of the truth. That of one Hadamard block is scaled to games of nets, which are
    harder than these, and so may lie up to 15 times above.
    """
    d = 9
    coalitions = plan(design, d, 62)
    number = (coalitions.masks.long() << torch.arange(d)).sum(1)
    true, estimated = [], []
    for _ in range(60):
        every, _ = additive_game(exact(d).masks, order=4)
        phi, error = read_out(every[number][None], coalitions)
        truth = exact(d).solve @ every
        true.append(float((phi[0] - truth).square().sum() / (truth - truth.mean()).square().sum()))
        estimated.append(float(error[0]))
    ratio = sorted(estimated)[30] / min(1.0, sorted(true)[30])
    assert 1 / 6 < ratio < (15 if design == "border_hadamard" else 6)
    if design != "captum":
        coalitions = plan(design, d, 300)  # so many that those that the jackknife keeps always determine phi
        weight = torch.randn(d, dtype=torch.float64)
        assert float(read_out((coalitions.masks.double() @ weight)[None], coalitions)[1]) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("magic", 16), "design 'magic' is not known; known: border_hadamard"),
        (("border_hadamard", 16, 33), "at least 34 evaluations for 16 patches"),
        (("exact", 17), "1 to 16 patches, not 17"),
        (("leverage", 16, 3), "at least 2 patches and 4 evaluations"),
        (("kernel", 1, 30), "at least 2 patches"),
        (("captum", 16, 2), "3 evaluations"),
        (("permutation", 16, 16), "17 evaluations"),
        ((Coalitions(torch.ones(2, 5, dtype=torch.bool), torch.ones(5, 2)), 4), "of 5 patches, the images have 4"),
    ],
)
def test_bad_designs_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        plan(*arguments)
