"""A few mutated files for every reader; `python tests/fuzzing.py --seconds N` tries many more."""

from __future__ import annotations

import pytest
from fuzzing import READERS, tries


@pytest.mark.filterwarnings("ignore")  # what Pillow says of damaged files while they are made
@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused(name: str, seed: int) -> None:
    if name == "SVHN mat":
        pytest.importorskip("scipy")
    for tried, outcome in tries(name, iter(range(seed, seed + 25))):
        assert outcome in ("read", "refused"), f"attempt({name!r}, {tried})"
