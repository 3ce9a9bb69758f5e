"""Files written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from infoutil_fast.types import InputError


def write_bytes(path: Path, data: bytes) -> None:
    """Write whole or not at all: to a .part file, synced, renamed. The folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):  # of a full disk it does not say which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def append_row(path: Path, row: dict[str, Any], said: str) -> None:
    """A line of JSON more. Raises `InputError` with the row in it, and what it says, where the disk does not take it: nothing is lost."""
    line = json.dumps(row) + "\n"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); the result was {said}: {line.strip()}") from error
