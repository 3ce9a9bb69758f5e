"""From a source and a teacher to a distilled set on disk: `distill()`."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from infoutil_fast import matching, methods, store
from infoutil_fast._version import __version__
from infoutil_fast.data import Source, open_source
from infoutil_fast.device import choose_device, choose_dtype
from infoutil_fast.experts import Experts
from infoutil_fast.selection import Run
from infoutil_fast.teacher import Facts, Teacher, check_accuracy, load_teacher
from infoutil_fast.types import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """All that a distillation needs, checked; nothing has been written yet."""

    source: Source
    teacher: Teacher | Experts
    method: str
    config: Any  # the method's Config
    run: Run
    meta: dict[str, Any]


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


def prepare(
    source: str | Path | Source,
    teacher: str | Path | Teacher | Experts,
    *,
    method: str = "infoutil",
    preset: str | None = None,
    label_teacher: str | Path | Teacher | None = None,
    device: str = "auto",
    dtype: str = "auto",
    workers: int = 0,
    batch: int = 0,
    **options: Any,
) -> Plan:
    """Open and check everything; write nothing."""
    module = methods.load(method)
    where = _local(choose_device(device))
    run_dtype = choose_dtype(dtype, where)
    opened = source if isinstance(source, Source) else open_source(source)
    config = configure(module, preset, options)
    main: Teacher | Experts = (
        teacher if isinstance(teacher, Teacher | Experts) else getattr(module, "open_teacher", load_teacher)(str(teacher), opened, where)
    )
    if isinstance(main, Experts) != joint(module):
        wanted = "a folder of `infoutil experts`" if joint(module) else "a teacher"
        raise InputError(f"{method} learns from {wanted}, not from {main.facts.spec or main.facts.name}")
    if joint(module) and label_teacher is not None:
        raise InputError(f"{method} makes its own labels: leave out the label teacher")
    labeller = label_teacher if isinstance(label_teacher, Teacher | None) else load_teacher(str(label_teacher), opened, where)
    config = resolve(config, main.facts.size)
    if isinstance(main, Experts):
        matching.check(main, config)
    if preset == "paper" and labeller is None and config.ipc < 50:
        log.warning("the paper labels ipc %d with an early teacher (`infoutil teach --early`): give it as label_teacher", config.ipc)
    check_pool(opened, config)
    for judge in [main] if labeller is None else [main, labeller]:
        log.info(
            "teacher %s is right on %.1f%% of a sample of %s",
            judge.facts.name,
            100 * check_accuracy(judge, opened, workers=workers),
            opened.name,
        )
    run = Run(run_dtype, batch or (512 if where.type == "cuda" else 64), workers, labeller, batch or None)
    meta = describe(opened, main, labeller, method, config, run_dtype)
    return Plan(opened, main, method, config, run, meta)


def joint(module: Any) -> bool:
    """Whether a method works on all classes at once, from experts instead of a teacher."""
    return hasattr(module, "open_teacher")


def configure(module: Any, preset: str | None, options: dict[str, Any]) -> Any:
    """The method's `Config` from its defaults, a preset and options, in this order of weakness."""
    known = {f.name for f in fields(module.Config)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"{module.__name__.rsplit('.', 1)[1]} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    presets = methods.presets(module)
    if preset is not None and preset not in presets:
        raise InputError(f"{module.__name__.rsplit('.', 1)[1]} has no preset {preset!r}; it has {', '.join(presets) or 'none'}")
    return module.Config(**{**(presets[preset] if preset else {}), **options})


def resolve(config: Any, size: int) -> Any:
    """Replace factor 0 by the rule: 2 from 96 px on, else 1; whole images are not stitched."""
    for name in ("ipc", "pool", "crops"):
        if getattr(config, name, 1) < 1:
            raise InputError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.factor == 0:
        whole = getattr(config, "windows", "") == "whole"
        config = replace(config, factor=2 if size >= 96 and not whole else 1)
    if config.factor < 0 or size % config.factor:
        raise InputError(f"factor {config.factor} does not divide a side of {size} px")
    grid = getattr(config, "grid", 1)
    if not 1 <= grid <= size:
        raise InputError(f"an image of {size} px has no grid of {grid} x {grid} patches")
    return config


def check_pool(source: Source, config: Any) -> None:
    """Every class must have, within the pool, an image for each window to keep."""
    windows = config.ipc * config.factor**2
    if config.pool < windows:
        raise InputError(
            f"ipc {config.ipc} at factor {config.factor} keeps {windows} windows of as many images, the pool is {config.pool}: raise pool"
        )
    for label, name in enumerate(source.classes):
        have = len(source.train.of_class(label))
        if have < windows:
            raise InputError(
                f"class {name!r} has {have} images, ipc {config.ipc} at factor {config.factor} needs {windows}: lower ipc or factor"
            )


def describe(
    source: Source, teacher: Teacher | Experts, labeller: Teacher | None, method: str, config: Any, dtype: torch.dtype
) -> dict[str, Any]:
    """The meta.json: all that decides the bytes of the set."""

    def about(facts: Facts) -> dict[str, Any]:
        return {key: value for key, value in asdict(facts).items() if key != "classes"}

    meta = {
        "format": store.FORMAT,
        "version": __version__,
        "method": method,
        "config": asdict(config),
        "source": {"name": source.name, "spec": source.spec, "classes": source.classes},
        "size": teacher.facts.size,
        "factor": config.factor,
        "ipc": config.ipc,
        "seed": config.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "teacher": about(teacher.facts),
        "label_teacher": None if labeller is None else about(labeller.facts),
    }
    return dict(json.loads(json.dumps(meta)))


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
        return matching.estimate(methods.load(plan.method).distill, plan.source, plan.teacher, plan.config, plan.run)
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


def _local(device: torch.device) -> torch.device:
    """Under `torchrun`, this rank's own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or str(device) != "cuda":
        return device
    return torch.device("cuda", int(rank) % torch.cuda.device_count())
