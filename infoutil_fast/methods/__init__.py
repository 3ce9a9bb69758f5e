"""One file a method: its first docstring line is the help, its frozen `Config` the options, its `distill` the algorithm."""

from __future__ import annotations

import inspect
import pkgutil
import re
from dataclasses import fields
from importlib import import_module
from types import ModuleType
from typing import Any

from infoutil_fast.types import one_of


def available() -> tuple[str, ...]:
    """Names of the methods: the files of this folder."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


def load(name: str) -> ModuleType:
    """The module of a method. Raises `InputError` with the known names."""
    one_of("method", name, available())
    return import_module(f"{__name__}.{name}")


def presets(module: ModuleType) -> dict[str, dict[str, Any]]:
    """A method's published settings by name: its `PRESETS`, or its `PAPER` as "paper"."""
    return dict(getattr(module, "PRESETS", {"paper": module.PAPER} if hasattr(module, "PAPER") else {}))


def comments(config: type) -> dict[str, str]:
    """The comment behind each field of a configuration: its documentation, and the help of its option."""
    source = "".join(inspect.getsource(base) for base in reversed(config.__mro__[:-1]))  # shared settings first, its own win
    found = {m[1]: m[2].strip() for m in re.finditer(r"^ +(\w+):[^#\n]*#(.*)$", source, re.MULTILINE)}
    return {f.name: found.get(f.name, "") for f in fields(config)}
