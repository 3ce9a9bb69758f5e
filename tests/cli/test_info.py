"""`infoutil info`: what runs here, and why the rest does not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from infoutil_fast import methods
from infoutil_fast._version import __version__
from infoutil_fast.cli import info
from infoutil_fast.ops import dispatch


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return info.collect()


def test_json_gives_the_same_values_back(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found)) == found


def test_versions_threads_and_the_choice_of_auto_are_told(found: dict[str, Any]) -> None:
    assert found["version"] == __version__
    assert sys.version.startswith(found["python"])
    assert found["torch"]["version"] == str(torch.__version__)
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert found["auto"]["dtype"] in ("float32", "bfloat16")
    native = {device["name"].partition(":")[0]: device["native_bfloat16"] for device in found["devices"]}
    assert (found["auto"]["dtype"] == "bfloat16") is native[found["auto"]["device"]]


def test_the_cpu_comes_first_with_the_flags_its_bfloat16_needs(found: dict[str, Any]) -> None:
    cpu = found["devices"][0]
    assert cpu["name"] == "cpu"
    assert cpu["model"]
    assert cpu["memory_bytes"] is None or cpu["memory_bytes"] > 2**27
    assert cpu["native_bfloat16"] is bool(cpu["flags"])
    assert len(found["devices"]) == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_every_op_has_an_answer_for_every_backend(found: dict[str, Any]) -> None:
    assert "masked_patches" in found["ops"]
    for answers in found["ops"].values():
        assert set(answers) == {"torch", "triton", "cpp"}
        assert answers["torch"] is None
        assert (answers["triton"] is None) <= torch.cuda.is_available()
        assert (answers["cpp"] is None) <= (dispatch.missing("cpp") is None)


def test_a_backend_that_is_missing_or_broken_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(backend: str) -> str | None:
        if backend == "triton":
            raise ImportError("libcuda.so.1: cannot open\nmore")
        return "extension not built" if backend == "cpp" else None

    monkeypatch.setattr(dispatch, "missing", missing)
    answers = info.collect()["ops"]["masked_patches"]
    assert answers == {"torch": None, "triton": "ImportError: libcuda.so.1: cannot open", "cpp": "extension not built"}


def test_methods_come_with_their_first_line_and_nets_with_their_aliases(found: dict[str, Any]) -> None:
    assert tuple(found["methods"]) == methods.available()
    assert all(line and "\n" not in line for line in found["methods"].values())
    assert "timm:<name>" in found["nets"]
    assert any(net.startswith("resnet18_modified") for net in found["nets"])


def test_packages_have_a_version_or_a_reason(found: dict[str, Any]) -> None:
    assert set(found["packages"]) == {"triton", "torchvision", "timm", "captum", "sklearn", "opacus"}
    for package in found["packages"].values():
        assert package["version"] or package["reason"] == "not installed"


def test_a_failing_crashing_or_endless_import_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {
        "fine_one": "print('noise')",
        "wrong_torch": "raise RuntimeError('operator x::y does not exist\\nlong tail')",
        "dies": "import os; os.kill(os.getpid(), 9)",
        "needs_more": "import no_such_module_anywhere",
        "leaves": "raise SystemExit(3)",
        "endless": "import time; time.sleep(60)",
        "silent": "raise ValueError",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    reasons = info.import_reasons(list(bodies), seconds=3)
    assert list(reasons) == list(bodies)
    assert reasons["fine_one"] is None
    assert reasons["wrong_torch"] == "RuntimeError: operator x::y does not exist"
    assert reasons["needs_more"] == "ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    assert reasons["dies"] == "its import ended the interpreter with code -9"
    assert reasons["leaves"] == "its import ended the interpreter with code 3"
    assert reasons["endless"] == "its import took more than 3 s"
    assert reasons["silent"] == "ValueError: "
    assert info.import_reasons([]) == {}


def test_the_text_has_all_of_it_in_aligned_columns(found: dict[str, Any]) -> None:
    text = info.info_text(found)
    for name in (*found["ops"], *found["packages"], *found["methods"], *found["nets"], "cpu", "cuda", __version__):
        assert name in text
    lines = text.splitlines()
    assert all(line == line.rstrip() for line in lines)
    rows = lines[lines.index("packages") + 1 :][: len(found["packages"])]
    answers = [row.index("yes") if row.endswith("yes") else row.index("no: ") for row in rows]
    assert len(set(answers)) == 1


def test_the_text_says_no_with_the_reason(found: dict[str, Any]) -> None:
    changed = {
        **found,
        "ops": {"some_op": {"torch": None, "cpp": "extension not built"}},
        "packages": {"timm": {"version": None, "reason": "not installed"}},
        "devices": [{"name": "cuda:1", "model": "A GPU", "memory_bytes": None, "native_bfloat16": False, "flags": ["sm_70"]}],
    }
    lines = [line.split() for line in info.info_text(changed).splitlines()]
    assert ["some_op", "torch", "yes"] in lines
    assert ["some_op", "cpp", "no:", "extension", "not", "built"] in lines
    assert ["timm", "-", "no:", "not", "installed"] in lines
    assert ["cuda:1", "A", "GPU", "bfloat16:", "not", "native", "sm_70"] in lines
