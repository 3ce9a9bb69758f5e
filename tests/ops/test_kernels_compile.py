"""Every kernel compiles ahead of time for sm_80 and sm_90, without a GPU, within the resources that its tiles were chosen for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CODE = """
import dataclasses, json
from infoutil_fast.kernels.resources import measure
print(json.dumps([dataclasses.asdict(row) for row in measure()]))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    patch = pytest.MonkeyPatch()
    patch.delenv("TRITON_INTERPRET", raising=False)  # a process that interprets cannot compile
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    patch.undo()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_file_is_compiled_for_both_architectures(rows: list[dict]) -> None:
    files = {path.stem for path in (Path(__file__).parents[2] / "kernels").glob("*.py")} - {"__init__", "resources"}
    compiled = {(row["kernel"].split()[0], row["arch"]) for row in rows}
    assert compiled == {(name, arch) for name in files for arch in (80, 90)}


def test_no_kernel_spills_or_asks_for_more_than_a_block_may_have(rows: list[dict]) -> None:
    for row in rows:
        assert row["local"] == 0, row
        assert row["registers"] * row["warps"] * 32 * 2 <= 65536, f"fewer than two blocks fit on a multiprocessor: {row}"
        assert row["shared"] <= 100 * 1024, row


@pytest.mark.parametrize("kernel", ["assemble_patterns", "masked_patches"])
def test_values_are_stored_16_bytes_at_a_time(rows: list[dict], kernel: str) -> None:
    assert {row["store_bits"] for row in rows if row["kernel"].startswith(kernel)} == {128}
