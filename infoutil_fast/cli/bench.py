"""`infoutil bench methods` and `infoutil bench memory`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infoutil_fast.benchmarks import compare, counted_memory
from infoutil_fast.benchmarks.entrants import Settings
from infoutil_fast.benchmarks.tables import as_text
from infoutil_fast.cli.options import add_options, given, running
from infoutil_fast.synthesis.synthetic import Matching

Show = Callable[[Any, str], None]


def add(commands: Any, common: Sequence[argparse.ArgumentParser], running: Sequence[argparse.ArgumentParser]) -> None:
    """Add `bench` and its sub-commands; `common` and `running` are the parents of those."""
    kinds = commands.add_parser("bench", help="measure the methods side by side").add_subparsers(required=True, metavar="what")
    methods = kinds.add_parser("methods", parents=running, help="seconds, memory and accuracy of InfoUtil, RDED, random, TESLA and MTT")
    methods.add_argument("source", help="folder, .npz, CIFAR batches, digits or demo")
    methods.add_argument("out", type=Path, help="folder of the rows, the sets and the plot; what is there is not measured again")
    methods.add_argument(
        "--teacher", required=True, help="of infoutil, rded and random: checkpoint or its folder, torchvision:NAME, timm:NAME"
    )
    methods.add_argument("--experts", required=True, help="of tesla and mtt: folder of `infoutil experts`")
    add_options(methods, Settings, skip=("matching",))
    trajectories = methods.add_argument_group("settings of tesla and mtt")
    add_options(trajectories, Matching, skip=("ipc", "seed"))
    methods.set_defaults(run=_methods)

    memory = kinds.add_parser("memory", parents=common, help="memory of tesla and mtt at any scale, counted tensor by tensor")
    memory.add_argument("--check", action="store_true", help="also count at the full scale (that needs the memory)")
    add_options(memory, counted_memory.Problem)
    memory.set_defaults(run=_memory)


def _methods(args: argparse.Namespace, show: Show) -> None:
    own = given(args)
    matching = {name: own.pop(name) for name in Matching.__dataclass_fields__ if name in own and name not in ("ipc", "seed")}
    rows = compare.methods(
        args.source,
        args.teacher,
        args.experts,
        args.out,
        Settings(matching=matching, **own),
        **running(args),
    )
    show(rows, f"{as_text(rows)}\n{args.out / 'rows.jsonl'}, {args.out / 'methods.png'}")


def _memory(args: argparse.Namespace, show: Show) -> None:
    problem = counted_memory.Problem(**given(args))
    found = counted_memory.peak(problem)
    if args.check:
        found["counted_bytes"] = max(counted_memory.line(problem))
    show({**vars(problem), **found}, f"{found['peak_bytes'] / 1e9:.3f} GB at the peak of {problem.method}: {found}")
