"""`--record` appends every measured row to results/<device>.jsonl; the ratios are printed in any case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from record import keep_rows, row, time_call

from infoutil_fast.runtime.memory import keep_freed_memory

ROWS: list[tuple[str, dict[str, Any]]] = []
ROUNDS = 21
SLOW = 20.0  # seconds of a call after which its version runs no further rounds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="append the rows to bench/results/<device>.jsonl")
    parser.addoption("--rounds", type=int, help=f"rounds of every race, instead of {ROUNDS} or the race's own number")
    parser.addoption("--keep-freed-memory", action="store_true", help="run all with the allocator setting of infoutil_fast.runtime.memory")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.keep_freed_memory and not keep_freed_memory():
        raise pytest.UsageError("--keep-freed-memory: the allocator of this system has no such setting")


@pytest.fixture
def race(request: pytest.FixtureRequest) -> Callable[..., dict[str, dict[str, Any]]]:
    """race(name, params, device, versions): time callables in turn, round by round, since other jobs slow all of them.

    The first is the baseline; in a race of the usual number of rounds the last is also what pytest-benchmark shows. With `rivals`, names of
    some versions, the rows of all others carry their ratio against each rival. Returns the rows by version: a test may add `figures`.
    """

    def run(
        name: str,
        params: dict[str, Any],
        device: str,
        versions: dict[str, Callable[[], object]],
        rounds: int | None = None,
        rivals: Sequence[str] = (),
    ) -> dict[str, dict[str, Any]]:
        times = _times(versions, device, request.config.option.rounds or rounds or ROUNDS)
        baseline = next(iter(versions))
        rows = {}
        for version, taken in times.items():
            others = {} if version in rivals else {rival: times[rival] for rival in rivals}
            rows[version] = row(name, {**params, "backend": version}, device, taken, times[baseline], baseline, others)
            ROWS.append((device, rows[version]))
        if rounds is None:
            request.getfixturevalue("benchmark").pedantic(list(versions.values())[-1], rounds=5)
        return rows

    return run


@pytest.fixture
def note() -> Callable[[str, dict[str, Any]], None]:
    """note(device, row): a row measured otherwise than by a race; its `unit` says what `median` is in."""
    return lambda device, found: ROWS.append((device, found))


def _times(versions: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Of each version, round by round. One that takes longer than `SLOW` is not warmed up and stops there."""
    times: dict[str, list[tuple[float, float]]] = {version: [] for version in versions}
    warm = 2 if rounds > 9 else 1
    slow = set()
    for turn in range(rounds + warm):
        for version, call in versions.items():
            if version in slow:
                continue
            elapsed = time_call(call, device)
            if elapsed[0] > SLOW:
                slow.add(version)
            if turn >= warm or version in slow:
                times[version].append(elapsed)
    return times


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for _, found in ROWS:
        for line in _lines(found):
            terminalreporter.write_line(line)
    if config.option.record:
        for device in sorted({device for device, _ in ROWS}):
            path = keep_rows(device, _of(device))
            terminalreporter.write_line(f"appended to {path.relative_to(config.rootpath)}")


def _lines(found: dict[str, Any]) -> list[str]:
    """A row as it is printed: what and how long, its ratios and figures below."""
    params = " ".join(f"{key}={value}" for key, value in found["params"].items())
    low, high = found["iqr"]
    if "unit" in found:
        lines = [f"{found['name']} {params}: {found['median']:.1f} {found['unit']} ({low:.1f} to {high:.1f}, n={found['n']})"]
    else:
        lines = [
            f"{found['name']} {params}: {found['median'] * 1e3:.2f} ms ({low * 1e3:.2f} to {high * 1e3:.2f}, n={found['n']}), "
            f"{found['ratio']:.2f}x {found['baseline']} ({found['ratio_processor']:.2f}x in processor time)"
        ]
    for rival, r in found.get("ratios", {}).items():
        (low, high), (low_p, high_p) = r["iqr"], r["iqr_processor"]
        lines.append(
            f"    {r['median']:.2f}x {rival} ({low:.2f} to {high:.2f}, n={r['n']}, {r['n_rival']}), "
            f"in processor time {r['median_processor']:.2f}x ({low_p:.2f} to {high_p:.2f})"
        )
    if "figures" in found:
        lines.append("    " + ", ".join(f"{key} {value}" for key, value in found["figures"].items()))
    return lines


def _of(device: str) -> Sequence[dict[str, Any]]:
    return [found for at, found in ROWS if at == device]
