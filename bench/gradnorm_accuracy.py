"""How far gradient norms of a trained net on real images lie from whole gradients in float64: ours and torch's own, in each number format.

python bench/gradnorm_accuracy.py SOURCE --teacher TEACHER [--images 400] [--record]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from record import keep_rows, origin
from torch import Tensor, nn
from tqdm import tqdm

from infoutil_fast.data import open_source
from infoutil_fast.gradnorm.norms import grad_norms
from infoutil_fast.models.teacher import load_teacher
from infoutil_fast.runtime.device import autocast
from infoutil_fast.runtime.rows import summary
from infoutil_fast.scoring.calibrate import spearman

CPU = torch.device("cpu")


def whole(net: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """One backward a sample, as autograd does it: norms [n] float64."""
    norms = []
    for image, target in zip(tqdm(x, desc=f"autograd {str(dtype)[6:]}", leave=False), y, strict=True):
        with autocast(CPU, dtype):
            logits = net(image[None].to(next(net.parameters()).dtype))
        loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target[None])
        grads = torch.autograd.grad(loss, [*net.parameters()])
        norms.append(torch.stack([g.double().square().sum() for g in grads]).sum().sqrt())
    return torch.stack(norms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    source = open_source(args.source)
    teacher = load_teacher(args.teacher, source, CPU)
    net = teacher.net.eval()
    positions = np.random.default_rng(args.seed).choice(len(source.val.labels), args.images, replace=False)
    x = teacher.normalise(source.val.batch(positions, teacher.facts.size))
    y = torch.from_numpy(source.val.labels[positions])
    exact = whole(copy.deepcopy(net).double(), x, y, torch.float64)
    ways: dict[str, Callable[[torch.dtype], Tensor]] = {
        "ours": lambda dtype: grad_norms(net, x, y, dtype=dtype),
        "ours compiled": lambda dtype: grad_norms(net, x, y, dtype=dtype, compile=True),
        "autograd": lambda dtype: whole(net, x, y, dtype),
    }
    measured = []
    command = f"python bench/gradnorm_accuracy.py SOURCE --teacher TEACHER --images {args.images} --seed {args.seed}"
    about = {"source": source.name, "net": teacher.facts.name, "accuracy": teacher.facts.accuracy}
    for dtype in (torch.float32, torch.bfloat16):
        for name, way in ways.items():
            params = {**about, "dtype": str(dtype)[6:], "version": name}
            measured.append({**origin("gradient norms, relative error", params, "cpu"), **compared(way(dtype).double(), exact)})
            measured[-1] |= {"unit": "of the norm in float64", "command": command}
            low, high = measured[-1]["iqr"]
            numbers = ", ".join(f"{key} {value:.6g}" for key, value in measured[-1]["figures"].items())
            middle = f"median {measured[-1]['median']:.2e} [{low:.2e}, {high:.2e}]"
            print(f"{teacher.facts.name} {params['dtype']} {name}: {middle}, {numbers}", flush=True)
    if args.record:
        keep_rows("cpu", measured)


def compared(norms: Tensor, exact: Tensor) -> dict[str, Any]:
    """The relative errors of norms [n], and how far their order is the exact one's."""
    errors = ((norms - exact).abs() / exact).tolist()
    figures = {"p90": float(np.quantile(errors, 0.9)), "largest": max(errors), "spearman": spearman(norms, exact).item()}
    return {**summary(errors), "figures": figures}


if __name__ == "__main__":
    main()
