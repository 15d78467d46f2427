"""What a pass's time goes to: torch's profiler, with everything it names put under a few kinds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .device import timed

COUNTED = ("matrix products", "convolutions", "attention")  # what the limits count
REST, BETWEEN = "element by element", "between"
# Names of torch's operators and of CUDA's kernels; the first that fits counts.
KINDS = (
    ("attention", r"scaled_dot_product|flash|fmha|sdpa|attention"),
    ("convolutions", r"conv|fprop|implicit"),
    ("matrix products", r"(^|_|::)(add|b|baddb|scaled_)?mm(_|$)|linear|gemm|gemv|cutlass|nvjet|cublas"),
    ("norms", r"norm"),
    (
        "copies",
        r"copy|clone|contiguous|memcpy|memset|(^|::|_)cat|index_put|fill_|zero_|embedding|index_select",
    ),
)
NAMES = (*COUNTED, "norms", "copies", REST, BETWEEN)
MOST = 12  # operations listed


def profile(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """One call, warmed up by another, taken apart.

    Returns: `seconds` by the clock, profiler included; `kinds`, seconds of each of NAMES, where "between" is
    Python and dispatch on a CPU and an idle device elsewhere; `operations`, the longest: name, kind, seconds,
    times called.
    """
    timed(call, device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as recorded:
        seconds = timed(call, device)
    return summary(recorded.events(), seconds, device)


def summary(events: Iterable[Any], seconds: float, device: torch.device) -> dict[str, Any]:
    """`profile`'s result from the profiler's events: a CPU's operators less what they call, or else the
    device's kernels.
    """
    kinds = dict.fromkeys(NAMES, 0.0)
    operations: dict[tuple[str, str], list[Any]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        kernel = event.device_type != torch.autograd.DeviceType.CPU
        if kernel == (device.type == "cpu") or getattr(event, "is_user_annotation", False):
            continue
        took = (event.time_range.elapsed_us() if kernel else event.self_cpu_time_total) / 1e6
        kind = kind_of(event)
        kinds[kind] += took
        one = operations[event.name, kind]
        one[0], one[1] = one[0] + took, one[1] + 1
    kinds[BETWEEN] = max(seconds - sum(kinds.values()), 0.0)
    longest = sorted(operations.items(), key=lambda item: -item[1][0])[:MOST]
    return {
        "seconds": seconds,
        "kinds": kinds,
        "operations": [[name, kind, took, count] for (name, kind), (took, count) in longest],
    }


def kind_of(event: Any) -> str:
    """Of an event by its name, or by the nearest operator's that called it: a norm may be made of sums and
    products.
    """
    while event is not None:
        found = next((kind for kind, names in KINDS if re.search(names, event.name.lower())), None)
        if found:
            return found
        event = event.cpu_parent
    return REST


def shares(profiled: dict[str, Any]) -> dict[str, float]:
    """Kinds as shares of all of the time."""
    total = sum(profiled["kinds"].values())
    return (
        {kind: took / total for kind, took in profiled["kinds"].items()}
        if total
        else dict.fromkeys(NAMES, 0.0)
    )
