"""Folders, archives and arrays as people have them: read, or refused in one sentence; nothing is left out without a word."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infoutil_fast.data import decode, open_source, walk
from infoutil_fast.types import InputError

CLASSES = ("cat", "dog", "Müll naïve", "US$5_$10")


def paint(file: Path, size: int = 9) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng().integers(0, 256, (size, size + 2, 3), dtype=np.uint8)).save(file)


def fill(root: Path, parts: dict[str, int], classes: Sequence[str] = CLASSES) -> Path:
    """`n` images of each class below each part."""
    for part, n in parts.items():
        for name in classes:
            for i in range(n):
                paint(root / part / name / f"{i}.png")
    return root


def counts(source: object) -> tuple[int, int]:
    return len(source.train), len(source.val)  # type: ignore[attr-defined]


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "Training", "training"])
@pytest.mark.parametrize("val", ["val", "Val", "valid", "Validation", "test", "Test", "Testing"])
def test_splits_are_known_under_their_usual_names(tmp_path: Path, train: str, val: str) -> None:
    source = open_source(fill(tmp_path, {train: 2, val: 1}))
    assert counts(source) == (8, 4)
    assert source.classes == tuple(sorted(CLASSES))
    assert counts(open_source(source.spec)) == (8, 4)


def test_of_several_the_validation_split_wins_and_the_other_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert counts(open_source(fill(tmp_path, {"train": 2, "test": 3, "valid": 1}))) == (8, 4)
    assert "1 folders beside the splits (test)" in caplog.text
    fill(tmp_path, {"Train": 1})
    with pytest.raises(InputError, match=r"more than one train folder \(Train, train\)"):
        open_source(tmp_path)


@pytest.mark.parametrize("above", ["nette", "archive/nette", "a/b/c"])
def test_the_source_may_lie_deeper(tmp_path: Path, above: str) -> None:
    fill(tmp_path / above, {"train": 2, "val": 1})
    source = open_source(tmp_path)
    assert source.spec == str(tmp_path / above)
    assert counts(source) == (8, 4)


def test_several_sources_in_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill(tmp_path / name, {"train": 1, "val": 1})
    with pytest.raises(InputError, match=r"holds 2 sources: give one, such as .*one or .*two"):
        open_source(tmp_path)


def test_class_folders_without_a_split_are_refused_or_split_by_a_seed(tmp_path: Path) -> None:
    fill(tmp_path, {"": 10})
    with pytest.raises(InputError, match=r"If these are the classes, --split 0\.1 .* holds out a tenth"):
        open_source(tmp_path)
    source = open_source(tmp_path, split=0.2)
    assert counts(source) == (32, 8)
    assert source.spec == f"{tmp_path}@split=0.2,seed=0"
    assert not set(source.train.names) & set(source.val.names)
    assert np.bincount(source.val.labels).tolist() == [2, 2, 2, 2]
    again, other = open_source(source.spec), open_source(f"{tmp_path}@split=0.2,seed=7")
    assert again.val.names == source.val.names
    assert other.val.names != source.val.names
    name = source.val.names[3]
    np.testing.assert_array_equal(source.val.read(3), decode.read(tmp_path / name))


def test_a_training_folder_alone_is_split_too(tmp_path: Path) -> None:
    fill(tmp_path, {"train": 3})
    with pytest.raises(InputError, match=r"has train/ but no val/"):
        open_source(tmp_path)
    assert counts(open_source(tmp_path, split=0.1)) == (8, 4)  # one of each class at least


@pytest.mark.parametrize("split", [0, 1, -0.1, float("nan"), 2])
def test_a_split_is_a_share(tmp_path: Path, split: float) -> None:
    with pytest.raises(InputError, match="a share above 0 and below 1"):
        open_source(fill(tmp_path, {"": 3}), split=split)


def test_a_split_is_not_taken_where_it_makes_no_sense(tmp_path: Path) -> None:
    fill(tmp_path / "a", {"train": 2, "val": 1})
    fill(tmp_path / "b", {"": 1})
    for spec in (tmp_path / "a", "digits", "demo"):
        with pytest.raises(InputError, match="has a validation split of its own"):
            open_source(spec, split=0.1)
    with pytest.raises(InputError, match="needs at least 2 of each class"):
        open_source(tmp_path / "b", split=0.1)
    with pytest.raises(InputError, match="needed is @split"):
        open_source(f"{tmp_path / 'b'}@split=x")
    with pytest.raises(InputError, match="both say what is held out"):
        open_source(f"{tmp_path / 'b'}@split=0.1", split=0.1)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    whole = fill(tmp_path / "whole", {"": 3}, ("bus", "train", "test", "val"))
    assert open_source(whole, split=0.3).classes == ("bus", "test", "train", "val")
    assert open_source(fill(tmp_path / "apart", {"train": 2, "val": 1}, ("bus", "train"))).classes == ("bus", "train")
    mixed = fill(tmp_path / "mixed", {"": 3}, ("bus", "train/steam"))
    with pytest.raises(InputError, match="is train a class or a split"):
        open_source(mixed, split=0.3)


ILSVRC = ("n01440764", "n02102040", "n03000684")


def flat(root: Path, inner: str = "") -> list[tuple[str, str]]:
    """ILSVRC's val/ as it is downloaded; the files and their classes."""
    rows = [(f"ILSVRC2012_val_{i:08d}.JPEG", ILSVRC[i % 3]) for i in range(1, 8)]
    fill(root, {"train": 2}, ILSVRC)
    for name, _ in rows:
        paint(root / "val" / inner / name)
    return rows


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("val/val_annotations.txt", "{name}\t{id}\t0\t0\t62\t62"),
        ("val/labels.txt", "{name} {id}"),
        ("val/labels.csv", "{name},{id}"),
        ("val.txt", "val/{name} {number}"),
        ("LOC_val_solution.csv", "{stem},{id} 85 1 499 272 {id} 3 4 5 6"),
        ("../LOC_val_solution.csv", "{stem},{id} 85 1 499 272"),
        ("imagenet_2012_validation_synset_labels.txt", "{id}"),
    ],
)
@pytest.mark.parametrize("inner", ["", "images"])
def test_a_flat_validation_folder_is_read_by_its_list(tmp_path: Path, file: str, line: str, inner: str) -> None:
    root = tmp_path / "data"
    rows = flat(root, inner)
    told = [line.format(name=name, stem=name[:-5], id=own, number=ILSVRC.index(own)) for name, own in rows]
    if "solution" in file:
        told.insert(0, "ImageId,PredictionString")
    if "{name}" in line or "{stem}" in line:
        told = told[:1] + told[:0:-1]  # in any order
    (root / file).write_text("\n".join(told) + "\n")
    source = open_source(root)
    found = {name.rpartition("/")[2]: source.classes[label] for name, label in zip(source.val.names, source.val.labels, strict=True)}
    assert found == dict(rows)
    assert source.val.read(0).shape == (9, 11, 3)


