"""Coalition designs: which patches each evaluation keeps, and the linear maps from payoffs to Shapley values and to their own error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Generator, Tensor

from infoutil_fast.hadamard import hadamard, order
from infoutil_fast.types import Coalitions, InputError, one_of

GROUPS = 8  # of evaluations that the jackknife leaves out in turn
# Column orders of the Hadamard blocks of 16 patches, one hexadecimal digit a patch. Each is the best of 1,200 random ones after those
# before it, on exact games of a ConvNet-3 and a ResNet-20 on CIFAR-10; on other images and nets they err 4 to 18 % less than others.
ORDERS = (
    "e3c2d19b64750a8f",
    "624c359a0e18d7bf",
    "f5319460aec72d8b",
    "40acd185b27fe369",
    "eda048693c7b52f1",
    "5ab0368719f2dc4e",
    "ba76d5ec2419830f",
    "cf17e506329b4ad8",
)
_ORDER_SEED = 2601  # of the orders beyond these, and of other numbers of patches


def plan(design: str | Coalitions, d: int, evaluations: int | None = None, generator: Generator | None = None) -> Coalitions:
    """Coalitions of `d` patches by name; `evaluations=None` is the design's own number.

    A design takes at most `evaluations`: what does not make a whole pair or permutation is left unused. All but `border_hadamard` and
    `exact` draw from `generator`. Raises `InputError` for an unknown name, too few evaluations, or too many patches.
    """
    if isinstance(design, Coalitions):
        if design.masks.shape[1] != d:
            raise InputError(f"the coalitions given are of {design.masks.shape[1]} patches, the images have {d}")
        return design
    one_of("design", design, DESIGNS)
    if d < 1:
        raise InputError(f"a design needs at least 1 patch, not {d}")
    if design == "exact":
        return exact(d)
    if design == "border_hadamard":
        return border_hadamard(d, evaluations)
    if evaluations is None:
        evaluations = 25 if design == "captum" else own_size(d)
    return SAMPLED[design](d, evaluations, generator)


def own_size(d: int) -> int:
    """Evaluations of the border and one Hadamard block: 64 for 16 patches."""
    return 2 + 2 * d + 2 * (order(d) - 1)


@lru_cache(maxsize=4)
def exact(d: int) -> Coalitions:
    """All 2^d coalitions: the definition itself (Shapley 1953; InfoUtil Eq. 4). d up to 16."""
    if not 1 <= d <= 16:
        raise InputError(f"exact enumeration takes 1 to 16 patches, not {d}")
    bits = torch.arange(1 << d)
    masks = (bits[:, None] >> torch.arange(d)) & 1 > 0  # [2^d, d]
    size = masks.sum(1)
    weights = torch.tensor([1 / (d * math.comb(d - 1, k)) for k in range(d)], dtype=torch.float64)
    gain = weights[(size - 1).clamp(min=0)]  # as S + i: C(d-1, |S|-1)
    loss = weights[size.clamp(max=d - 1)]  # as S without i: C(d-1, |S|)
    solve = torch.where(masks, gain[:, None], -loss[:, None]).T.contiguous()
    return Coalitions(masks, solve, f"exact, all {1 << d} coalitions", torch.zeros(0, d, 1 << d, dtype=torch.float64))


@lru_cache(maxsize=32)
def border_hadamard(d: int = 16, evaluations: int | None = None) -> Coalitions:
    """The deterministic design: a border of 2 + 2 d coalitions, and blocks of balanced halves from Hadamard matrices.

    Border: empty, full, singles, leave-one-outs. A block: the rows of a Hadamard matrix whose columns are the patches in some order
    (columns left over are deleted), and their complements: 30 for 16 patches, so 34 + 30 k evaluations; a budget between takes a part of
    the last block. By default border and one block, or all coalitions where these are fewer. `phi` is the weighted least squares over both
    parts under efficiency, the border counting `border_share`. It is exact for games with interactions of at most two patches.

    `spread` is the disagreement of the blocks with each other; of one block with the border; or of the border's halves.
    """
    n = order(d)
    border, budget = 2 + 2 * d, own_size(d) if evaluations is None else evaluations
    if budget >= 1 << d:
        return exact(d)
    if budget < border:
        raise InputError(f"border_hadamard takes at least {border} evaluations for {d} patches (2 + 2 a patch), not {budget}")
    pairs = (budget - border) // 2
    blocks, part = divmod(pairs, n - 1)
    eye = torch.eye(d, dtype=torch.bool)
    masks = [torch.zeros(1, d, dtype=torch.bool), torch.ones(1, d, dtype=torch.bool), eye, ~eye]
    for k in range(blocks + (part > 0)):
        half = hadamard(n)[1:, column_order(k, d)] > 0  # [n - 1, d]
        half = half[: part if k == blocks else None]
        masks += [half, ~half]
    counted = max(1.0, pairs / (n - 1))
    share = border_share(d, counted)
    weight = torch.full((border + 2 * pairs,), (1 - share) * 4 / n / counted, dtype=torch.float64)
    weight[:2], weight[2:border] = 0, share
    every = torch.cat(masks)
    solve = least_squares(every, weight)
    name = f"border_hadamard, {border} border + {2 * pairs} of Hadamard order {n}"
    return Coalitions(every, solve, name, _block_spread(every, share, border, n, blocks))


def border_share(d: int, blocks: float) -> float:
    """Weight of the border beside the Hadamard part: a quadrature over coalition sizes, and a little more while the blocks are few.

    The mean of the estimates of sizes k and d - k is close to A + B (k - d/2)^2. The share makes border (size 1) and halves together see
    the mean of (k - d/2)^2 over k = 1 .. d - 1: for balanced halves d (d - 2) / 12 / (d/2 - 1)^2, 8/21 at 16 patches. That is right for
    many blocks; a single one is noisier than the border, and on games of real nets the best share was higher by 21 % / blocks.
    """
    half = (hadamard(order(d))[1:, :d] > 0).sum(1).double()
    seen = float((half - d / 2).square().mean())
    wanted, border = d * (d - 2) / 12, (d / 2 - 1) ** 2
    share = (wanted - seen) / (border - seen) if border > seen else 0.4
    return min(1.0, max(0.0, share) * (1 + 0.21 / blocks))


def column_order(k: int, d: int) -> Tensor:
    """Which column of the Hadamard matrix stands for each patch, in block `k`: [d]. Fixed, so that every image meets the same masks."""
    if d == 16 and k < len(ORDERS):
        return torch.tensor([int(digit, 16) for digit in ORDERS[k]])
    return torch.randperm(order(d), generator=Generator().manual_seed(_ORDER_SEED + k))[:d]


def _block_spread(masks: Tensor, share: float, border: int, n: int, blocks: int) -> Tensor:
    """Linear maps [k, d, M] whose squared results add up to an estimate of the squared error.

    The factors .4, .3, 1.2 and .11 are fitted to games of real nets, so that the median estimate is near the true error or above.
    """

    def alone(start: int, stop: int) -> Tensor:
        rows = torch.arange(len(masks))
        return least_squares(masks, ((rows >= start) & (rows < stop)).double())

    if blocks == 0:  # the singles against the leave-one-outs
        middle = (2 + border) // 2
        return 0.4 * (alone(2, middle) - alone(middle, border))[None]
    size = 2 * (n - 1)
    found = torch.stack([alone(border + k * size, border + (k + 1) * size) for k in range(blocks)])
    if blocks == 1:  # the border against the block
        return 0.3 * (alone(2, border) - found)
    chance = 1.2 * (found - found.mean(0)) * (1 - share) / math.sqrt(blocks * (blocks - 1))
    return torch.cat([chance, 0.11 * (alone(2, border) - found.mean(0))[None]])  # and what no further block repairs


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
DESIGNS = ("border_hadamard", *SAMPLED, "exact")


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
