"""Sources and teachers that several tests share; trained once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infoutil_fast.data import Source, open_source
from infoutil_fast.demo import TEACHER
from infoutil_fast.train import Recipe, teach

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def digits() -> Source:
    return open_source("digits")


@pytest.fixture(scope="session")
def digits_teacher(digits: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small net well above chance on the digits."""
    out = tmp_path_factory.mktemp("teacher") / "digits"
    recipe = Recipe(net="convnet2-w16", epochs=3, batch=64, save_epochs=(1,))
    last = teach(digits, recipe, out, device=CPU, dtype=torch.float32, progress=False)
    assert last["accuracy"] > 0.6
    return out


@pytest.fixture(scope="session")
def demo_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's own teacher."""
    out = tmp_path_factory.mktemp("teacher") / "demo"
    last = teach(open_source("demo"), TEACHER, out, device=CPU, dtype=torch.float32, progress=False)
    assert last["accuracy"] > 0.8
    return out
