"""Sampled coalition designs: leverage, kernel, Captum's, permutation; least squares and the jackknife."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from infoutil_fast.types import Coalitions, InputError

GROUPS = 8  # of evaluations that the jackknife leaves out in turn


def least_squares(masks: Tensor, weight: Tensor) -> Tensor:
    """The map [d, M] from payoffs to the weighted least squares under efficiency; rows 0 and 1 are the empty and the full coalition.

    phi = (P Z'WZ P)^+ P Z'W (v - v0 - delta |S| / d) + delta / d with P = I - 11'/d (Lundberg & Lee 2017, Eq. 8 to 10; the projected
    form of Musco & Witter 2024). The pseudo-inverse is the minimum-norm answer where the rows do not determine phi.
    """
    M, d = masks.shape
    z = masks.double()
    share = z.mean(1)  # |S| / d
    centred = z - share[:, None]  # Z P
    fit = torch.linalg.pinv(centred.T @ (weight[:, None] * centred), hermitian=True, rtol=1e-10) @ (centred.T * weight)  # [d, M]
    ends = torch.zeros(d, M, dtype=torch.float64)
    ends[:, 1] = 1 / d - fit @ share
    ends[:, 0] = -1 / d - fit @ (1 - share)
    return fit + ends


def leverage(d: int, evaluations: int, generator: Generator | None = None) -> Coalitions:
    """Paired leverage-score sampling without replacement (Musco & Witter 2024, LeverageSHAP): every coalition size gets an equal share.

    Sizes k and d - k are drawn as complementary pairs, a small size in full once its share covers it; the weight of a pair is the kernel's
    over its inclusion probability.
    """
    pairs = _pairs("leverage", d, evaluations)
    sizes = list(range(1, d // 2 + 1))
    there = [math.comb(d, k) // (2 if 2 * k == d else 1) for k in sizes]  # pairs of each size
    expected = _shares(pairs, [1.0 if 2 * k == d else 2.0 for k in sizes], there)
    counts = _rounded(expected, there, generator)
    halves, weights = [], []
    for k, total, mean, count in zip(sizes, there, expected, counts, strict=True):
        if count:
            halves.append(_distinct(d, k, count, generator))
            kernel = 1 / (math.comb(d, k) * k * (d - k))
            weights += [kernel * total / mean] * count
    half = torch.cat(halves)
    return _paired("leverage", half, torch.tensor(weights, dtype=torch.float64), generator)


def kernel(d: int, evaluations: int, generator: Generator | None = None) -> Coalitions:
    """KernelSHAP in complementary pairs, drawn with replacement (Lundberg & Lee 2017; pairs: Covert & Lee 2021), efficiency exact."""
    pairs = _pairs("kernel", d, evaluations)
    half = by_kernel(d, pairs, generator)
    return _paired("kernel", half, torch.ones(pairs, dtype=torch.float64), generator)


def captum(d: int, evaluations: int = 25, generator: Generator | None = None) -> Coalitions:
    """Captum's KernelShap: i.i.d. unpaired coalitions, the two ends among the `evaluations`, intercept, ends weighted 1e6.

    Sizes k with probability in proportion to (d - 1) / (k (d - k)), then a uniform set of that size (captum 0.9, kernel_shap.py).
    The solve is the minimum-norm weighted least squares, so that a rank-deficient draw has an answer.
    """
    if evaluations < 3 or d < 2:
        raise InputError(f"captum needs at least 2 patches and 3 evaluations, not {d} and {evaluations}")
    ends = torch.tensor([[True], [False]]).expand(2, d)
    masks = torch.cat([ends, by_kernel(d, evaluations - 2, generator)])
    weight = torch.ones(evaluations, dtype=torch.float64)
    weight[:2] = 1e6

    def solve(weight: Tensor) -> Tensor:
        root = weight.sqrt()[:, None]
        rows = torch.cat([torch.ones(evaluations, 1, dtype=torch.float64), masks.double()], 1)  # [M, 1 + d]
        return torch.linalg.pinv(root * rows, rtol=1e-12)[1:] * root.T

    return Coalitions(masks, solve(weight), f"captum, {evaluations} evaluations", _jackknife(solve, weight, 2, 1))


def permutation(d: int, evaluations: int, generator: Generator | None = None) -> Coalitions:
    """Mean marginal contributions along random orders, each followed by its reverse (Castro et al. 2009; antithetic: Mitchell et al. 2022).

    An order costs d - 1 evaluations beside the two ends.
    """
    orders = (evaluations - 2) // max(1, d - 1)
    if d < 2 or orders < 1:
        raise InputError(f"permutation needs 2 patches and {d + 1} evaluations for {d} patches (2 + d - 1 an order), not {evaluations}")
    ranks = torch.rand((orders + 1) // 2, d, generator=generator).argsort(1).argsort(1)  # [n, d] when each patch enters
    ranks = torch.stack([ranks, d - 1 - ranks], 1).flatten(0, 1)[:orders]
    steps = torch.arange(1, d)
    masks = torch.cat([torch.tensor([[False], [True]]).expand(2, d), (ranks[:, None] < steps[:, None]).flatten(0, 1)])

    def solve(weight: Tensor) -> Tensor:  # of each order
        gain = torch.zeros(orders, d, d + 1, dtype=torch.float64)  # by size of the coalition
        gain.scatter_(2, ranks[..., None] + 1, 1.0)
        gain.scatter_add_(2, ranks[..., None], torch.full((orders, d, 1), -1.0, dtype=torch.float64))
        gain = gain * (weight / weight.sum())[:, None, None]
        return torch.cat([gain[:, :, :1].sum(0), gain[:, :, -1:].sum(0), gain[:, :, 1:-1].transpose(0, 1).flatten(1)], 1)

    weight = torch.ones(orders, dtype=torch.float64)
    return Coalitions(masks, solve(weight), f"permutation, {orders} orders", _jackknife(solve, weight, 0, 1 if orders < 4 else 2))


SAMPLED: dict[str, Callable[[int, int, Generator | None], Coalitions]] = {
    "leverage": leverage,
    "kernel": kernel,
    "captum": captum,
    "permutation": permutation,
}


def _pairs(name: str, d: int, evaluations: int) -> int:
    if d < 2 or evaluations < 4:
        raise InputError(f"{name} needs at least 2 patches and 4 evaluations, not {d} and {evaluations}")
    return (evaluations - 2) // 2


def _paired(name: str, half: Tensor, weight: Tensor, generator: Generator | None) -> Coalitions:
    """The ends, then each coalition of `half` [n, d] followed by its complement."""
    shuffled = torch.randperm(len(half), generator=generator)  # so that the groups of the jackknife are alike
    half, weight = half[shuffled], weight[shuffled]
    d = half.shape[1]
    masks = torch.cat([torch.tensor([[False], [True]]).expand(2, d), torch.stack([half, ~half], 1).flatten(0, 1)])
    rows = torch.cat([torch.zeros(2, dtype=torch.float64), weight.repeat_interleave(2)])

    def solve(weight: Tensor) -> Tensor:
        return least_squares(masks, weight)

    return Coalitions(masks, solve(rows), f"{name}, {len(masks)} evaluations", _jackknife(solve, rows, 2, 2))


def _jackknife(solve: Callable[[Tensor], Tensor], weight: Tensor, first: int, unit: int) -> Tensor | None:
    """`spread` from leaving out one group of units at a time (Efron 1982): sqrt((G - 1) / G) (phi without g - phi)."""
    units = (len(weight) - first) // unit
    groups = min(GROUPS, units)
    if groups < 2:
        return None
    unit_of = (torch.arange(len(weight)) - first) // unit
    kept = (unit_of[None] % groups != torch.arange(groups)[:, None]) | (torch.arange(len(weight)) < first)
    whole = solve(weight)
    return torch.stack([solve(weight * keep) - whole for keep in kept]) * math.sqrt((groups - 1) / groups)


def by_kernel(d: int, n: int, generator: Generator | None) -> Tensor:
    """n coalitions [n, d]: size k with probability in proportion to (d - 1) / (k (d - k)), then a uniform set of that size."""
    device = generator.device if generator is not None else torch.device("cpu")
    k = torch.arange(1, d, dtype=torch.float64, device=device)
    sizes = 1 + torch.multinomial((d - 1) / (k * (d - k)), n, replacement=True, generator=generator)
    entry = torch.rand(n, d, generator=generator, device=device).argsort(1)  # random permutations
    first = torch.arange(d, device=device) < sizes[:, None]
    return torch.zeros_like(first).scatter_(1, entry, first)


def _shares(total: int, mass: list[float], most: list[int]) -> list[float]:
    """`total` shared in proportion to `mass`, none above `most`; what one cannot take goes to the others."""
    share, full = [0.0] * len(mass), [False] * len(mass)
    while True:
        left = total - sum(m for m, f in zip(most, full, strict=True) if f)
        scale = left / max(1e-300, sum(m for m, f in zip(mass, full, strict=True) if not f))
        share = [float(most[i]) if full[i] else scale * mass[i] for i in range(len(mass))]
        over = [i for i in range(len(mass)) if not full[i] and share[i] >= most[i]]
        if not over or all(full):
            return [min(s, float(m)) for s, m in zip(share, most, strict=True)]
        for i in over:
            full[i] = True


def _rounded(expected: list[float], most: list[int], generator: Generator | None) -> list[int]:
    """Whole numbers with these expectations and the same sum (systematic sampling), none above `most`."""
    start = float(torch.rand((), generator=generator, dtype=torch.float64))
    sums = [0, *(math.floor(s + start + 1e-9) for s in itertools.accumulate(expected))]
    return [min(b - a, m) for a, b, m in zip(sums, sums[1:], most, strict=False)]


def _distinct(d: int, k: int, n: int, generator: Generator | None) -> Tensor:
    """n distinct uniform sets of size k [n, d]; of size d / 2 no two are complements."""
    middle = 2 * k == d
    if 2 * n >= math.comb(d, k) // (2 if middle else 1):
        every = [s for s in itertools.combinations(range(d), k) if not middle or 0 in s]
        chosen = [every[i] for i in torch.randperm(len(every), generator=generator)[:n].tolist()]
        found = torch.zeros(n, d, dtype=torch.bool)
        return found.scatter_(1, torch.tensor(chosen), True)
    rows: dict[tuple[int, ...], None] = {}
    while len(rows) < n:
        member = torch.rand(n, d, generator=generator).argsort(1)[:, :k].sort(1).values
        if middle:
            inside = torch.zeros(n, d, dtype=torch.bool).scatter_(1, member, True)
            inside = torch.where(inside[:, :1], inside, ~inside)
            member = inside.nonzero()[:, 1].view(n, k)
        for row in member.tolist():
            if len(rows) < n:
                rows[tuple(row)] = None
    return torch.zeros(n, d, dtype=torch.bool).scatter_(1, torch.tensor(list(rows)), True)
