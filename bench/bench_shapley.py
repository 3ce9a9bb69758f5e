"""PatchShapley beside its rivals, its locality, memory, share of the peak: python -m pytest bench -k shapley [--record] [--rounds N]

Parts: -k shapley_rivals, shapley_locality, shapley_memory, shapley_peak, shapley_exact.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from cases import case
from record import origin
from rivals import captum, loop, loops, multiply_adds, quickest
from torch import Tensor, nn

from infoutil_fast.runtime.rows import summary
from infoutil_fast.shapley.maps import PatchShapley

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, where torch.compile imports it
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [("convnet3", 32, 8), ("resnet18-small", 32, 2), ("resnet18", 224, 1), ("resnet50", 224, 1)]  # net, size, images
MORE_IMAGES = {"cpu": 1, "cuda": 8}  # so that a round is no blink of a GPU
# Each rival runs at its best batch: on a processor the maps of a large one are mapped and unmapped by the allocator at every layer.
AT_ONCE = {"cpu": (8, 16, 32, 64), "cuda": (16, 32, 64)}  # of Captum
BATCHES = {"cpu": (8, 16, 32, 64, 128), "cuda": (64, 256, 512)}
FEW_BATCHES = {"cpu": (16, 64), "cuda": (256, 1024)}
COMPILED = {"cpu": (16, 64, 128), "cuda": (64, 256, 512)}
EVALUATIONS = 64
SHORT = torch.bfloat16
PRODUCT = 2048  # side of the matrices whose product is the measured peak


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch._dynamo.reset()  # its limit of shapes is for one net, not for those of all tests
    return request.param


def timed(make: Callable[[], PatchShapley]) -> tuple[PatchShapley, float]:
    start = perf_counter()
    return make(), round(perf_counter() - start, 2)


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32 in convolutions: on CUDA it is otherwise the default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def apart(maps: Tensor, truth: Tensor) -> float:
    return float((maps.double() - truth).norm() / truth.norm())


def agreeing(model: nn.Module, images: Tensor, targets: Tensor, plan: PatchShapley) -> Tensor:
    """The maps of the hand-written loop in float32, after a look that ours are the same and that Captum plays the same game."""
    with exact_products():
        truth = loop(model, images, targets, plan.coalitions, torch.float32, EVALUATIONS)
        assert apart(plan(images, targets), truth) < 1e-4
        with torch.inference_mode():
            ends = (model(images[:1]) - model(torch.zeros_like(images[:1])))[0, targets[0]]
        gained = captum(model, images[:1], targets[:1], EVALUATIONS, EVALUATIONS).sum()
    torch.testing.assert_close(gained, ends, rtol=1e-2, atol=1e-2)  # the ends weigh 1e6 in its fit
    return truth


@pytest.mark.parametrize(("net", "size", "count"), CASES, ids=[f"{net}-{size}" for net, size, _ in CASES])
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_shapley_rivals(race: Any, device: str, net: str, size: int, count: int) -> None:
    count *= MORE_IMAGES[device]
    model, images, targets = case(net, size, count, device)
    make = partial(PatchShapley, model, (3, size, size))
    made = {
        "ours bfloat16 no reuse": timed(partial(make, dtype=SHORT, reuse=False)),
        "ours bfloat16": timed(partial(make, dtype=SHORT)),
        "ours float32": timed(partial(make, dtype=torch.float32)),
        "ours bfloat16 compiled": timed(partial(make, dtype=SHORT, compile=True)),
    }
    plans = {name: plan for name, (plan, _) in made.items()}
    assert plans["ours bfloat16 compiled"]._with(SHORT).compiled
    truth = agreeing(model, images, targets, plans["ours float32"])

    coalitions = plans["ours float32"].coalitions
    assert len(coalitions.masks) == EVALUATIONS
    at_once, best = quickest({n: partial(captum, model, images, targets, EVALUATIONS, n) for n in AT_ONCE[device]}, device)
    plain, by_hand = quickest(loops(model, images, targets, coalitions, torch.float32, BATCHES[device], False), device)
    short, compiled = quickest(loops(model, images, targets, coalitions, SHORT, COMPILED[device], True), device, compiled=True)
    rivals = {
        "captum": partial(captum, model, images, targets, EVALUATIONS, 1),
        "captum batched": best,
        "loop float32": by_hand,
        "loop bfloat16 compiled": compiled,
    }
    contestants = {**rivals, **{name: partial(plan, images, targets) for name, plan in plans.items()}}
    params = {"net": net, "size": size, "N": count, "M": EVALUATIONS}
    rows = race("shapley", params, device, contestants, rounds=7, rivals=list(rivals))
    for rival, batch in {"captum": 1, "captum batched": at_once, "loop float32": plain, "loop bfloat16 compiled": short}.items():
        rows[rival]["figures"] = {"batch": batch}
    for name, (plan, seconds) in made.items():
        rows[name]["figures"] = {"planned_s": seconds, "plan": repr(plan)}
    for name in contestants:
        if not name.startswith("captum"):  # it draws other coalitions
            rows[name]["figures"]["off"] = float(f"{apart(contestants[name](), truth):.2g}")


LOCALITY = [
    *((net, size, count) for net, count in (("convnet3", 4), ("resnet18-small", 1)) for size in (32, 64)),
    *(("resnet18", size, 1) for size in (112, 224)),
]


@pytest.mark.parametrize("evaluations", [64, 124, 274])
@pytest.mark.parametrize(("net", "size", "count"), LOCALITY, ids=[f"{net}-{size}" for net, size, _ in LOCALITY])
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_shapley_locality(race: Any, device: str, net: str, size: int, count: int, evaluations: int) -> None:
    count *= MORE_IMAGES[device]
    model, images, targets = case(net, size, count, device)
    make = partial(PatchShapley, model, (3, size, size), evaluations=evaluations, dtype=SHORT)
    plan = make()
    split = plan._with(SHORT).split
    if split is None:
        pytest.skip(plan._with(SHORT).how)
    batch, plain = quickest({n: partial(make(reuse=False, batch=n), images, targets) for n in FEW_BATCHES[device]}, device)
    params = {"net": net, "size": size, "N": count, "M": evaluations, "dtype": "bfloat16"}
    versions = {"no reuse": plain, "reuse": partial(plan, images, targets)}
    rows = race("shapley locality", params, device, versions, rounds=5, rivals=["no reuse"])
    rows["no reuse"]["figures"] = {"batch": batch}
    rows["reuse"]["figures"] = {
        "predicted": round(split.predicted(evaluations), 3),
        "share": round(split.front_share, 3),
        "last": split.last,
    }


MEMORY = [
    *(("convnet3", 32, n, m, batch) for n in (1, 8, 32) for m in (64, 274) for batch in (32, 128)),
    *(("resnet18", 224, n, 64, batch) for n in (1, 4) for batch in (32, 128)),
]


@pytest.mark.parametrize(("net", "size", "count", "evaluations", "batch"), MEMORY)
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_shapley_memory(
    note: Any, request: pytest.FixtureRequest, device: str, net: str, size: int, count: int, evaluations: int, batch: int
) -> None:
    asked = {"net": net, "size": size, "images": count, "evaluations": evaluations, "batch": batch, "dtype": "bfloat16", "device": device}
    command = [sys.executable, str(Path(__file__).with_name("peak_memory.py")), json.dumps({**asked, "threads": torch.get_num_threads()})]
    rounds = min(3, request.config.option.rounds or 3)
    taken = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(rounds)]
    found = origin("shapley memory", {key: value for key, value in asked.items() if key != "device"}, device)
    found |= summary([t["call"] / 2**20 for t in taken])
    mib = {f"{key}_mib": round(median(t[key] for t in taken) / 2**20, 1) for key in ("plan", "loaded")}
    note(device, {**found, "unit": "MiB", "figures": mib})


@pytest.mark.parametrize("dtype", [torch.float32, SHORT], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("net", "size", "count"), [CASES[0], CASES[2]], ids=["convnet3-32", "resnet18-224"])
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_shapley_peak(race: Any, monkeypatch: pytest.MonkeyPatch, device: str, net: str, size: int, count: int, dtype: torch.dtype) -> None:
    """Multiply-adds of the naive forwards, twice, a second: beside those of a large matrix product in the same format."""
    count *= MORE_IMAGES[device]
    model, images, targets = case(net, size, count, device)
    if device == "cuda":  # the product may do what convolutions do by default
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", torch.backends.cudnn.allow_tf32)
    left, right = (torch.randn(PRODUCT, PRODUCT, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    make = partial(PatchShapley, model, (3, size, size), dtype=dtype)
    plans = {"no reuse": make(reuse=False), "reuse": make(), "compiled": make(compile=True)}
    versions: dict[str, Callable[[], Tensor]] = {"product": partial(torch.mm, left, right, out=out)}
    versions |= {name: partial(plan, images, targets) for name, plan in plans.items()}
    params = {"net": net, "size": size, "N": count, "M": EVALUATIONS, "dtype": str(dtype)[6:]}
    rows = race("shapley peak", params, device, versions, rounds=9)
    work = 2 * multiply_adds(model, images[:1]) * count * EVALUATIONS
    peak = 2 * PRODUCT**3 / rows["product"]["median"]
    for name, found in rows.items():
        rate = peak if name == "product" else work / found["median"]
        found["figures"] = {"gflop_per_s": round(rate / 1e9, 1), "of_peak": round(rate / peak, 3)}


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_shapley_exact(race: Any, device: str) -> None:
    model, images, targets = case("resnet20", 32, 1, device)
    make = partial(PatchShapley, model, (3, 32, 32), design="exact")
    plans = {"float32": make(dtype=torch.float32), "bfloat16": make(dtype=SHORT)}
    params = {"net": "resnet20", "size": 32, "N": 1, "M": len(plans["float32"].coalitions.masks)}
    rows = race("shapley exact", params, device, {name: partial(plan, images, targets) for name, plan in plans.items()}, rounds=3)
    for name, plan in plans.items():
        rows[name]["figures"] = {"plan": repr(plan)}
