"""Per-sample gradient norms beside their rivals, in one run: time in turn, then peak memory in a process each.

    python bench/gradnorms.py [--device cuda] [--record] [--cases convnet3:32:128 vit-s:224:8 ...] [--dtypes float32 bfloat16] [--rounds 7]

BackPACK and Opacus are used where they are installed (`pip install --no-deps backpack-for-pytorch opacus`). Opacus refuses batch norm: it
runs on the same net with group norm, and so do "plain gn" and "ours gn" beside it.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from record import keep_rows, row, time_call
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from infoutil_fast.gradnorm.norms import grad_norms
from infoutil_fast.models import nets
from infoutil_fast.runtime.device import autocast
from infoutil_fast.runtime.memory import keep_freed_memory, peak_bytes, reset_peak
from infoutil_fast.types import first_line

CASES = [
    "convnet3:32:128",
    "resnet18-small:32:64",
    "resnet18:112:32",
    "resnet18:224:16",
    "resnet50:112:16",
    "resnet50:224:8",
    "vit-s:224:8",
]
FEWER = 3  # rounds of the rivals; plain passes and ours run in all


class VisionTransformer(nn.Module):
    """ViT-S/16: 12 blocks of width 384 with packed attention of 6 heads, class token and position table."""

    def __init__(self, classes: int, size: int):
        super().__init__()
        self.patches = nn.Conv2d(3, 384, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 384))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // 16) ** 2 + 1, 384))
        block = nn.TransformerEncoderLayer(384, 6, 1536, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 12, nn.LayerNorm(384), enable_nested_tensor=False)
        self.head = nn.Linear(384, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], 1)
        return self.head(self.blocks(x + self.positions)[:, 0])


class Case:
    """One net, batch and dtype, with every way to its norms [n] (plain: only the time)."""

    def __init__(self, spec: str, dtype: torch.dtype, device: str):
        name, size, n = spec.rsplit(":", 2)
        torch.manual_seed(0)
        self.dtype, self.device = dtype, device
        net = VisionTransformer(10, int(size)) if name == "vit-s" else nets.build(name, 10, int(size))
        self.model = net.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.x = torch.randn(int(n), 3, int(size), int(size), device=device).contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(0, 10, (int(n),), device=device)

    def losses(self, model: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        with autocast(torch.device(self.device), self.dtype):
            logits = model(x)
        return F.cross_entropy(logits.float(), y, reduction="sum")

    def plain(self) -> None:
        torch.autograd.grad(self.losses(self.model, self.x, self.y), [*self.model.parameters()])

    def plain_compiled(self) -> Callable[[], None]:
        model, params = torch.compile(self.model), [*self.model.parameters()]

        def run() -> None:
            torch.autograd.grad(self.losses(model, self.x, self.y), params)

        return run

    def ours(self, compile: bool = False) -> Tensor:  # noqa: A002 - as torch calls it
        return grad_norms(self.model, self.x, self.y, dtype=self.dtype, max_memory=1 << 32, compile=compile)

    def vmapped(self) -> Tensor:
        params = {name: p.detach() for name, p in self.model.named_parameters()}

        def square(image: Tensor, target: Tensor) -> Tensor:
            grads = grad(lambda at: self.losses(lambda x: functional_call(self.model, at, (x,)), image[None], target[None]))(params)
            return torch.stack([g.square().sum() for g in grads.values()]).sum()

        return vmap(square)(self.x, self.y).sqrt()

    def looped(self) -> Tensor:
        squares = []
        for i in range(len(self.x)):
            grads = torch.autograd.grad(self.losses(self.model, self.x[i : i + 1], self.y[i : i + 1]), [*self.model.parameters()])
            squares.append(torch.stack([g.square().sum() for g in grads]).sum())
        return torch.stack(squares).sqrt()


def backpack(case: Case) -> Callable[[], Tensor]:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model = extend(copy.deepcopy(case.model), use_converter=True).eval()
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        with autocast(torch.device(case.device), case.dtype), backpack(BatchL2Grad()):
            loss(model(case.x), case.y).backward()
        return torch.stack([p.batch_l2 for p in model.parameters()]).sum(0).sqrt()

    return run


def with_group_norm(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, nn.GroupNorm(32, child.num_features))
        else:
            with_group_norm(child)
    return model


def opacus(case: Case, ghost: bool) -> Callable[[], Tensor]:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    model = copy.deepcopy(case.model).train()
    kind = GradSampleModuleFastGradientClipping if ghost else GradSampleModule
    options = {"max_grad_norm": 1.0, "use_ghost_clipping": True} if ghost else {}
    wrapped = kind(model, batch_first=True, loss_reduction="sum", **options)

    def run() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        case.losses(wrapped, case.x, case.y).backward()
        if ghost:
            return wrapped.get_norm_sample()
        return torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in wrapped.parameters()]).sum(0).sqrt()

    return run


def ways(spec: str, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What makes each version's call; a rival is imported, and a net built, only for the versions that run."""
    case = cache(partial(Case, spec, dtype, device))

    @cache
    def grouped() -> Case:
        other = Case(spec, dtype, device)
        other.model = with_group_norm(other.model)
        return other

    return {
        "plain": lambda: case().plain,
        "plain compiled": lambda: case().plain_compiled(),
        "ours": lambda: case().ours,
        "ours compiled": lambda: partial(case().ours, compile=True),
        "BackPACK": lambda: backpack(case()),
        "torch.func": lambda: case().vmapped,
        "loop": lambda: case().looped,
        "plain gn": lambda: grouped().plain,
        "ours gn": lambda: grouped().ours,
        "Opacus ghost": lambda: opacus(grouped(), ghost=True),
        "Opacus hooks": lambda: opacus(grouped(), ghost=False),
    }


