"""What the installed distribution holds, whether it is editable or a wheel."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points, files, version
from pathlib import Path

import infoutil_fast


def test_nothing_global_is_installed_beside_the_package() -> None:
    """`kernels` above all: that name belongs to another package. An editable install also puts the checkout itself on the path."""
    tops = {path.parts[0] for path in files("infoutil_fast") or () if ".." not in path.parts}
    ours = {top for top in tops if not top.startswith(("_editable_skbc_infoutil_fast", "infoutil_fast-", "__pycache__"))}
    assert ours <= {"infoutil_fast"}


def test_the_version_and_the_command_are_the_package_s() -> None:
    assert version("infoutil_fast") == infoutil_fast.__version__
    assert [entry.value for entry in entry_points(group="console_scripts", name="infoutil")] == ["infoutil_fast.cli:main"]


def test_the_kernels_are_found_from_another_folder(tmp_path: Path) -> None:
    code = "import infoutil_fast.kernels; print(infoutil_fast.kernels.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "infoutil_fast.kernels", done.stderr
