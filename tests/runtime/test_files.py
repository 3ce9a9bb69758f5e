"""Folders are begun once: what is foreign or was made otherwise is refused, and processes that start together agree."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infoutil_fast.runtime import files
from infoutil_fast.runtime.files import Kind, begin_folder, write_bytes, write_new
from infoutil_fast.types import InputError

KIND = Kind("poems", "poem.json", settings="options", replacing="--again")
META = {"version": "1", "options": {"rhyme": True, "lines": (1, 2)}, "seed": 3}


def test_a_folder_is_begun_and_gone_on_with(tmp_path):
    out = tmp_path / "new" / "out"
    begin_folder(out, KIND, META)
    first = (out / "poem.json").read_bytes()
    assert json.loads(first) == {**META, "options": {"rhyme": True, "lines": [1, 2]}}
    (out / "verse.txt").write_text("roses")
    begin_folder(out, KIND, META)
    assert (out / "poem.json").read_bytes() == first
    assert sorted(file.name for file in out.iterdir()) == ["poem.json", "verse.txt"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "another seed:"),
        ({"seed": 4, "version": "2"}, "another version, seed:"),
        ({"options": {"rhyme": False, "lines": [1, 2]}}, "another rhyme:"),
        ({"seed": 9, "options": {"rhyme": False, "lines": [1]}}, "another seed, rhyme, lines:"),
        ({"options": {"rhyme": True, "lines": [1, 2], "metre": 5}}, "another metre:"),
    ],
)
def test_what_differs_is_named(change, named, tmp_path):
    begin_folder(tmp_path / "out", KIND, META)
    before = (tmp_path / "out" / "poem.json").read_bytes()
    with pytest.raises(InputError, match=named) as caught:
        begin_folder(tmp_path / "out", KIND, {**META, **change})
    assert "or --again to replace it" in str(caught.value)
    assert (tmp_path / "out" / "poem.json").read_bytes() == before


def test_foreign_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("in the way")
    for foreign in ("full", "file"):
        for clear in (None, lambda folder: pytest.fail("cleared")):
            with pytest.raises(InputError, match="holds no poems: choose a new or empty folder"):
                begin_folder(tmp_path / foreign, KIND, META, clear)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"seed": 3}', "[" * 100_000])
def test_a_first_file_of_another_kind_is_refused_also_when_it_would_be_replaced(text, tmp_path):
    (tmp_path / "poem.json").write_text(text)
    for clear in (None, lambda folder: pytest.fail("cleared")):
        with pytest.raises(InputError, match=r"poem\.json is not that of poems") as caught:
            begin_folder(tmp_path, KIND, META, clear)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "poem.json").read_text() == text


def test_replacing_clears_and_begins_anew(tmp_path):
    begin_folder(tmp_path / "out", KIND, META)
    begin_folder(tmp_path / "out", KIND, {**META, "seed": 8}, lambda folder: (folder / "poem.json").unlink())
    assert json.loads((tmp_path / "out" / "poem.json").read_text())["seed"] == 8


def test_an_empty_folder_and_one_with_a_part_left_by_a_kill_can_be_begun(tmp_path):
    (tmp_path / "poem.json.4711.part").write_text("{")
    begin_folder(tmp_path, KIND, META)
    assert json.loads((tmp_path / "poem.json").read_text())["seed"] == 3


def test_a_file_below_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        begin_folder(tmp_path / "file" / "out", KIND, META)


def _begin(out: Path, seed: int, barrier, said) -> None:
    barrier.wait()
    try:
        begin_folder(out, KIND, {**META, "seed": seed})
        (out / f"work-{os.getpid()}").write_text("begun")
        said.put(seed)
    except InputError as error:
        said.put(str(error))


@pytest.mark.parametrize("seeds", [[5, 5, 5, 5], [1, 2, 3, 4]])
def test_processes_that_start_together_agree_on_one_meta(seeds, tmp_path):
    """All of one run go on; of runs with other settings one wins, and the others are told so."""
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(len(seeds)), context.Queue()
    ranks = [context.Process(target=_begin, args=(tmp_path / "out", seed, barrier, said)) for seed in seeds]
    for rank in ranks:
        rank.start()
    answers = [said.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    winner = json.loads((tmp_path / "out" / "poem.json").read_text())["seed"]
    assert answers.count(winner) == seeds.count(winner)
    assert all(answer == winner or "another seed" in answer for answer in answers)
    assert not list((tmp_path / "out").glob("*.part"))


def test_writers_of_one_process_number_do_not_share_a_part(tmp_path, monkeypatch):
    """Ranks in containers of several machines often have the same number, and write to one folder."""
    monkeypatch.setattr(files.os, "getpid", lambda: 7)
    texts = [bytes([65 + i]) * 200_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_bytes(tmp_path / "a", text), texts))
    assert (tmp_path / "a").read_bytes() in texts
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_nothing_and_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "a", b"new")
    with pytest.raises(InputError, match="cannot be written: No space left"):
        begin_folder(tmp_path / "out", KIND, META)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "a"]


def test_new_files_stay_as_the_first_wrote_them_with_and_without_hard_links(tmp_path, monkeypatch):
    write_new(tmp_path / "a", b"first")
    write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"

    def no_links(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(files.os, "link", no_links)
    write_new(tmp_path / "a", b"third")
    write_new(tmp_path / "b", b"first")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"first"
    write_bytes(tmp_path / "a", b"fourth")
    assert sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir()) == [("a", b"fourth"), ("b", b"first")]
