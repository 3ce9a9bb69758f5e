"""`infoutil bench`: which rows it makes, that a rerun makes none, and that the counted memory is the memory."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infoutil_fast import InputError, distill
from infoutil_fast.benchmarks import compare, counted_memory, judging, tables, timing
from infoutil_fast.benchmarks.setup import Settings
from infoutil_fast.cli import bench, main
from infoutil_fast.contract import Run
from infoutil_fast.data import Source
from infoutil_fast.synthesis.experts import ExpertRecipe
from infoutil_fast.synthesis.train_experts import train_experts
from infoutil_fast.training.teaching import Recipe, teach

CPU = torch.device("cpu")
MATCHING = {"iterations": 4, "keep_every": 2, "syn_steps": 2, "max_start": 2, "lr_img": 5.0}
SETTINGS = Settings(names=("random", "tesla exact", "mtt"), matching=MATCHING, measured=2, repeats=2, seeds=2, epochs=2, curve_epochs=2)


@pytest.fixture(scope="module")
def learned(digits: Source, tmp_path_factory) -> tuple[str, str]:
    """A teacher and two short experts."""
    folder = tmp_path_factory.mktemp("learned")
    teach(digits, Recipe(net="convnet2-w8", epochs=3), folder / "teacher", device=CPU, dtype=torch.float32, progress=False)
    recipe = ExpertRecipe(net="convnet2-w8-in", experts=2, epochs=4, lr=0.2, batch=64, keep="float16")
    train_experts(digits, recipe, folder / "experts", Run())
    return str(folder / "teacher"), str(folder / "experts")


@pytest.fixture(scope="module")
def rows(digits: Source, learned, tmp_path_factory) -> tuple[Path, list[dict]]:
    """All parts; those that start processes replaced by what they return, for a process takes seconds to start."""
    out = tmp_path_factory.mktemp("bench") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "alone", lambda function, *arguments: function(*arguments))
        patch.setattr(timing, "keep_freed_memory", lambda: None)  # of the processes that the tests do not start
        return out, compare.methods(digits, *learned, out, SETTINGS, device="cpu", dtype="float32", progress=False)


def test_every_part_has_its_rows(rows):
    found = rows[1]
    assert {row["of"] for row in tables.rows_with(found, part="teaching")} == {"teacher", "experts"}
    assert [row["repeat"] for row in tables.rows_with(found, part="cost", name="random")] == [0, 1]
    for name in ("tesla exact", "mtt"):
        (cost,) = tables.rows_with(found, part="cost", name=name)
        assert len(cost["iteration_seconds"]) == 2
        assert min(cost["iteration_seconds"]) > 0
        assert [row["iteration"] for row in tables.rows_with(found, part="curve", name=name)] == [0, 2, 4]
    kinds = [(row["name"], row["protocol"], row["seed"], row["own"]) for row in tables.rows_with(found, part="accuracy")]
    assert ("random", "online", 1, True) in kinds
    assert ("random", "common", 0, False) in kinds
    assert ("mtt", "learned", 1, True) in kinds
    assert len(kinds) == 2 * (2 + 3 + 3)
    assert all("--names 'random,tesla exact,mtt'" in row["command"] for row in found)
    assert all(row["device"] and row["versions"]["torch"] and row["threads"] for row in found)


def test_a_rerun_measures_only_what_is_missing(rows, digits, learned, monkeypatch):
    out, made = rows
    before = (out / "rows.jsonl").read_bytes()
    monkeypatch.setattr(timing, "alone", lambda *arguments: pytest.fail(f"measured again: {arguments}"))
    assert compare.methods(digits, *learned, out, SETTINGS, device="cpu", dtype="float32", progress=False) == made
    assert (out / "rows.jsonl").read_bytes() == before
    monkeypatch.setattr(timing, "alone", lambda function, *arguments: {"seconds": 1.0, "peak_bytes": 3, "loaded_bytes": 2})
    more = compare.methods(
        digits, *learned, out, replace(SETTINGS, repeats=3, parts=("cost",)), device="cpu", dtype="float32", progress=False
    )
    assert [row["repeat"] for row in more[len(made) :]] == [2]
    (out / "rows.jsonl").write_bytes(before)


def test_the_iterates_are_those_of_shorter_runs(rows, digits, learned, tmp_path):
    kept = torch.load(rows[0] / "sets" / "tesla-exact-ipc1-0" / "iterates" / "00002.pt", weights_only=True)
    short = distill(digits, learned[1], tmp_path / "short", method="tesla", ipc=1, progress=False, **{**MATCHING, "iterations": 2})
    for name in ("images", "labels", "lr"):
        assert torch.equal(kept[name], torch.load(short / f"{name}_best.pt", weights_only=True))


def test_table_and_plot_tell_what_was_measured(rows):
    text = tables.methods_table(rows[1])
    assert "| tesla exact |" in text
    assert "infoutil" not in text.split("\n- ")[0], "a method without rows has no line"
    assert tables.methods_chart(rows[1]).startswith(b"\x89PNG")
    assert tables.methods_chart([{**row, "ipc": 10} for row in rows[1]]).startswith(b"\x89PNG")


def test_projection_and_ratio_by_hand():
    """Two sets of 2 and 4 s, two iterations of 1 and 3 s, ten of them, a teacher of 60 s and experts of 600 s."""
    rows = [
        {"part": "cost", "name": "infoutil", "ipc": 1, "seconds": 2.0},
        {"part": "cost", "name": "infoutil", "ipc": 1, "seconds": 4.0},
        {"part": "cost", "name": "mtt", "ipc": 1, "settings": {"iterations": 10}, "iteration_seconds": [1.0, 3.0]},
        {"part": "teaching", "of": "teacher", "epochs": 6, "steps_of_an_epoch": 5, "step_seconds": [1.0, 2.0, 9.0]},
        {"part": "teaching", "of": "experts", "epochs": 6, "experts": 10, "steps_of_an_epoch": 5, "step_seconds": [2.0]},
    ]
    rows[-1]["published"] = {"experts": 100, "epochs": 50}
    assert tables.making(rows, "mtt", 1) == [10.0, 30.0]
    assert tables.teaching(rows, "infoutil") == 60
    assert tables.teaching(rows, "mtt") == 600
    assert tables.teaching(rows, "mtt", "published") == 50_000
    plain, taught = (tables.ratio(rows, "mtt", 1, "cost", which) for which in (False, True))
    assert plain == {"n": 4, "median": 6.25, "iqr": [pytest.approx(4.375), pytest.approx(9.375)]}  # of 2.5, 5, 7.5, 15
    assert taught["median"] == pytest.approx((610 / 62 + 630 / 64) / 2, rel=1e-3)
    assert tables.ratio(rows, "tesla exact", 1, "cost", False) is None


def test_processes_of_their_own(digits, learned):
    """Once for real: a set, and iterations, in fresh processes."""
    work = timing.Work("digits", learned[0], "random", {"ipc": 2}, "cpu", "float32")
    found = timing.alone(timing.whole_set, work)
    assert found["seconds"] > 0
    assert found["peak_bytes"] >= found["loaded_bytes"] > 0


def test_a_killed_process_is_said_so():
    with pytest.raises(InputError, match="was killed"):
        timing.alone(_die)


def _die() -> dict:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_mistakes_get_one_line(rows, learned, tmp_path, capsys):
    out = rows[0]
    words = ["bench", "methods", "digits", str(out), "--teacher", learned[0], "--experts", learned[1], "--quiet"]
    assert main([*words, "--names", "infoutil,tesla"]) == 2
    assert "'tesla' is not known" in capsys.readouterr().err
    assert main([*words, "--preset", "nothing"]) == 2
    assert "cifar10-ipc1" in capsys.readouterr().err
    other = json.loads((out / "meta.json").read_text())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "meta.json").write_text(json.dumps({**other, "teacher": "0"}))
    assert main([*words[:3], str(tmp_path / "b"), *words[4:]]) == 2
    assert "another teacher" in capsys.readouterr().err
    assert main([*words[:3], str(Path(learned[0])), *words[4:]]) == 2
    assert "holds no rows" in capsys.readouterr().err


def test_students_see_the_iterate_and_not_its_rounding(rows, digits, learned):
    assert judging.COMMON_LR > 0
    row = tables.rows_with(rows[1], part="curve", name="mtt", iteration=0)[0]
    assert row["lr"] == pytest.approx(0.01), "the step size at the start"
    assert len(row["last"]) == 2


PROBLEM = counted_memory.Problem(net="convnet2-w8-in", size=12, classes=5, images=9, batch=9, steps=3)


@pytest.mark.parametrize("method", list(counted_memory.GRADIENTS))
def test_counts_on_few_images_scale_to_the_count_on_many(method):
    problem = replace(PROBLEM, method=method)
    assert counted_memory.peak(problem)["peak_bytes"] == max(counted_memory.line(problem))


def test_only_the_full_unroll_keeps_a_graph_for_each_step():
    def slope(method: str) -> float:
        few, many = (counted_memory.peak(replace(PROBLEM, method=method, steps=steps)) for steps in (3, 8))
        return (many["peak_bytes"] - few["peak_bytes"]) / 5

    parameters = counted_memory.peak(PROBLEM)["parameters"]
    for method in ("tesla exact", "tesla first-order"):
        assert slope(method) == pytest.approx(parameters, rel=0.2)
    assert slope("mtt") > 5 * parameters


def test_images_in_no_step_are_counted_with_gradient_and_momentum():
    all_of_them, part = (counted_memory.peak(replace(PROBLEM, images=images, batch=4))["peak_bytes"] for images in (4, 9))
    assert part - all_of_them == 5 * 3 * 12**2 * 4 * 3


def test_a_net_with_batch_norm_is_counted_with_instance_norm():
    assert counted_memory.peak(replace(PROBLEM, net="convnet2-w8"))["peak_bytes"] == counted_memory.peak(PROBLEM)["peak_bytes"]


@pytest.mark.parametrize("method", list(counted_memory.GRADIENTS))
@pytest.mark.parametrize("joined", [True, False])
def test_every_entrant_s_memory_can_be_asked_for_by_its_name(method, joined):
    """Also one with a blank in it."""
    words = ["--net", "convnet1-w2-in", "--size", "8", "--classes", "3", "--images", "4", "--batch", "3", "--steps", "2"]
    words += [f"--method={method}"] if joined else ["--method", method]
    whole = argparse.ArgumentParser()
    bench.add(whole.add_subparsers(), [], [])
    args, shown = whole.parse_args(["bench", "memory", *words, "--check"]), []
    args.run(args, lambda value, text: shown.append((value, text)))
    ((value, text),) = shown
    assert value["method"] == method
    assert value["peak_bytes"] >= value["counted_bytes"] > value["stored"] - 4 * value["parameters"]
    assert f"at the peak of {method}:" in text


def test_counted_memory_from_the_command_line(capsys):
    words = ["--net", "convnet2-w8-in", "--size", "12", "--classes", "5", "--images", "9", "--batch", "9", "--steps", "3"]
    assert main(["bench", "memory", *words, "--method", "mtt", "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] == found["counted_bytes"] > found["stored"]
    assert main(["bench", "memory", *words, "--batch", "10"]) == 2
    assert "batch <= images" in capsys.readouterr().err
