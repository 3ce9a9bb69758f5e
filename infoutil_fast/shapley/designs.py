"""Coalition designs: which patches each evaluation keeps, and the linear maps from payoffs to Shapley values and to their own error."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Generator, Tensor

from infoutil_fast.shapley.hadamard import hadamard, order
from infoutil_fast.shapley.sampling import SAMPLED, least_squares
from infoutil_fast.types import Coalitions, InputError, one_of

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


DESIGNS = ("border_hadamard", *SAMPLED, "exact")
