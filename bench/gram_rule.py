"""Fit the rule by which a convolution's norm is taken from Gram matrices or directly (`gradnorm.rules.gram_is_cheaper`).

    python bench/gram_rule.py [--device cuda] [--shapes 60] [--record]

Random shapes of layers are timed both ways; a rule's regret is how much longer its choices take than the faster form, the geometric mean.
The fitted constants are those of least regret on one half of the shapes, and what is told of them was measured on the other half.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable, Sequence
from statistics import median

import torch
from record import keep_rows, origin, time_call

from infoutil_fast.gradnorm import rules
from infoutil_fast.ops.sqnorms import conv_grad_sqnorm, gram_sqnorm
from infoutil_fast.runtime.rows import summary

Shape = tuple[int, int, int, int, int]  # C, O, side, kernel, stride
Measured = tuple[Shape, float, float]  # seconds of the direct form and of the Gram form
FACTORS = [0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.8, 4.0]
SHIFTS = [0.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0]


def layers(count: int, seed: int) -> list[Shape]:
    """Layers of which either form may be the faster: channels and sides of usual nets."""
    at = random.Random(seed)
    channels, sides = (3, 16, 32, 64, 96, 128, 192, 256, 384, 512), (4, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
    every = itertools.product(channels, channels[1:], sides, (1, 3, 5, 7), (1, 2))
    return at.sample(
        [s for s in every if s[3] <= s[2] and s[0] * s[1] * s[2] ** 2 * s[3] ** 2 < 2e9 and s[2] ** 4 * max(s[:2]) < 2e8], count
    )


def both_ways(shape: Shape, dtype: torch.dtype, device: str, samples: int) -> tuple[float, float]:
    c, o, side, k, s = shape
    x = torch.randn(samples, c, side, side, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    out = (side + 2 * (k // 2) - k) // s + 1
    g = torch.randn(samples, o, out, out, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    options = (k, k), (s, s), (k // 2, k // 2), (1, 1)
    forms: list[Callable[[], object]] = [lambda: conv_grad_sqnorm(x, g, *options), lambda: gram_sqnorm(x, g, *options)]
    times: list[list[float]] = [[], []]
    for turn in range(4):
        for form, taken in zip(forms, times, strict=True):
            elapsed = time_call(form, device)[0]
            if turn:
                taken.append(elapsed)
    return median(times[0]), median(times[1])


def regret(found: Sequence[Measured], factor: float, shift: float) -> float:
    logs = []
    for shape, direct, gram in found:
        taken = gram if chosen(shape, factor, shift) else direct
        logs.append(math.log(taken / min(direct, gram)))
    return math.exp(sum(logs) / len(logs)) - 1


def chosen(shape: Shape, factor: float, shift: float) -> bool:
    c, o, side, k, s = shape
    out = (side + 2 * (k // 2) - k) // s + 1
    return rules.gram_is_cheaper((side, side), (out, out), (c, o), (k, k), (s, s), factor, shift)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", type=int, default=60)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        found = [(shape, *both_ways(shape, dtype, args.device, args.samples)) for shape in layers(args.shapes, args.seed)]
        fit, held = found[::2], found[1::2]
        best = min(itertools.product(FACTORS, SHIFTS), key=lambda constants: regret(fit, *constants))
        now = rules.GRAM_FACTOR, rules.GRAM_SHIFT
        tried = {"now": now, "fitted": best, "always direct": (math.inf, 0.0), "always gram": (0.0, 0.0)}
        print(f"{args.device} {str(dtype)[6:]}: Gram is faster on {sum(g < d for _, d, g in found)} of {len(found)} shapes")
        for name, (factor, shift) in tried.items():
            on = {half: round(regret(rows_, factor, shift), 4) for half, rows_ in (("fit", fit), ("held out", held))}
            print(f"    {name} ({factor}, {shift}): regret {on['fit']:.1%} on the half fitted, {on['held out']:.1%} on the other")
            params = {
                "dtype": str(dtype)[6:],
                "rule": name,
                "factor": str(factor),
                "shift": shift,
                "shapes": len(found),
                "samples": args.samples,
            }
            command = f"python bench/gram_rule.py --device {args.device} --shapes {args.shapes} --seed {args.seed}"
            rows.append(
                {**origin("gram rule regret", params, args.device), **summary([on["held out"]]), "unit": "share", "command": command}
            )
    if args.record:
        keep_rows(args.device, rows)


if __name__ == "__main__":
    main()
