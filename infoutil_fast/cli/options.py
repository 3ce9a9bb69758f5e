"""Options of the command line from the fields of a dataclass."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any


def add_options(parser: argparse._ActionsContainer, config: type, skip: Sequence[str] = ()) -> None:
    """An option for each field of a dataclass, its comment as help; only those given end up among the parsed arguments.

    skip: fields that get none.
    """
    for f in fields(config):
        if f.name in skip:
            continue
        default = f.default if f.default is not MISSING else None
        kind: Any = type(default)
        option: dict[str, Any] = {"dest": f"field_{f.name}", "default": argparse.SUPPRESS}
        if kind is bool:
            option["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            element: Any = str if "str" in str(f.type) else int
            option.update(type=lambda text, element=element: tuple(element(v) for v in text.split(",")), metavar="A,B")
            default = ",".join(map(str, default)) if default else default
        else:
            option.update(type=kind, metavar=kind.__name__.upper())
        help_text = f"{comments(config)[f.name]} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=help_text, **option)


def comments(config: type) -> dict[str, str]:
    """The comment behind each field of a configuration: its documentation, and the help of its option."""
    source = "".join(inspect.getsource(base) for base in reversed(config.__mro__[:-1]))  # shared settings first, its own win
    found = {m[1]: m[2].strip() for m in re.finditer(r"^ +(\w+):[^#\n]*#(.*)$", source, re.MULTILINE)}
    return {f.name: found.get(f.name, "") for f in fields(config)}


def given(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `add_options`."""
    return {key.removeprefix("field_"): value for key, value in vars(args).items() if key.startswith("field_")}
