"""Scores of any folder: the scorers' own values, resumed class by class, in a table and in pictures."""

from __future__ import annotations

import csv
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infoutil_fast import InputError, grad_norms, patch_shapley
from infoutil_fast.cli import main
from infoutil_fast.data import open_source
from infoutil_fast.drawing import histograms, sheets
from infoutil_fast.models.teacher import load_checkpoint
from infoutil_fast.scoring import score_images
from infoutil_fast.scoring.score_images import score

QUIET = {"progress": False, "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory) -> Path:
    """Validation digits as class folders of differing sizes, one file of them broken."""
    root = tmp_path_factory.mktemp("digits") / "by-class"
    for position, label in enumerate(digits.val.labels.tolist()):
        if position % 4 == 0:
            (root / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.val.read(position)).save(root / str(label) / f"{position:04d}.png")
    (root / "3" / "0000-broken.png").write_bytes(b"\x89PNG and then nothing")
    (root / "3" / "notes.txt").write_text("no image")
    return root


def table(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("shapley", {"grid": 3}),
        ("shapley", {"design": "leverage", "evaluations": 40}),
        ("gradnorm", {}),
        ("gradnorm", {"layers": "last"}),
    ],
)
def test_scores_are_the_scorers_own(kind, options, folder, digits_teacher, tmp_path):
    done = score(kind, folder, digits_teacher, tmp_path / "out", **QUIET, **options)
    rows, teacher = table(tmp_path / "out" / "scores.npz"), load_checkpoint(digits_teacher)
    files = sorted(f for f in folder.rglob("*.png") if "broken" not in f.name)
    assert rows["name"].tolist() == [f.relative_to(folder).as_posix() for f in files]
    assert rows["label"].tolist() == [int(f.parent.name) for f in files]
    assert rows["skipped"].tolist() == ["3/0000-broken.png"] == done["skipped"]
    assert done["images"] == len(files)
    images = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in files])
    x, y = teacher.normalise(images), torch.from_numpy(rows["label"])
    if kind == "gradnorm":
        expected = grad_norms(teacher.net, x, y, layers=options.get("layers", "all"))
        torch.testing.assert_close(torch.from_numpy(rows["score"]), expected, rtol=1e-4, atol=1e-6)
    else:
        np.testing.assert_allclose(rows["score"], rows["heat"].sum((1, 2)), rtol=1e-4, atol=1e-4)
        with torch.no_grad():  # the efficiency of Shapley values
            gain = (teacher.net(x) - teacher.net(torch.zeros_like(x))).gather(1, y[:, None])[:, 0]
        np.testing.assert_allclose(rows["score"], gain, rtol=1e-3, atol=1e-3)
    if options == {"grid": 3}:
        expected = patch_shapley(teacher.net, x, y, grid=3, dtype=torch.float32)
        torch.testing.assert_close(torch.from_numpy(rows["heat"]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("design", ["kernel", "captum"])
def test_a_run_cut_short_goes_on_and_ends_with_the_same_bytes(design, folder, digits_teacher, tmp_path, monkeypatch):
    words = ["score", "shapley", str(folder), "--teacher", str(digits_teacher), "--design", design, "--grid", "2"]
    words += ["--evaluations", "12", "--dtype", "float32", "--quiet"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    real, calls = score_images._scored, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(score_images, "_scored", interrupted)
    assert main([*words, str(tmp_path / "cut")]) == 130
    assert len(list((tmp_path / "cut" / "classes").iterdir())) == 3
    assert not (tmp_path / "cut" / "scores.npz").exists()
    assert main([*words, str(tmp_path / "cut")]) == 0
    assert len(calls) == 4 + 7, "what was finished is not done again"
    for file in ("scores.npz", "maps.png", "histogram.png", "score.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_folder_without_classes_is_scored_for_what_the_teacher_sees(folder, digits_teacher, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted(folder.rglob("*.png"))[::3]:
        (flat / f"{file.parent.name}-{file.name}").write_bytes(file.read_bytes())
    words = [
        "score",
        "gradnorm",
        str(flat),
        str(tmp_path / "out"),
        "--teacher",
        str(digits_teacher),
        "--format",
        "csv",
        "--json",
        "--quiet",
    ]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    teacher = load_checkpoint(digits_teacher)
    for row in rows:
        image = torch.from_numpy(np.array(Image.open(flat / row["file"]).convert("RGB"))).permute(2, 0, 1)[None]
        assert int(row["label"]) == int(teacher.logits(image).argmax())
        assert row["class"] == teacher.facts.classes[int(row["label"])]
    assert said["images"] == len(rows) == len(list(flat.iterdir())) - len(said["skipped"])
    values = [float(row["score"]) for row in rows]
    assert said["lowest"] == min(values)
    assert said["highest"] == max(values)


def test_sources_by_split_and_per_class_draws_nested(digits_teacher, tmp_path):
    source, names = open_source("digits"), {}
    for count in (2, 5):
        score("gradnorm", "digits", digits_teacher, tmp_path / str(count), split="val", per_class=count, seed=3, layers="last", **QUIET)
        rows = table(tmp_path / str(count) / "scores.npz")
        assert np.bincount(rows["label"]).tolist() == [count] * 10
        assert all(source.val.names[p] == name for p, name in zip(rows["position"], rows["name"], strict=True))
        names[count] = set(rows["name"])
    assert names[2] < names[5]


def test_csv_has_each_map_row_by_row(rng):
    heat = rng.standard_normal((3, 2, 4)).astype(np.float32)
    rows = {"name": np.array(["a,b.png", 'c"d.png', "e.png"]), "label": np.array([1, 0, 1]), "score": heat.sum((1, 2)), "heat": heat}
    read = list(csv.DictReader(score_images.as_csv(rows, ("cat", "dog")).splitlines()))
    assert [row["file"] for row in read] == rows["name"].tolist()
    assert [row["class"] for row in read] == ["dog", "cat", "dog"]
    assert np.float32(read[2]["phi_1_3"]) == heat[2, 1, 3]


def test_mistakes_are_one_line_and_leave_no_trace(folder, digits_teacher, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    cases = [
        ("has no images", ["shapley", tmp_path / "empty", tmp_path / "out"]),
        ("does not exist", ["shapley", tmp_path / "nowhere", tmp_path / "out"]),
        ("holds no scores", ["gradnorm", folder, tmp_path / "full"]),
        ("known: border_hadamard", ["shapley", folder, tmp_path / "out", "--design", "magic"]),
        ("payoff 'gold' is not known", ["shapley", folder, tmp_path / "out", "--payoff", "gold"]),
        ("layers 'some' is not known", ["gradnorm", folder, tmp_path / "out", "--layers", "some"]),
        ("0 or more", ["gradnorm", folder, tmp_path / "out", "--per-class", "-1"]),
    ]
    for message, words in cases:
        assert main(["score", *map(str, words), "--teacher", str(digits_teacher), "--quiet"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="has no option grid; it has layers"):
        score("gradnorm", folder, digits_teacher, tmp_path / "out", grid=4, **QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


def test_other_settings_need_another_folder(folder, digits_teacher, tmp_path):
    arguments = (folder, digits_teacher, tmp_path / "out")
    score("gradnorm", *arguments, per_class=1, **QUIET)
    with pytest.raises(InputError, match="another layers"):
        score("gradnorm", *arguments, per_class=1, layers="last", **QUIET)
    with pytest.raises(InputError, match="another per_class"):
        score("gradnorm", *arguments, per_class=2, **QUIET)


def test_lowest_and_highest_sheets_show_these(rng):
    """Each image one grey: the first tile of a row tells which it is."""
    greys = rng.permutation(200)[:24]
    rows = {"score": np.linspace(1, 2, 24)[rng.permutation(24)], "label": np.arange(24) % 2, "position": np.arange(24)}
    drawn = sheets.score_pictures("gradnorm", rows, ("a", "b"), lambda p: np.full((9, 5, 3), greys[p], np.uint8))
    for name, best in (("lowest.png", np.argmin), ("highest.png", np.argmax)):
        picture = np.asarray(Image.open(BytesIO(drawn[name])).convert("L")).astype(int)
        own = np.flatnonzero(rows["label"] == 0)
        wanted = greys[own[best(rows["score"][own])]]
        row = picture[40 + sheets.TILE // 2]
        first = row[np.flatnonzero(row == 0xF0)[0] :][: sheets.TILE]
        assert first[len(first) // 2] == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0, 3.0], [1e-9, 1.0, 5e4], [0.0, 0.0, 1e-7, 3.0], [-2.0, np.nan, 4.0]])
def test_histograms_draw_one_value_and_many(values):
    data = histograms.histogram(np.array(values), np.zeros(len(values), np.int64), np.array([0]), ["a" * 80], "Norm")
    assert min(Image.open(BytesIO(data)).size) > 200


def test_the_sheet_of_one_tiny_image_is_drawn():
    rows = {"score": np.array([1.0]), "label": np.array([4]), "position": np.array([0]), "heat": np.ones((1, 2, 2))}
    drawn = sheets.score_pictures("shapley", rows, list("abcde"), lambda p: np.zeros((1, 1, 3), np.uint8))
    assert set(drawn) == {"maps.png", "histogram.png"}
