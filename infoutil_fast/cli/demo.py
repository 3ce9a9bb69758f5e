"""The whole job on embedded data: teach, distil by each method, train students, a table, a report."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infoutil_fast.data import Source, open_source
from infoutil_fast.drawing.overlay import overlay
from infoutil_fast.pipeline.running import distill
from infoutil_fast.runtime.device import choose_device, choose_dtype
from infoutil_fast.runtime.files import write_bytes
from infoutil_fast.sets.partial import hits
from infoutil_fast.sets.report import write_report
from infoutil_fast.sets.store import folder
from infoutil_fast.training.evaluation import evaluate
from infoutil_fast.training.teaching import Recipe, teach

log = logging.getLogger(__name__)
TEACHER = Recipe(net="convnet4-w64", epochs=16, batch=64)
ROWS: dict[str, dict[str, Any]] = {
    "infoutil": {"method": "infoutil"},
    "rded": {"method": "rded"},
    "random windows": {"method": "random", "windows": "random"},
    "random images": {"method": "random", "windows": "whole", "factor": 1},
}


@dataclass(frozen=True)
class Settings:
    """Small enough for a few minutes on two cores."""

    ipc: int = 10
    factor: int = 2
    pool: int = 80
    student: str = "convnet4-w64"
    epochs: int = 100


def demo(
    out: str | Path,
    *,
    seeds: int = 3,
    device: str = "auto",
    dtype: str = "auto",
    workers: int = 0,
    progress: bool = True,
    settings: Settings = Settings(),
) -> list[dict[str, Any]]:
    """Run it in folder `out` and return one row for each method; what is finished there is not done again.

    A row: accuracy (mean and std over seeds, last epoch), hits (share of kept windows whose centre lies in the object),
    seconds by stage, peak bytes, and the report's path.
    """
    out = Path(out)
    where = choose_device(device)
    source = open_source("demo")
    taught = teach(source, TEACHER, out / "teacher", device=where, dtype=choose_dtype(dtype, where), workers=workers, progress=progress)
    rows = []
    for name, options in ROWS.items():
        path = out / name.replace(" ", "-")
        made = {"ipc": settings.ipc, "pool": settings.pool, "factor": settings.factor, **options}
        distill(source, out / "teacher", path, device=device, dtype=dtype, workers=workers, progress=progress, **made)
        asked = {"student": settings.student, "labels": "online", "epochs": settings.epochs, "seeds": list(range(seeds))}
        result = _evaluated(path, asked) or evaluate(
            path,
            student=settings.student,
            seeds=seeds,
            epochs=settings.epochs,
            source=source,
            device=device,
            dtype=dtype,
            workers=workers,
            progress=progress,
        )
        rows.append({"name": name, "teacher": taught["accuracy"], "accuracy": result["mean"], "std": result["std"], **_cost(path)})
        rows[-1].update(evaluate_seconds=result["seconds"], hits=hits(path, source), report=str(write_report(path)))
    picture(out / "infoutil", source).save(out / "demo.png")
    write_bytes(out / "table.json", (json.dumps(rows, indent=1) + "\n").encode())
    return rows


def _evaluated(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier evaluation of the set with these settings."""
    file = path / "evaluations.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return next((row for row in rows if all(row[key] == value for key, value in asked.items())), None)


def _cost(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (path / "timings.jsonl").read_text().splitlines()]
    stages = {stage: round(sum(line["seconds"].get(stage, 0.0) for line in lines), 2) for stage in lines[0]["seconds"]}
    return {"seconds": stages, "peak_bytes": max(peak for line in lines for peak in line["peak_bytes"].values())}


def picture(path: Path, source: Source) -> Image.Image:
    """A column for each class: a source image, its Shapley map with the kept window and the object's box, a distilled image."""
    side, gap = 192, 8
    sheet = Image.new("RGB", (len(source.classes) * (side + gap) - gap, 3 * (side + gap) - gap), "white")
    for label in range(len(source.classes)):
        with np.load(path / "scores" / f"{folder(label)}.npz") as kept:
            position, window, heat = int(kept["image"][0]), [int(kept[k][0]) for k in ("top", "left", "size")], kept["heat"][0]
        pixels, boxes = source.train.read(position), source.train.boxes
        column = [
            Image.fromarray(pixels),
            overlay(pixels, heat, window, None if boxes is None else boxes[position].tolist()),
            Image.open(path / "images" / folder(label) / "00000.png"),
        ]
        for row, image in enumerate(column):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (label * (side + gap), row * (side + gap)))
    return sheet


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    head = ("", "accuracy", "on object", "seconds", "peak MiB", "seconds by stage")
    body = []
    for row in rows:
        spread = "" if row["std"] is None else f" +- {100 * row['std']:.1f}"
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in row["seconds"].items())
        total = sum(row["seconds"].values())
        body.append(
            (
                row["name"],
                f"{100 * row['accuracy']:.1f}{spread}",
                f"{row['hits']:.0%}",
                f"{total:.1f}",
                f"{row['peak_bytes'] >> 20}",
                stages,
            )
        )
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in (head, *body)]
    best = rows[0]
    return "\n".join(
        [*lines, f"teacher {best['teacher']:.1%}; accuracy of students on the validation images, last epoch; report: {best['report']}"]
    )