def test_a_flat_validation_folder_without_a_list_is_refused(tmp_path: Path) -> None:
    rows = flat(tmp_path)
    with pytest.raises(InputError, match=r"has 7 images without class folders \(flat\).*sort them into .*valprep"):
        open_source(tmp_path)
    (tmp_path / "val.txt").write_text("".join(f"{name} {i + 500}\n" for i, (name, _) in enumerate(rows)))  # whose numbers?
    with pytest.raises(InputError, match="has the line"):
        open_source(tmp_path)


def test_images_that_the_list_does_not_name_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = flat(tmp_path)
    (tmp_path / "val/labels.txt").write_text("".join(f"{name} {own}\n" for name, own in rows[2:]))
    assert counts(open_source(tmp_path)) == (6, 5)
    assert "2 images that the list of labels does not name" in caplog.text


def test_tiny_imagenet_sorted_by_the_usual_script(tmp_path: Path) -> None:
    rows = flat(tmp_path, "images")
    (tmp_path / "val/val_annotations.txt").write_text("".join(f"{name}\t{own}\t0\t0\t9\t9\n" for name, own in rows))
    before = open_source(tmp_path)
    for name, own in rows:
        (tmp_path / "val" / own).mkdir(exist_ok=True)
        (tmp_path / "val/images" / name).rename(tmp_path / "val" / own / name)
    for keep in (True, False):  # some scripts remove the empty folder
        after = open_source(tmp_path)
        assert sorted(map(os.path.basename, after.val.names)) == sorted(map(os.path.basename, before.val.names))
        assert np.array_equal(np.bincount(after.val.labels), np.bincount(before.val.labels))
        if keep:
            (tmp_path / "val/images").rmdir()


HIDDEN = (".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", ".git", "$RECYCLE.BIN")


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = fill(tmp_path, {"train": 2, "val": 1})
    for name in HIDDEN:
        for place in ("", "train", "train/cat", "val", "val/dog"):
            paint(root / place / name / "0-checkpoint.png")
    shutil.copy(root / "train/cat/0.png", root / "train/cat/._0.png")
    paint(root / "train/stray.png")
    paint(root / "val/stray.png")
    (root / "train/cat/notes.txt").write_text("x")
    (root / "train/cat/raw.HEIC").write_bytes(b"x")
    (root / "train/gone").symlink_to(tmp_path / "nowhere")
    paint(root / "train/dog/results/maps.png")
    (root / "train/dog/results/score.json").write_text('{"score": "shapley", "teacher": {}}')
    with caplog.at_level(logging.INFO):
        assert counts(open_source(root)) == (8, 4)
    for said in (
        "2 stray pictures beside the class folders (train/stray.png, val/stray.png)",
        "1 files that are no images (train/cat/notes.txt)",
        "1 pictures of kinds that are not read (train/cat/raw.HEIC)",
        "1 dead links (train/gone)",
        "1 folders of results of infoutil (train/dog/results)",
        "hidden entries and system folders",
    ):
        assert said in caplog.text
    assert "train/cat/._0.png" not in open_source(root).train.names


