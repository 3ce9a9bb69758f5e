"""Which windows and which direction at factor 1: students on a set made of training images, tested on training images held out.

python bench/choice.py SOURCE --teacher TEACHER --work FOLDER --results bench/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from infoutil_fast import distill, evaluate, open_source
from infoutil_fast.benchmarks.entrants import CHOICES, ENTRANTS
from infoutil_fast.runtime import rows
from infoutil_fast.runtime.memory import keep_freed_memory

HELD_OUT = 5000  # the last training images; the teacher has seen them, so only differences between rows mean something


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--pool", type=int, default=100)
    args = parser.parse_args()
    keep_freed_memory()
    whole = open_source(args.source)
    kept = len(whole.train) - HELD_OUT
    source = replace(whole, train=whole.train.of_rows(range(kept)), val=whole.train.of_rows(range(kept, len(whole.train))))
    for name in CHOICES:
        path = args.work / name.replace(", ", "-").replace(" ", "-")
        distill(source, args.teacher, path, progress=False, **ENTRANTS[name].asked(ipc=10, pool=args.pool, factor=1))
        for ipc in (1, 10):
            found = evaluate(path, source=source, seeds=1, ipc=ipc, progress=False)
            row = {
                "row": name,
                "pool": args.pool,
                **{key: found[key] for key in ("ipc", "mean", "seeds", "epochs", "dtype", "versions", "date")},
            }
            rows.append(args.results, [row])
            print(f"{name}, ipc {ipc}: {100 * found['mean']:.1f}", flush=True)


if __name__ == "__main__":
    main()
