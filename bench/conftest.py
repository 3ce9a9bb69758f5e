"""`--record` appends every measured row to results/<device>.jsonl; the ratios are printed in any case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter, process_time
from typing import Any

import pytest
import torch
from record import append, row

ROWS: list[tuple[str, dict[str, Any]]] = []
ROUNDS = 21


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="append the rows to bench/results/<device>.jsonl")


@pytest.fixture
def race(benchmark: Any) -> Callable[..., None]:
    """race(name, params, device, versions): time callables in turn, round by round, since other jobs slow all of them.

    The first is the baseline; the last is also what pytest-benchmark shows.
    """

    def run(name: str, params: dict[str, Any], device: str, versions: dict[str, Callable[[], object]]) -> None:
        times: dict[str, list[tuple[float, float]]] = {version: [] for version in versions}
        for turn in range(ROUNDS + 2):
            for version, call in versions.items():
                elapsed = _time(call, device)
                if turn >= 2:  # the first two warm up
                    times[version].append(elapsed)
        baseline = next(iter(versions))
        for version, taken in times.items():
            ROWS.append((device, row(name, {**params, "backend": version}, device, taken, times[baseline], baseline)))
        benchmark.pedantic(list(versions.values())[-1], rounds=5)

    return run


def _time(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds by the clock, and seconds of processor time (on CUDA the device's own, twice): the second does not count what others take."""
    if device != "cuda":
        start, busy = perf_counter(), process_time()
        call()
        return perf_counter() - start, process_time() - busy
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    elapsed = begin.elapsed_time(end) / 1000
    return elapsed, elapsed


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for _, found in ROWS:
        params = " ".join(f"{key}={value}" for key, value in found["params"].items())
        low, high = found["iqr"]
        terminalreporter.write_line(
            f"{found['name']} {params}: {found['median'] * 1e3:.2f} ms ({low * 1e3:.2f} to {high * 1e3:.2f}, n={found['n']}), "
            f"{found['ratio']:.2f}x {found['baseline']} ({found['ratio_processor']:.2f}x in processor time)"
        )
    if config.option.record:
        for device in sorted({device for device, _ in ROWS}):
            path = append(device, _of(device))
            terminalreporter.write_line(f"appended to {path.relative_to(config.rootpath)}")


def _of(device: str) -> Sequence[dict[str, Any]]:
    return [found for at, found in ROWS if at == device]
