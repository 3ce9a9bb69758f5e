"""The list of entrants: each can be asked of its method, and the rows that are kept belong to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from infoutil_fast import methods
from infoutil_fast.benchmarks import tables
from infoutil_fast.benchmarks.entrants import CHOICES, DEMO, ENTRANTS, FREE, MATCHING, PAPER
from infoutil_fast.drawing.plots import LINES
from infoutil_fast.runtime import rows
from infoutil_fast.scoring import calibration_plots

RESULTS = Path(__file__).parents[2] / "bench" / "results"


@pytest.mark.parametrize("name", list(ENTRANTS))
def test_every_entrant_is_a_setting_of_its_method(name):
    asked = ENTRANTS[name].asked(ipc=3, seed=5)
    module, preset = methods.load(asked.pop("method")), asked.pop("preset", None)
    config = module.configure(preset, asked)
    assert (config.ipc, config.seed) == (3, 5)
    assert all(getattr(config, key) == value for key, value in ENTRANTS[name].options.items() if key != "preset")
    assert ENTRANTS[name].colour in LINES


def test_an_entrant_s_own_options_win():
    assert ENTRANTS["random images"].asked(factor=2, ipc=7) == {"method": "random", "windows": "whole", "factor": 1, "ipc": 7}


def test_comparisons_are_parts_of_the_list():
    for part in (FREE, MATCHING, DEMO, PAPER, CHOICES):
        assert len(set(part)) == len(part) > 2
        assert set(part) <= ENTRANTS.keys()
    assert not set(FREE) & set(MATCHING)
    lines = [LINES[ENTRANTS[name].colour] for name in (*FREE, *MATCHING)]
    assert len(set(lines)) == len(lines), "each has a colour and a mark of its own"
    assert CHOICES == ("random images", "whole images, low", "whole images, high", "three quarters, low", "half, low", "half, high")


def test_kept_rows_are_of_entrants_and_are_still_drawn():
    assert {row["row"] for row in rows.read(RESULTS / "choice.jsonl")} <= set(CHOICES)
    named = {row["row"].removesuffix(", early labels") for row in rows.read(RESULTS / "cifar10.jsonl")}
    assert named <= ENTRANTS.keys()
    known = rows.read(RESULTS / "methods-cifar10.jsonl")
    assert {row["name"] for row in known if "name" in row} == {*FREE, *MATCHING}
    text = tables.methods_table(known)
    assert all(f"| {name} |" in text for name in (*FREE, *MATCHING))
    assert tables.methods_chart(known).startswith(b"\x89PNG")


@pytest.mark.parametrize("file", sorted((RESULTS / "calibration").glob("*.jsonl")), ids=lambda file: file.stem)
def test_kept_calibrations_are_still_drawn(file):
    known = rows.read(file)
    assert {row["design"] for row in known} == calibration_plots.COLOURS.keys()
    assert calibration_plots.calibration_tables(known).count("| border_hadamard |") >= 4
    assert calibration_plots.curves(known).startswith(b"\x89PNG")