def print_peak(spec: str, dtype: torch.dtype, device: str, name: str) -> None:
    """Print how much one call adds to what the process holds, in MiB. One of a single sample goes before, which loads what it needs."""
    ways(f"{spec.rpartition(':')[0]}:1", dtype, device)[name]()()
    call, at = ways(spec, dtype, device)[name](), torch.device(device)
    reset_peak(at)
    before = peak_bytes(at)
    call()
    print((peak_bytes(at) - before) >> 20)


def peak_apart(spec: str, dtype: torch.dtype, device: str, name: str) -> int:
    """`print_peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", spec, str(dtype)[6:], device, name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def able(spec: str, dtype: torch.dtype, device: str, only: list[str] | None) -> dict[str, Callable[[], Any]]:
    """The call of each version that runs here, tried once; how far its norms are from ours, or why it cannot, is printed."""
    makers = ways(spec, dtype, device)
    ours = makers["ours"]()()
    calls: dict[str, Callable[[], Any]] = {}
    for name, make in makers.items():
        if only and name not in ("plain", *only):
            continue
        try:
            calls[name] = make()
            got = calls[name]()
        except (ImportError, NotImplementedError, RuntimeError, AttributeError, AssertionError) as error:
            print(f"{spec} {dtype}: {name} cannot: {first_line(error)}", flush=True)
            calls.pop(name, None)
            continue
        if got is not None and "gn" not in name and "Opacus" not in name:
            difference = ((got.detach() - ours).abs() / ours).median().item()
            print(f"{spec} {dtype}: {name} differs from ours by {difference:.1e} (median)", flush=True)
    return calls


def raced(spec: str, dtype: torch.dtype, device: str, rounds: int, only: list[str] | None) -> list[dict[str, Any]]:
    calls = able(spec, dtype, device, only)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if turn >= FEWER and not name.startswith(("plain", "ours")):
                continue
            times[name].append(time_call(call, device))
    with ThreadPoolExecutor(2) as pool:  # of processes: memory does not depend on what else runs
        peaks = dict(zip(times, pool.map(partial(peak_apart, spec, dtype, device), times), strict=True))
    net, size, batch = spec.rsplit(":", 2)
    params = {"net": net, "size": int(size), "batch": int(batch), "dtype": str(dtype)[6:]}
    rows = []
    for name, taken in times.items():
        baseline = "plain gn" if "gn" in name or "Opacus" in name else "plain"
        found = row("gradient norms", {**params, "version": name}, device, taken, times[baseline], baseline)
        found["peak_mib"] = peaks[name]
        found["command"] = f"python bench/gradnorms.py --device {device} --cases {spec} --dtypes {str(dtype)[6:]} --rounds {rounds}"
        wall, busy = (median(column) for column in zip(*taken, strict=True))
        against, against_busy = (median(column) for column in zip(*times[baseline], strict=True))
        print(
            f"{spec} {str(dtype)[6:]} {name}: {wall * 1e3:.1f} ms, {wall / against:.2f} of {baseline}"
            f" ({busy / against_busy:.2f} in processor time), {found['peak_mib']} MiB",
            flush=True,
        )
        rows.append(found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="versions to run besides the baseline of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.peak:
        return print_peak(args.peak[0], getattr(torch, args.peak[1]), *args.peak[2:])
    keep_freed_memory()
    for spec in args.cases:
        for dtype in args.dtypes:
            rows = raced(spec, getattr(torch, dtype), args.device, args.rounds, args.only)
            if args.record:
                keep_rows(args.device, rows)
    return None


if __name__ == "__main__":
    main()
