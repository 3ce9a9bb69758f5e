"""Images that stand for the others of their class, by what a net's last layer sees, in an order whose every beginning is a choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infoutil_fast.types import InputError


def features(net: nn.Module, x: Tensor, batch: int = 256) -> Tensor:
    """What the net's last linear layer is given for images [n, C, H, W] (normalised), float32 [n, F] on their device.

    Raises `InputError` for a net whose last linear layer does not see one vector an image.
    """
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in net.modules() if isinstance(m, nn.Linear)]
    parts = []
    try:
        with torch.inference_mode():
            for part in x.split(batch):
                seen.clear()
                net(part)
                if not seen or seen[-1].ndim != 2 or len(seen[-1]) != len(part):
                    raise InputError(f"{type(net).__name__} has no last linear layer that sees one vector an image: no features to compare")
                parts.append(seen[-1].float())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(parts) if parts else x.new_zeros(0, 0)


def facility_location(found: Tensor, candidates: Tensor, count: int, demand: Tensor | None = None) -> Tensor:
    """`count` of `candidates` that all n images are near to, greedily: positions int64 [count], the best first.

    found: features [n, F]. Each step takes the candidate that adds most to sum_i demand_i max_j (1 + cos(i, j)) / 2 over the chosen j;
    that is within 1 - 1/e of the best choice (Nemhauser et al. 1978). candidates: positions int64 [m]. demand: weights [n] of 0 and more,
    None: all alike. Ties go to the earlier candidate. Raises `InputError` for more images than there are candidates.
    """
    enough(count, len(candidates))
    unit = F.normalize(found.double().cpu(), dim=1)
    weight = torch.ones(len(unit), dtype=torch.float64) if demand is None else demand.double().cpu()
    near = (1 + unit[candidates] @ unit.T) / 2  # [m, n]
    best = torch.zeros(len(unit), dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(count):
        gain = (near - best).clamp_min_(0) @ weight  # [m]
        gain[chosen] = -1.0  # taken already, even where nothing is left to gain
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, near[chosen[-1]])
    return candidates[chosen]


def herding(found: Tensor, candidates: Tensor, count: int) -> Tensor:
    """`count` of `candidates` whose mean feature stays nearest to that of all n images: positions int64 [count], the best first.

    Each step takes the candidate that brings the mean of the chosen nearest to the mean of all (Welling 2009; iCaRL, arXiv:1611.07725),
    features normalised to length 1. Arguments and errors as `facility_location`.
    """
    enough(count, len(candidates))
    unit = F.normalize(found.double().cpu(), dim=1)
    mean, own = unit.mean(0), unit[candidates]
    chosen: list[int] = []
    total = torch.zeros_like(mean)
    for step in range(1, count + 1):
        distance = ((total + own) / step - mean).square().sum(1)  # [m]
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + own[chosen[-1]]
    return candidates[chosen]


COVERS = {"facility": facility_location, "herding": herding}


def enough(count: int, candidates: int) -> None:
    if not 1 <= count <= candidates:
        raise InputError(f"{count} images cannot be chosen among {candidates}: raise the pool or the share of it that may be chosen")
