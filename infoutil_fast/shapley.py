"""Shapley values of the patches of an image: coalition designs with a linear readout, and the batched evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from infoutil_fast.device import autocast, evaluating
from infoutil_fast.ops import masked_patches
from infoutil_fast.types import Coalitions, InputError, one_of

PAYOFFS: dict[str, Callable[[Tensor], Tensor]] = {  # logits [N, C] -> payoff of every class [N, C]
    "logit": lambda z: z,
    "log_probability": lambda z: z.log_softmax(1),
    "probability": lambda z: z.softmax(1),
}
BORDER_WEIGHT = 8 / 21  # quadrature over coalition sizes, estimators.md section 5: (mean of (k-8)^2) / 49 over k = 1..15
# Column orders of the Hadamard blocks: fixed, so that every image meets the same masks. The natural order lines up with the grid.
_ORDER_SEED = 2601


@lru_cache(maxsize=32)
def border_hadamard(d: int = 16, evaluations: int = 64) -> Coalitions:
    """The deterministic design for 16 patches: 34 border coalitions and `(evaluations - 34) // 30` Hadamard blocks of 30.

    Border: empty, full, singles, leave-one-outs. A block: the 15 balanced halves of a 16 x 16 Hadamard matrix and their
    complements. `phi = 8/21 border + 13/21 mean of blocks`, exact for games with interactions of at most two patches.
    """
    if d != 16:
        raise InputError(f"border_hadamard is a design for 16 patches, not {d}: use design='exact' (up to 16) or 'captum'")
    blocks, rest = divmod(evaluations - 34, 30)
    if blocks < 0 or rest:
        raise InputError(f"border_hadamard takes 34 + 30 k evaluations (34, 64, 94, ...), not {evaluations}")
    eye = torch.eye(d, dtype=torch.bool)
    masks = [torch.zeros(1, d, dtype=torch.bool), torch.ones(1, d, dtype=torch.bool), eye, ~eye]
    efficiency = torch.zeros(d, 2, dtype=torch.float64)  # Delta / d, from the values of empty and full
    efficiency[:, 0], efficiency[:, 1] = -1 / d, 1 / d
    # border: a_i = (v(i) - v0 + v1 - v(N - i)) / 2, phi = a - mean(a) + Delta / d; v0 and v1 cancel in a - mean(a)
    centred = (torch.eye(d, dtype=torch.float64) - 1 / d) / 2
    share = BORDER_WEIGHT if blocks else 1.0
    solve = [efficiency, share * centred, -share * centred]
    generator = Generator().manual_seed(_ORDER_SEED)
    for _ in range(blocks):
        half = _hadamard(d)[1:, torch.randperm(d, generator=generator)]  # [15, d] of +-1
        masks += [half > 0, half < 0]
        # phi_i = sum_r h_ri o_r / 8, o_r = (v(S_r) - v(complement)) / 2
        block = (1 - share) / blocks * half.T.double() / d  # [d, 15]
        solve += [block, -block]
    return Coalitions(torch.cat(masks), torch.cat(solve, 1), "border_hadamard")


def _hadamard(n: int) -> Tensor:
    """Sylvester's matrix [n, n] of +-1, n a power of two."""
    h = torch.ones(1, 1, dtype=torch.int64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def captum(d: int, evaluations: int = 25, generator: Generator | None = None) -> Coalitions:
    """Captum's KernelShap: i.i.d. unpaired coalitions, the two ends among the `evaluations`, intercept, ends weighted 1e6.

    Sizes k with probability in proportion to (d - 1) / (k (d - k)), then a uniform set of that size (captum 0.9, kernel_shap.py).
    The solve is the minimum-norm weighted least squares, so that a rank-deficient draw has an answer.
    """
    if evaluations < 3 or d < 2:
        raise InputError(f"captum needs at least 2 patches and 3 evaluations, not {d} and {evaluations}")
    k = torch.arange(1, d, dtype=torch.float64)
    sizes = 1 + torch.multinomial((d - 1) / (k * (d - k)), evaluations - 2, replacement=True, generator=generator)  # [M-2]
    ranks = torch.rand(evaluations - 2, d, generator=generator).argsort(1).argsort(1)  # [M-2, d]
    ends = torch.tensor([[True], [False]]).expand(2, d)
    masks = torch.cat([ends, ranks < sizes[:, None]])
    weight = torch.ones(evaluations, dtype=torch.float64)
    weight[:2] = 1e6
    root = weight.sqrt()[:, None]
    design = torch.cat([torch.ones(evaluations, 1, dtype=torch.float64), masks.double()], 1)  # [M, 1 + d]
    solve = torch.linalg.pinv(root * design, rtol=1e-12)[1:] * root.T
    return Coalitions(masks, solve, "captum")


@lru_cache(maxsize=4)
def exact(d: int) -> Coalitions:
    """All 2^d coalitions: the definition itself (infoutil.md, Eq. 4). d up to 16."""
    if not 1 <= d <= 16:
        raise InputError(f"exact enumeration takes 1 to 16 patches, not {d}")
    bits = torch.arange(1 << d)
    masks = (bits[:, None] >> torch.arange(d)) & 1 > 0  # [2^d, d]
    size = masks.sum(1)
    weights = torch.tensor([1 / (d * math.comb(d - 1, k)) for k in range(d)], dtype=torch.float64)
    gain = weights[(size - 1).clamp(min=0)]  # as S + i: C(d-1, |S|-1)
    loss = weights[size.clamp(max=d - 1)]  # as S without i: C(d-1, |S|)
    return Coalitions(masks, torch.where(masks, gain[:, None], -loss[:, None]).T.contiguous(), "exact")


def plan(design: str | Coalitions, d: int, evaluations: int | None = None, generator: Generator | None = None) -> Coalitions:
    """Coalitions by name; `evaluations=None` is the design's own number (64, 25, 2^d)."""
    if isinstance(design, Coalitions):
        return design
    one_of("design", design, ("border_hadamard", "captum", "exact"))
    if design == "border_hadamard":
        return border_hadamard(d, evaluations or 64)
    if design == "captum":
        return captum(d, evaluations or 25, generator)
    return exact(d)


def patch_shapley(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    grid: int | tuple[int, int] = 4,
    design: str | Coalitions = "border_hadamard",
    evaluations: int | None = None,
    payoff: str = "logit",
    fill: float | Tensor = 0.0,
    dtype: torch.dtype = torch.float32,
    batch: int = 128,
    generator: Generator | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> Tensor:
    """Shapley value of every patch of a grid for the payoff of each image's target class.

    images [N, C, H, W]: normalised, on the model's device. targets [N] int64. grid: patches a side, or (rows, columns).
    fill: what a left-out patch shows, a number, [C], [C, H, W] or [N, C, H, W]; 0 is the mean colour of normalised images.
    dtype: of the forward passes; the payoffs are read out in float64. batch: forwards at once. The sampled design draws
    anew for every image, the fixed ones use the same masks for all.

    Returns float32 [N, rows, columns]. The model runs in eval mode and is left as it was.
    Raises `InputError` for an image smaller than the grid, an unknown design or payoff, or targets that do not fit.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    one_of("payoff", payoff, tuple(PAYOFFS))
    if targets.shape != images.shape[:1]:
        raise InputError(f"{len(images)} images need as many targets, not shape {tuple(targets.shape)}")
    d = rows * columns
    fixed = None if design == "captum" else plan(design, d, evaluations).to(images.device)
    at_once = max(1, batch // len(fixed.masks)) if fixed else 1  # images
    maps: list[Tensor] = []
    with evaluating(model), torch.inference_mode(), tqdm(total=len(images), desc="shapley", disable=None if progress else True) as bar:
        for i in range(0, len(images), at_once):
            part = slice(i, i + at_once)
            coalitions = fixed or plan(design, d, evaluations, generator).to(images.device)
            shown = fill[part] if isinstance(fill, Tensor) and fill.ndim == 4 else fill
            values: list[Tensor] = []
            for masks in coalitions.masks.split(batch):
                x = masked_patches(images[part], masks, (rows, columns), shown, dtype=dtype, backend=backend)
                with autocast(images.device, dtype):
                    logits = model(x)
                if not maps and not values:
                    _check_targets(logits, targets)
                payoffs = PAYOFFS[payoff](logits.double()).unflatten(0, (-1, len(masks)))  # [b, m, C]
                values.append(payoffs.take_along_dim(targets[part, None, None], 2)[..., 0])
            maps.append(torch.cat(values, 1) @ coalitions.solve.T)
            bar.update(len(values[0]))
    if not maps:
        return torch.empty(0, rows, columns, device=images.device)
    return torch.cat(maps).view(-1, rows, columns).float()


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2:
        raise InputError(f"the model must give logits [N, classes], not shape {tuple(logits.shape)}")
    if targets.is_floating_point() or int(targets.min()) < 0 or int(targets.max()) >= logits.shape[1]:
        raise InputError(f"targets must be class numbers from 0 to {logits.shape[1] - 1}, not {targets.dtype} up to {targets.max()}")
