"""The accuracy table: every method at every ipc, each seed with its own selection and its own student.

    python bench/table.py SOURCE --teacher TEACHER --early EARLY --work FOLDER --results bench/results/NAME.jsonl

One set of the largest ipc is made for each method and seed; smaller ipcs are its first images, which at factor 1 are the same
set (windows are kept best first). A run cut short goes on where it stopped. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

from infoutil_fast import distill, evaluate, open_source
from infoutil_fast.runtime.memory import keep_freed_memory

SETS: dict[str, dict[str, Any]] = {
    "random images": {"method": "random", "windows": "whole"},
    "random crops": {"method": "random", "windows": "random"},
    "rded": {"method": "rded"},
    "infoutil": {"method": "infoutil"},
    "infoutil paper": {"method": "infoutil", "preset": "paper"},
    "paper, no shapley": {"method": "infoutil", "preset": "paper", "windows": "random"},
    "paper, no norm": {"method": "infoutil", "preset": "paper", "score": "random"},
    "paper, no noise": {"method": "infoutil", "preset": "paper", "noise": 0.0},
    "paper, low": {"method": "infoutil", "preset": "paper", "direction": "low"},
    "paper, medium": {"method": "infoutil", "preset": "paper", "direction": "medium"},
    "paper, whole images": {"method": "infoutil", "preset": "paper", "window": 4},
}
DEFAULT = ("random images", "random crops", "rded", "infoutil", "infoutil paper", "infoutil paper, early labels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--early", help="labels of the rows that say so")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(DEFAULT), choices=[*SETS, "infoutil paper, early labels"])
    parser.add_argument("--ipc", nargs="+", type=int, default=[1, 10, 50])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--student", default="convnet3")
    parser.add_argument("--labels", default="online")
    parser.add_argument("--recipe", default="rded")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_freed_memory()
    source = open_source(args.source)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    for seed in args.seeds:
        for name in args.rows:
            early = name.endswith(", early labels")
            base = name.removesuffix(", early labels")
            path = args.work / f"{base.replace(' ', '-')}-{seed}"
            shared = {"row": name, "seed": seed, "student": args.student, "labels": args.labels, "recipe": args.recipe}
            keys = [{**shared, "ipc": ipc} for ipc in args.ipc if not (early and ipc >= 50)]  # there the paper takes the converged teacher
            keys = [key for key in keys if not any(all(row[k] == v for k, v in key.items()) for row in done)]
            if keys:
                distill(source, args.teacher, path, ipc=max(args.ipc), factor=1, seed=seed, workers=2, **SETS[base])
            for key in keys:
                ipc = key["ipc"]
                found = evaluate(
                    path,
                    student=args.student,
                    seeds=1,
                    seed=seed,
                    ipc=ipc,
                    labels=args.labels,
                    recipe=args.recipe,
                    teacher=args.early if early else args.teacher,
                    source=source,
                )
                done.append(
                    {**key, "source": source.name, **cost(path), **{k: found[k] for k in found if k not in ("best", "labels", "recipe")}}
                )
                with open(args.results, "a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
                logging.info("%s, ipc %d, seed %d: %.2f", name, ipc, seed, 100 * found["mean"])
    print(table(done, args.ipc))


def cost(path: Path) -> dict[str, Any]:
    """Seconds by stage over all classes, and the highest peak of the process by stage, of making the set."""
    lines = [json.loads(line) for line in (path / "timings.jsonl").read_text().splitlines()]
    stages = lines[0]["seconds"]
    return {
        "stage_seconds": {stage: round(sum(line["seconds"][stage] for line in lines), 2) for stage in stages},
        "stage_peak_mib": {stage: max(line["peak_bytes"][stage] for line in lines) >> 20 for stage in stages},
    }


def table(rows: list[dict[str, Any]], ipcs: list[int]) -> str:
    """Mean and deviation (n - 1) over seeds, in percent."""
    lines = ["| | " + " | ".join(f"ipc {ipc}" for ipc in ipcs) + " |", "|---" * (len(ipcs) + 1) + "|"]
    for name in dict.fromkeys(row["row"] for row in rows):
        cells = []
        for ipc in ipcs:
            found = [100 * row["mean"] for row in rows if row["row"] == name and row["ipc"] == ipc]
            spread = f" +- {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread} (n={len(found)})" if found else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