def test_empty_folders_beside_class_folders_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path, {"": 3})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/readme.md").write_text("x")
    for name in ("cat", "dog"):  # of the data, not ours
        (tmp_path / name / "meta.json").write_text('{"photographer": "x"}')
    paint(tmp_path / "set/images/00000/00000.png")
    (tmp_path / "set/meta.json").write_text('{"format": 1, "method": "rded"}')
    assert open_source(tmp_path, split=0.3).classes == tuple(sorted(CLASSES))


def test_a_dead_link_to_an_image_is_left_out_when_it_is_read(tmp_path: Path) -> None:
    root = fill(tmp_path, {"train": 2, "val": 1})
    (root / "train/cat/5.png").symlink_to(root / "nowhere.png")
    source = open_source(root)
    assert len(source.train) == 9
    there = source.train.readable(range(9), 8)[1].tolist()
    assert [source.train.names[i] for i in set(range(9)) - set(there)] == ["train/cat/5.png"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, listed = fill(tmp_path, {"train": 2, "val": 1}), os.scandir

    def scandir(path: Path) -> object:
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(walk.os, "scandir", scandir)
    with pytest.raises(InputError, match=r"cannot be read: .*Permission denied: .*train/dog"):
        open_source(root)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    root = fill(tmp_path, {"train": 2, "val": 1}, (odd, "tea"))
    paint(root / "train/tea" / os.fsdecode(b"\xff.png"))
    source = open_source(root)
    assert odd in source.classes
    assert source.train.batch(range(5), 8).shape == (5, 3, 8, 8)


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "zip"])
def test_archives_are_told_to_be_unpacked(tmp_path: Path, ending: str) -> None:
    fill(tmp_path / "nette", {"train": 2, "val": 1})
    form = {"tgz": "gztar", "tar.gz": "gztar"}.get(ending, ending)
    made = Path(shutil.make_archive(str(tmp_path / "made"), form, tmp_path, "nette")).rename(tmp_path / f"nette.{ending}")
    with pytest.raises(InputError, match=r"is an archive.*: unpack it \("):
        open_source(made)


@pytest.mark.parametrize("ending", ["7z", "rar", "tar.zst", "gz"])
def test_archives_of_other_kinds_too(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"x.{ending}").write_bytes(os.urandom(99))
    with pytest.raises(InputError, match=r"is an archive: unpack it"):
        open_source(tmp_path / f"x.{ending}")


def arrays(names: Sequence[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Images [N, 7, 8] and labels [N, 1] under names of pairs."""
    made = {}
    for n, (images, labels) in enumerate(zip(names[::2], names[1::2], strict=True)):
        made[images] = rng.integers(0, 256, (9 + n, 7, 8), dtype=np.uint8)
        made[labels] = (np.arange(9 + n)[:, None] % 3).astype(np.uint8)
    return made


@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),  # MedMNIST
        ("X_train", "Y_train", "X_val", "Y_val"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("training_data", "training_labels", "validation_data", "validation_labels"),
    ],
)
def test_arrays_under_the_usual_names(tmp_path: Path, names: Sequence[str], caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "x.npz", **arrays(names, np.random.default_rng()))
    with caplog.at_level(logging.INFO):
        source = open_source(tmp_path / "x.npz")
    assert counts(source) == (9, 10)
    assert source.classes == ("0", "1", "2")
    assert (len(names) == 6) == ("not used are test_images, test_labels" in caplog.text)


def test_arrays_without_a_split(tmp_path: Path) -> None:
    for i, names in enumerate((("x", "y"), ("images", "labels"), ("train_x", "train_y"))):
        np.savez(tmp_path / f"{i}.npz", **arrays(names, np.random.default_rng()))
        with pytest.raises(InputError, match="needed are train_x"):
            open_source(tmp_path / f"{i}.npz")
        source = open_source(tmp_path / f"{i}.npz", split=0.3)
        assert counts(source) == (6, 3)
        assert open_source(source.spec).val.names == source.val.names
    zipfile.ZipFile(tmp_path / "no.npz", "w").close()
    with pytest.raises(InputError, match=r"keys \(none\)"):
        open_source(tmp_path / "no.npz")


@pytest.mark.parametrize(("largest", "shift"), [(4095, 4), (1023, 4), (0xFFFF, 8), (4096, 8), (255, 0)])
def test_sixteen_bit_files_are_read_by_the_bits_in_use(
    tmp_path: Path, largest: int, shift: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_told", set())
    values = np.random.default_rng().integers(0, largest + 1, (5, 7)).astype(np.uint16)
    values[2, 3] = largest
    Image.fromarray(values).save(tmp_path / "x.png")
    np.testing.assert_array_equal(decode.read(tmp_path / "x.png"), np.repeat((values >> shift).astype(np.uint8)[..., None], 3, 2))
    assert ("x.png has 16-bit pixels" in caplog.text) == (shift < 8)
