"""From a source and a teacher to a distilled set on disk: `distill()`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from infoutil_fast import methods
from infoutil_fast.data import Source
from infoutil_fast.models.teacher import Teacher
from infoutil_fast.pipeline.planning import Plan, joint, prepare
from infoutil_fast.sets import store
from infoutil_fast.synthesis import trajectory_matching
from infoutil_fast.synthesis.experts import Experts
from infoutil_fast.types import InputError

log = logging.getLogger(__name__)


def distill(
    source: str | Path | Source,
    teacher: str | Path | Teacher | Experts,
    out: str | Path,
    *,
    method: str = "infoutil",
    preset: str | None = None,
    label_teacher: str | Path | Teacher | None = None,
    device: str = "auto",
    dtype: str = "auto",
    workers: int = 0,
    batch: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Distil `source` with `teacher` into the folder `out` and return it; the command is `infoutil distill`.

    source, teacher, label_teacher: what `open_source` and `load_teacher` take, or the opened thing. The label teacher gives
    the soft labels (the paper's early teacher); None: the teacher. For mtt, tesla and datm the teacher is a folder of
    `infoutil experts`. preset: the method's settings as published ("paper", or "cifar10-ipc1" and the like).
    options: the fields of the method's `Config` (ipc, pool, seed, ...). device, dtype ("auto", "float32", "bfloat16"), workers
    (threads), batch (forwards at once, 0: 64 on the CPU, 512 on CUDA): how to run. A run cut short goes on class by class (mtt,
    tesla, datm: from its last checkpoint) and ends with the same bytes; under `torchrun` the ranks share the classes.

    Raises `InputError` before anything is written when something does not fit.
    """
    plan = prepare(
        source,
        teacher,
        method=method,
        preset=preset,
        label_teacher=label_teacher,
        device=device,
        dtype=dtype,
        workers=workers,
        batch=batch,
        **options,
    )
    return execute(plan, Path(out), overwrite=overwrite, progress=progress)


def execute(plan: Plan, out: Path, *, overwrite: bool = False, progress: bool = True) -> Path:
    """Make the classes that are not there yet; under `torchrun` those of this rank."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if overwrite and world > 1:
        raise InputError("--overwrite needs a single process: remove the old set first, then start torchrun")
    module = methods.load(plan.method)
    if joint(module) and world > 1:
        raise InputError(f"{plan.method} works on all classes at once: start it as one process, not {world}")
    store.begin(out, plan.meta, overwrite)
    own = range(len(plan.source.classes))[rank::world]
    todo = [label for label in own if not store.is_done(out, label)]
    done = len(own) - len(todo)
    if done:
        log.info("%s: %d classes are finished already", out, done)
    bar = tqdm(total=len(own), initial=done, desc=f"distil {plan.method}", unit="class", disable=None if progress else True)
    run = replace(plan.run, folder=out, progress=progress)
    for shard in module.distill(plan.source, plan.teacher, plan.config, todo, run) if todo else ():
        train, drawn = plan.source.train, plan.source.pool(shard.label, plan.config.pool, plan.config.seed)
        skipped = train.skipped.among(drawn)
        pool = drawn if joint(module) else np.setdiff1d(drawn, skipped)  # joint methods do not read all of it
        store.write_class(out, shard, train.names, [train.names[i] for i in pool], rank, [train.names[i] for i in skipped])
        bar.set_postfix_str(plan.source.classes[shard.label])
        bar.update()
    bar.close()
    plan.source.log_skipped()
    return out


def estimate(plan: Plan) -> dict[str, Any]:
    """What `execute` would do, with the seconds of one class measured now on few images and scaled up."""
    if isinstance(plan.teacher, Experts):
        return trajectory_matching.estimate(methods.load(plan.method).distill, plan.source, plan.teacher, plan.config, plan.run)
    trial = min(16, plan.config.pool, int(min(len(plan.source.train.of_class(c)) for c in range(len(plan.source.classes)))))
    small = replace(plan.config, ipc=1, factor=1 if trial < plan.config.factor**2 else plan.config.factor, pool=trial)
    module = methods.load(plan.method)
    start = time.perf_counter()
    shard = next(iter(module.distill(plan.source, plan.teacher, small, [0], plan.run)))
    seconds = time.perf_counter() - start
    pools: Sequence[int] = [min(plan.config.pool, len(plan.source.train.of_class(c))) for c in range(len(plan.source.classes))]
    return {
        "classes": len(plan.source.classes),
        "images_read": sum(pools),
        "images_made": plan.config.ipc * len(plan.source.classes),
        "seconds": round(seconds / trial * sum(pools), 1),
        "peak_bytes": max(shard.peak_bytes.values()),
        "measured_on": f"{trial} images",
        "label_bytes": plan.config.ipc * plan.config.factor**2 * len(plan.source.classes) ** 2 * 2,
    }
