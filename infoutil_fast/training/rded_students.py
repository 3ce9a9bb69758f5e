"""RDED's public code where it departs from the plain reading of its paper and changes a number: each departure on its own.

Source: LINs-lab/RDED, synthesize/ and validation/. What sets them all: the preset `rded-code` of `infoutil distill --method rded`,
and the recipe `rded-code` of `infoutil evaluate`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from infoutil_fast.data import Split
from infoutil_fast.types import InputError

# Rates of its students (argument.py); any other student trains at a rate of 0 there.
RATES = {
    "conv": 1e-3,
    "resnet18": 1e-3,
    "resnet50": 1e-3,
    "resnet101": 1e-3,
    "vgg11": 5e-4,
    "efficientnet_b0": 2e-3,
    "mobilenet_v2": 2.5e-3,
    "alexnet": 1e-4,
    "vit_b_16": 1e-4,
    "swin_v2_t": 1e-4,
}
BATCHES = {1: 10, 10: 50, 50: 100}  # by images per class


def resized_test(split: Split, size: int) -> Split:
    """The split with each image's short side at (size // 7) * 8 and its centre cut to `size`: 64 -> 72, 128 -> 144, 224 -> 256."""
    short = size // 7 * 8

    def read(position: int) -> np.ndarray:
        image = Image.fromarray(split.read(position))
        w, h = image.size
        if min(w, h) != short:
            w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
            image = image.resize((w, h), Image.Resampling.BILINEAR)
        left, top = round((w - size) / 2), round((h - size) / 2)
        return np.asarray(image.crop((left, top, left + size, top + size)))

    return split if short == size else replace(split, read=read)


def first_of_each(split: Split, count: int) -> Split:
    """The first `count` images of each class, in the split's own order (RDED: in the order in which the folder lists them)."""
    kept = np.sort(np.concatenate([split.of_class(label)[:count] for label in np.unique(split.labels)]))
    return split.of_rows(kept)


def default_stem(net: nn.Module) -> None:
    """Draw the 3x3 stem of a small-image ResNet as torch draws a convolution: RDED replaces it after the net's own start."""
    stem = getattr(net, "conv1", None)
    if isinstance(stem, nn.Conv2d) and stem.kernel_size == (3, 3):
        stem.reset_parameters()


def student_settings(student: str, teacher: str, classes: int, size: int, ipc: int) -> dict[str, Any]:
    """Rate, batch and test images of a class that argument.py sets for a student, by teacher, classes, side and images per class.

    Raises `InputError` where it has none: an unknown student, or another ipc than 1, 10 and 50.
    """
    small = student.removeprefix("torchvision:").replace("_modified", "").replace("-small", "")
    family = "conv" if small.startswith("conv") else small
    if family not in RATES:
        raise InputError(f"RDED's code has no rate for the student {student!r}, it would train at 0: give lr, or one of {', '.join(RATES)}")
    if ipc not in BATCHES:
        raise InputError(f"RDED's code has no batch for ipc {ipc}: give batch (it has {BATCHES} by ipc)")
    batch = 100 if classes == 200 else BATCHES[ipc] * (2 if classes in (100, 1000) else 1)
    settings: dict[str, Any] = {"lr": RATES[family], "batch": batch, "test_per_class": 50 if size >= 64 else 0}
    if (classes, size) == (100, 32) and family == "conv" and teacher.startswith("conv"):
        settings.update(lr=2e-3, batch=25)
    return settings
