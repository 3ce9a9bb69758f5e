"""Rows of results: one rule for quartiles, and files that outlive a kill within their last line."""

from __future__ import annotations

import json
import logging
import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from infoutil_fast.runtime import rows


@pytest.mark.parametrize("n", [2, 3, 4, 7, 64])
def test_quartiles_are_those_of_numpy_torch_and_the_inclusive_rule(n, rng):
    values = rng.lognormal(size=n)
    known = rows.quartiles(iter(values))
    assert known == pytest.approx(statistics.quantiles(values.tolist(), n=4, method="inclusive"))
    assert known == pytest.approx(torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist())
    assert rows.summary(values) == {"n": n, "median": known[1], "iqr": [known[0], known[2]]}


def test_one_value_is_its_own_quartiles():
    assert rows.summary([2.5]) == {"n": 1, "median": 2.5, "iqr": [2.5, 2.5]}


def test_provenance_says_on_what_and_by_which_command():
    known = rows.provenance("cpu", "infoutil something")
    assert list(known) == ["device", "threads", "load", "versions", "date", "command"]
    assert known["threads"] == torch.get_num_threads()
    assert known["versions"]["torch"]
    assert json.loads(json.dumps(known)) == known


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_cut_last_line_costs_that_row_only(cut, tmp_path, caplog, rng):
    file = tmp_path / "new" / "rows.jsonl"
    made = [{"name": "é", "value": float(v)} for v in rng.standard_normal(3)]
    rows.append(file, made[:2])
    file.write_bytes(file.read_bytes()[:-cut])  # 1: only the end of the line is missing
    rows.append(file, made[2:])
    with caplog.at_level(logging.WARNING):
        known = rows.read(file)
    assert known == (made if cut == 1 else [made[0], made[2]])
    assert ("1 unreadable line of rows.jsonl left out" in caplog.text) is (cut > 1)


@pytest.mark.parametrize("text", ["[1, 2]\n", "null\n", "{\n", "\x00\xff\n", "[" * 100_000 + "\n"])
def test_lines_that_are_no_rows_are_counted(text, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n' + text + "\n" + text + '{"a": 2}\n')
    assert rows.readable(file) == ([{"a": 1}, {"a": 2}], "2 unreadable lines of rows.jsonl left out.")


def test_a_file_that_is_not_there_has_no_rows(tmp_path):
    assert rows.readable(tmp_path / "rows.jsonl") == ([], "")


def test_many_writers_lose_no_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: rows.append(file, [{"i": i, "padding": "x" * (i * 37 % 999)}]), range(200)))
    assert sorted(row["i"] for row in rows.read(file)) == list(range(200))


def test_the_kept_rows_of_the_repository_are_readable():
    from pathlib import Path

    results = Path(__file__).parents[2] / "bench" / "results"
    files = sorted(results.rglob("*.jsonl"))
    assert len(files) >= 5
    for file in files:
        known, remark = rows.readable(file)
        assert known
        assert not remark
        assert all(np.diff([row["iqr"][0], row["median"], row["iqr"][1]]).min() >= 0 for row in known if "iqr" in row)
