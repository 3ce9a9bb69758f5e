"""Shapley maps of files: coalitions that are drawn anew for every image come from the file's own generator, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Generator, Tensor

from infoutil_fast.shapley.maps import PatchShapley


def maps_by_file(plan: PatchShapley, images: Tensor, targets: Tensor, generators: Iterable[Generator]) -> Tensor:
    """Maps [N, rows, cols] float32 of images [N, C, H, W] for targets [N]; one generator an image, used only where `plan.redrawn`."""
    if not plan.redrawn or not len(images):
        return plan(images, targets)
    one_by_one = zip(images.split(1), targets.split(1), generators, strict=True)
    return torch.cat([plan(image, target, generator=generator) for image, target, generator in one_by_one])
