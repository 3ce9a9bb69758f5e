"""Class names in pictures: letters beyond English differ, dollars are no formulas, bytes that are no UTF-8 can be drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infoutil_fast.drawing.overlay import contact_sheet
from infoutil_fast.drawing.sheets import histogram, sheet

ODD = "caf\udce9"  # how Python reads the byte E9 in a file's name


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 30), "red").save(tmp_path / "x.png")
    return tmp_path / "x.png"


def test_letters_differ(picture: Path) -> None:
    drawn = [[contact_sheet([(name, [picture])]), sheet([(name, [])], name)] for name in ("é", "ü", "Ω", "ж", "ß")]
    for pictures in zip(*drawn, strict=True):
        assert len({(p.size, p.tobytes()) for p in pictures}) == len(drawn)


@pytest.mark.parametrize("name", ["US$5_$10", "b$x^$c", "$", "a$_$b", ODD, "naïve"])
def test_any_name_can_be_drawn(name: str, picture: Path) -> None:
    contact_sheet([(name, [picture])])
    score, label = np.random.default_rng().random(9), np.zeros(9, np.int64)
    assert histogram(score, label, np.array([0]), (name,), "Gradient norm").startswith(b"\x89PNG")
