"""What a method is given besides its settings: how to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from infoutil_fast.models.teacher import Teacher


@dataclass(frozen=True)
class Run:
    """How to run, apart from what to make: none of it belongs to a method's configuration."""

    dtype: torch.dtype = torch.float32  # of the Shapley forwards; scores and labels are float32
    batch: int = 64  # forwards at once
    workers: int = 0  # threads that read images
    label_teacher: Teacher | None = None  # None: the teacher itself
    shapley_batch: int | None = None  # forwards at once of the Shapley maps; None: as many as are fastest (`forwards.ROWS`)
    folder: Path | None = None  # where joint methods keep their state; None: nowhere
    progress: bool = False  # whether joint methods draw a bar
    watch: Callable[[int], None] | None = None  # told the number of each finished iteration of a joint method
