"""From a source and a teacher to a distilled set on disk: `distill()`."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from infoutil_fast import methods
from infoutil_fast._version import __version__
from infoutil_fast.contract import Run
from infoutil_fast.data import Source, open_source
from infoutil_fast.models.teacher import Facts, Teacher, check_accuracy, load_teacher
from infoutil_fast.runtime.device import choose_device, choose_dtype
from infoutil_fast.sets import store
from infoutil_fast.synthesis import trajectory_matching
from infoutil_fast.synthesis.experts import Experts
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
        trajectory_matching.check(main, config)
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


def _local(device: torch.device) -> torch.device:
    """Under `torchrun`, this rank's own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or str(device) != "cuda":
        return device
    return torch.device("cuda", int(rank) % torch.cuda.device_count())
