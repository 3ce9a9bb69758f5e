"""Which windows and which direction at factor 1: students on a set made of training images, tested on training images held out.

python bench/choice.py SOURCE --teacher TEACHER --work FOLDER --results bench/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from infoutil_fast import distill, evaluate, open_source
from infoutil_fast.data import Split
from infoutil_fast.runtime.memory import keep_freed_memory

HELD_OUT = 5000  # the last training images; the teacher has seen them, so only differences between rows mean something
ROWS = {
    "random images": {"method": "random"},
    "whole images, low": {"window": 4, "direction": "low"},
    "whole images, high": {"window": 4, "direction": "high"},
    "three quarters, low": {"window": 3, "direction": "low"},
    "half, low": {"window": 2, "direction": "low"},
    "half, high": {"window": 2, "direction": "high"},
}


def part(split: Split, positions: np.ndarray) -> Split:
    names = tuple(split.names[i] for i in positions)
    return Split(names, split.labels[positions], lambda i: split.read(int(positions[i])))


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
    count = len(whole.train.labels)
    positions = np.arange(count)
    source = replace(whole, train=part(whole.train, positions[:-HELD_OUT]), val=part(whole.train, positions[-HELD_OUT:]))
    for name, options in ROWS.items():
        path = args.work / name.replace(", ", "-").replace(" ", "-")
        distill(source, args.teacher, path, ipc=10, pool=args.pool, factor=1, progress=False, **options)
        for ipc in (1, 10):
            found = evaluate(path, source=source, seeds=1, ipc=ipc, progress=False)
            row = {
                "row": name,
                "pool": args.pool,
                **{key: found[key] for key in ("ipc", "mean", "seeds", "epochs", "dtype", "versions", "date")},
            }
            with open(args.results, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}, ipc {ipc}: {100 * found['mean']:.1f}", flush=True)


if __name__ == "__main__":
    main()
