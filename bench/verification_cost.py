"""What the check on real samples costs: python bench/verification_cost.py [--device cpu|cuda] [--repeats 7]

Each row is one call with the check and the same call without it, of a fresh model, turn and turn about in one run, after one call of
either that nobody times: median seconds (of the processor on a CPU, which others may share), and the median and the quartiles of the
ratio. `first` is the first call of a model (the check runs once a model and graph), `later` a further one of the same model.
`patch_shapley` plans, and so checks, in every call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor, nn

from infoutil_fast import grad_norms, patch_shapley
from infoutil_fast.gradnorm import one_pass
from infoutil_fast.models.nets import build
from infoutil_fast.runtime.device import device_name
from infoutil_fast.shapley.forwards import Forwards

CASES = (("convnet3", 32, (8, 256)), ("resnet18-small", 32, (8, 64)))


@contextmanager
def unchecked() -> Iterator[None]:
    """The scorers as they are, less the check itself; what it reads from the graph is still read."""
    with (
        mock.patch.object(one_pass, "check_logits", return_value=None),
        mock.patch.object(one_pass, "refuted", return_value=set()),
        mock.patch.object(Forwards, "check", lambda self, *_: self),
    ):
        yield


def seconds(call: Callable[[], Tensor], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def pair(make: Callable[[], Callable[[], Tensor]], first: bool, device: str, checked_first: bool) -> tuple[float, float]:
    """Seconds with and without the check, each of a model of its own."""
    found = {}
    for checked in (checked_first, not checked_first):
        call = make()
        with nullcontext() if checked else unchecked():
            if not first:
                call()
            found[checked] = seconds(call, device)
    return found[True], found[False]


def row(what: str, make: Callable[[], Callable[[], Tensor]], first: bool, device: str, repeats: int) -> None:
    pair(make, first, device, True)
    pairs = [pair(make, first, device, bool(k % 2)) for k in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    times = " ".join(f"{statistics.median(times):8.4f}" for times in zip(*pairs, strict=True))
    print(f"{what:44s} {times} s   ratio {middle:.3f} [{low:.3f}, {high:.3f}]  n={repeats}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--repeats", type=int, default=7)
    chosen = options.parse_args()
    device = chosen.device
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads: with, without")
    for name, side, counts in CASES:
        for n in counts:
            x, y = torch.randn(n, 3, side, side, device=device), torch.randint(0, 10, (n,), device=device)

            def norms(x: Tensor = x, y: Tensor = y, name: str = name, side: int = side) -> Callable[[], Tensor]:
                model: nn.Module = build(name, 10, side).to(device).eval()
                return lambda: grad_norms(model, x, y)

            def maps(x: Tensor = x, y: Tensor = y, name: str = name, side: int = side) -> Callable[[], Tensor]:
                model: nn.Module = build(name, 10, side).to(device).eval()
                return lambda: patch_shapley(model, x, y)

            row(f"grad_norms {name} {n} x {side} px, first", norms, True, device, chosen.repeats)
            row(f"grad_norms {name} {n} x {side} px, later", norms, False, device, chosen.repeats)
            if name == "convnet3" or n == 8:
                row(f"patch_shapley {name} {n} x {side} px", maps, True, device, chosen.repeats if n == 8 else max(3, chosen.repeats // 2))


if __name__ == "__main__":
    main()
