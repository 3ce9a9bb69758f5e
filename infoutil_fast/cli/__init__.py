"""The command line: teach, experts, distill, evaluate, report, export, score, calibrate, bench, info, demo."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from infoutil_fast.cli import parser
from infoutil_fast.cli.commands import COMMANDS
from infoutil_fast.runtime.memory import keep_freed_memory
from infoutil_fast.types import InputError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after one line on standard error when the input cannot be used."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args = parser.parser(words, COMMANDS).parse_args(words)
        logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
        keep_freed_memory()
        args.run(args, lambda value, text: print(json.dumps(value) if args.json else text))
    except InputError as error:
        print(f"infoutil: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"infoutil: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "infoutil: interrupted; teach and experts go on from their last epoch, distill from its last class, "
            "calibrate from its last image, score from its last class, bench from its last row",
            file=sys.stderr,
        )
        return 130
    return 0
