"""How time grows: with the number of tokens, and (it must not) from the first step to the last. Pure
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median, quantiles
from typing import Any

import torch


def fit(tokens: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    """a + b N + c N² through seconds over N, by least squares of the relative error, no coefficient negative.

    Returns: a (seconds), b (per token), c (per token²); r2 of the seconds; `residuals`, fitted over measured
    less one. Two points or fewer fit anything, and more unknowns than points are never fitted.
    """
    n, y = (torch.tensor(list(v), dtype=torch.float64) for v in (tokens, seconds))
    scale = float(n.max())
    terms = torch.stack([torch.ones_like(n), n / scale, (n / scale) ** 2], dim=1)
    best, least = torch.zeros(3, dtype=torch.float64), float("inf")
    # Where a coefficient would be negative the best fit has it at zero, so the best of all subsets is the
    # answer.
    for count in range(1, min(3, len(n)) + 1):
        for used in map(list, combinations(range(3), count)):
            found = torch.linalg.lstsq(
                terms[:, used] / y[:, None], torch.ones(len(n), 1, dtype=torch.float64)
            ).solution[:, 0]
            error = float(((terms[:, used] @ found / y - 1) ** 2).sum())
            if bool((found >= 0).all()) and error < least:
                best, least = (
                    torch.zeros(3, dtype=torch.float64).index_put((torch.tensor(used),), found),
                    error,
                )
    fitted = terms @ best
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(((fitted - y) ** 2).sum()) / spread if spread else 1.0
    a, b, c = (float(v) / scale**power for power, v in enumerate(best))
    return {"a": a, "b": b, "c": c, "r2": r2, "residuals": (fitted / y - 1).tolist()}


def steadiness(whole: dict[str, Any]) -> dict[str, Any]:
    """Whether the guided steps of one run (of the unguided, where none is) stay as they were; the run's
    first, warming up, left out.

    Returns: `first` and `last`, medians of the seconds of five steps at either end; `drift`, last over first
    less one; `spread`, the middle half of all of them over their median, which is the noise to set the drift
    against; `memory_growth`, bytes in use after the last of all steps less after the second (None where
    nobody counts); and `allocation_growth`, the same for the number of allocations made in a step, guided
    steps only (None but on CUDA).
    """
    kind = any(whole["guided"][1:])
    same = [i for i, guided in enumerate(whole["guided"]) if i and guided == kind]
    times = [whole["steps"][i] for i in same]
    few = min(5, len(times))
    first, last = median(times[:few]), median(times[-few:])
    low, middle, high = quantiles(times, n=4) if len(times) > 1 else times * 3
    memory, made = whole["memory_bytes"], whole["allocations"]
    counted = [made[i - 1] for i in same] if made else None  # the first step has no count
    return {
        "first": first,
        "last": last,
        "drift": last / first - 1,
        "spread": (high - low) / middle,
        "memory_growth": None if None in memory else memory[-1] - memory[1],
        "allocation_growth": counted[-1] - counted[0] if counted else None,
    }
