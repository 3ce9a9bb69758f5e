"""The demo: four methods side by side, and nothing done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from conftest import DEMO_TEACHER
from PIL import Image

from infoutil_fast.benchmarks.entrants import DEMO
from infoutil_fast.cli.demo import DemoSettings, demo, demo_table

SMALL = DemoSettings(ipc=2, pool=10, epochs=2, teacher=DEMO_TEACHER)


def test_demo_makes_sets_students_table_report_and_picture(demo_teacher, tmp_path):
    out = tmp_path / "demo"
    shutil.copytree(demo_teacher, out / "teacher")  # its run is complete: the demo goes on from there
    rows = demo(out, seeds=2, progress=False, settings=SMALL)
    assert [row["name"] for row in rows] == list(DEMO)
    for row in rows:
        assert 0 < row["accuracy"] < 1
        assert 0 <= row["hits"] <= 1
        assert set(row["seconds"]) >= {"read", "cut", "label"}
        assert row["peak_bytes"] > 1 << 20
        assert Path(row["report"]).read_text().startswith("<!doctype html>")
    assert json.loads((out / "table.json").read_text()) == rows
    with Image.open(out / "demo.png") as picture:
        assert picture.size == (8 * 200 - 8, 3 * 200 - 8)
    text = demo_table(rows)
    assert all(name in text for name in DEMO)
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*.npz")}
    again = demo(out, seeds=2, progress=False, settings=SMALL)
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.npz")} == made
