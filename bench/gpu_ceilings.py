"""Measures what the device reaches: bytes per second of a large copy, and FLOP/s of a large bfloat16 product.

    python -m bench.gpu_ceilings

The figures are the ceilings that all others are read against.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.gpu_race import DEVICE, DRY, wait
from bench.tables import record

COPIED, SIDE = (1 << 16, 64) if DRY else (2 << 30, 8192)
ROUNDS, CALLS = (1, 1) if DRY else (5, 20)


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds per call: the median over the rounds, and the least. The first round warms up and does not count."""
    times = []
    for _ in range(1 + ROUNDS):
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        wait()
        times.append((time.perf_counter() - start) / CALLS)
    return median(times[1:]), min(times[1:])


def main() -> None:
    """Prints and records both ceilings."""
    source = torch.ones(COPIED, device=DEVICE, dtype=torch.int8)
    target = torch.empty_like(source)
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    copy, product = seconds(lambda: target.copy_(source)), seconds(lambda: torch.mm(a, b, out=out))
    found = {
        f"copy of {COPIED >> 20} MiB, TB/s": [2e-12 * COPIED / s for s in copy],
        f"bfloat16 product of {SIDE} cubed, TFLOP/s": [2e-12 * SIDE**3 / s for s in product],
    }
    print("Ceilings, median and best" + (" (dry run: the figures mean nothing)" if DRY else ""))
    for name, (middle, best) in found.items():
        print(f"  {name:44}{middle:10.3f}{best:10.3f}")
    record({"op": "ceilings", "dry": DRY, "figures": found})


if __name__ == "__main__":
    main()
