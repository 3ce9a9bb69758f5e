"""Training steps with and without `keep_freed_memory`, a process each, in turn: python bench/allocator.py [--record]"""

from __future__ import annotations

import subprocess
import sys
from time import perf_counter, process_time

import torch
from record import keep_rows, row

ROUNDS, STEPS, BATCH = 7, 25, 100


def child(keep: bool) -> None:
    """Print seconds by the clock and of the processor of `STEPS` steps of a ConvNet-3 at 32 px in bfloat16."""
    from infoutil_fast.models import nets
    from infoutil_fast.runtime.device import autocast
    from infoutil_fast.runtime.memory import keep_freed_memory
    from infoutil_fast.training.teaching import sgd

    if keep:
        assert keep_freed_memory()
    net = nets.build("convnet3", 10, 32)
    optimiser = sgd(net, 0.01, 5e-4)
    x = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (BATCH,))
    for step in range(STEPS + 5):
        if step == 5:  # the first steps warm up
            start, busy = perf_counter(), process_time()
        with autocast(x.device, torch.bfloat16):
            logits = net(x)
        torch.nn.functional.cross_entropy(logits.float(), y).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    print(perf_counter() - start, process_time() - busy)


def main() -> None:
    times: dict[str, list[tuple[float, float]]] = {"default": [], "kept": []}
    for _ in range(ROUNDS):
        for name, taken in times.items():
            out = subprocess.run([sys.executable, __file__, "--child", name], check=True, capture_output=True, text=True).stdout
            wall, busy = map(float, out.split())
            taken.append((wall / STEPS, busy / STEPS))
    params = {"net": "convnet3", "size": 32, "batch": BATCH, "dtype": "bfloat16"}
    rows = [row("training step", {**params, "memory": name}, "cpu", taken, times["default"], "default") for name, taken in times.items()]
    for found in rows:
        found["command"] = "python bench/allocator.py"
        ratios = f"{found['ratio']}x ({found['ratio_processor']}x in processor time)"
        print(f"{found['params']['memory']}: {found['median'] * 1e3:.1f} ms a step, {ratios}")
    if "--record" in sys.argv:
        print(keep_rows("cpu", rows))


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(sys.argv[-1] == "kept")
    else:
        main()
