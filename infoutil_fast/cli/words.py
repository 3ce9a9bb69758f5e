"""The words of a command line as its parser takes them: commands and options by name, with the nearest one where there is none."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from infoutil_fast.types import InputError, nearest


class Parser(argparse.ArgumentParser):
    """Refuses in one line, by `InputError`, instead of with its usage."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("infoutil").strip()
        unknown = re.match(r"unrecognized arguments: .*?(-\S+)", message)
        if unknown:
            option = unknown[1].partition("=")[0]
            message = f"no option {option}{nearest(option, self._option_string_actions)}"
        message = re.sub(r"^argument (?:-\S+/)?--([\w-]+): must be", lambda m: f"{m[1].replace('-', '_')} must be", message)
        raise InputError(f"{command}{': ' * bool(command)}{message} (`{self.prog} --help` says what there is)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value!r} is not known{nearest(str(value), known)}; known: {', '.join(known)}")

    def kinds(self) -> dict[str, Parser]:
        """The commands below this one by name; none for one that takes options."""
        below: Iterable[argparse._SubParsersAction[Parser]] = (
            action for action in self._actions if isinstance(action, argparse._SubParsersAction)
        )
        return next((dict(action.choices) for action in below), {})


def parsed(whole: Parser, words: Sequence[str], anywhere: Sequence[str]) -> argparse.Namespace:
    """`words` as the command that they name takes them: its files in any place among its options, those `anywhere` before the command too.

    Raises `InputError` for what it does not take.
    """
    left, first = list(words), 0
    while first < len(left) and left[first] in anywhere:
        first += 1
    left = left[first:] + left[:first]
    chosen = whole
    while kinds := chosen.kinds():
        if not left or left[0].startswith("-"):
            chosen.parse_args(left[:1])  # --help, --version, or the error that says what is missing
        name = left.pop(0)
        if name not in kinds:
            chosen.error(f"no command {name!r}{nearest(name, kinds)}; there are {', '.join(kinds)}")
        chosen = kinds[name]
    return chosen.parse_intermixed_args(left)
