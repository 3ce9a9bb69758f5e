"""One file a method; `contract.Method` says what such a file states."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from infoutil_fast.contract import Method
from infoutil_fast.types import one_of


def available() -> tuple[str, ...]:
    """Names of the methods: the files of this folder."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


def load(name: str) -> Method:
    """A method by name. Raises `InputError` with the known names, and for a file that breaks the contract."""
    one_of("method", name, available())
    return Method.of(import_module(f"{__name__}.{name}"))
