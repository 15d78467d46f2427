"""Measuring on any torch device: medians, peak memory, matmul and copy rates, random weights in place.

Knows nothing of what is measured.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Progress
from ..errors import RequestError
from ..model.dual_expert import DualExpert
from ..model.experts import Generation, Understanding

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
E = TypeVar("E", Understanding, Generation)
CPU = torch.device("cpu")
MATMUL_SIDE = {"cpu": 2048}
COPY_BYTES = {"cpu": 1 << 28}
ACCELERATOR_SIDE, ACCELERATOR_BYTES = 8192, 1 << 30
BLOCK = 1 << 20  # random numbers drawn; larger tensors repeat them


def device_of(name: str | None) -> torch.device:
    """The device by name, CUDA where there is one by default.

    Raises:
        RequestError: torch cannot use it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("nothing is computed there")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); 'cpu' always can"
        ) from None
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None and device.type != "cpu":
        wait()


class Others:
    """How much of the processor other programs take from now on: on a CPU, that is in every number."""

    def __init__(self) -> None:
        self.began = self._read()

    def cores(self) -> float | None:
        """Cores' worth, on average; None where the system does not say."""
        ended = self._read()
        if self.began is None or ended is None:
            return None
        busy, own, wall = (now - then for now, then in zip(ended, self.began, strict=True))
        return max(busy - own, 0.0) / wall

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds of all cores' work, of this process's and of the clock (man 5 proc: the first line of
        /proc/stat).
        """
        fields = _read("/proc/stat").partition("\n")[0].split()
        if fields[:1] != ["cpu"]:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, time.process_time(), time.perf_counter()


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What is measured on."""
    from .. import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "lance_core": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _processor() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def watched(things: Mapping[str, T], progress: Progress | None) -> Iterator[T]:
    """Each thing in turn, by its name in the progress told."""
    for done, (name, thing) in enumerate(things.items()):
        if progress is not None:
            progress(name, done, len(things))
        yield thing


# -- memory --------------------------------------------------------------------------------------------------


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(path: str, name: str) -> int | None:
    """Bytes in a `Name:   123 kB` line of /proc."""
    found = [line.split()[1] for line in _read(path).splitlines() if line.startswith(name + ":")]
    return int(found[0]) * 1024 if found else None


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on the device; infinity where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    there: float = _field("/proc/meminfo", "MemAvailable") or float("inf")
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return min(there, int(limit) - int(used)) if limit.isdecimal() and used.isdecimal() else there


class Peak:
    """Most memory in use since `reset`, or since the process began: what CUDA allocated, or on the CPU the
    process's resident memory. None where the system cannot say.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.counts = device, device.type == "cpu"

    def now(self) -> int | None:
        """Bytes in use."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _field("/proc/self/status", "VmRSS") if self.device.type == "cpu" else None

    def reset(self) -> None:
        """Forget the peak, not what is in use."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.counts:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
            except OSError:
                self.counts = False

    def read(self) -> int | None:
        """The peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _field("/proc/self/status", "VmHWM") if self.counts else None


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- time ----------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds by the clock, the device's work included."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        """Seconds since the last lap, or since this was made."""
        synchronize(self.device)
        now = time.perf_counter()
        took, self.began = now - getattr(self, "began", now), now
        return took


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    watch = Stopwatch(device)
    call()
    return watch.lap()


class Meter:
    """Medians of several versions of one thing, timed in turns so that a busy machine is unfair to none.

    chunk: how many steps or tokens to run per call, so that waiting for an accelerator does not count. calls:
    in all. budget: seconds after which, from the second turn on, no further turn is begun; None: `repeat`
    turns however long.
    """

    def __init__(self, device: torch.device, repeat: int, budget: float | None = None) -> None:
        self.device, self.repeat = device, repeat
        self.budget = float("inf") if budget is None else budget
        self.warmup, self.chunk = (1, 1) if device.type == "cpu" else (2, 4)
        self.calls = self.warmup + repeat

    def __call__(
        self, setups: Mapping[str, Callable[[], Callable[[], object]]], per: int = 1
    ) -> dict[str, dict[str, Any]]:
        """`setups`: name -> a function that makes what is timed ready and returns it; one call of that counts
        as `per`.

        Returns: for each name median, least and most `seconds` of its `runs`, and `working_bytes`: the peak
        above what was there before its setup. The first, which nothing else has been set up beside, also says
        `peak_bytes`, weights included.
        """
        calls: dict[str, Callable[[], object]] = {}
        found: dict[str, dict[str, Any]] = {}
        for name, setup in setups.items():
            gc.collect()
            memory = Peak(self.device)
            before = memory.now()
            calls[name] = setup()
            synchronize(self.device)
            memory.reset()
            spent = 0.0
            for _ in range(self.warmup):
                spent += timed(calls[name], self.device)
                if spent > self.budget / 4:
                    break
            most = memory.read()
            found[name] = {"working_bytes": None if most is None or before is None else max(most - before, 0)}
            if len(found) == 1:
                found[name]["peak_bytes"] = most
        times: dict[str, list[float]] = {name: [] for name in calls}
        began = time.perf_counter()
        for turn in range(self.repeat):
            if turn > 1 and time.perf_counter() - began > self.budget:
                break
            for name, call in calls.items():
                times[name].append(timed(call, self.device) / per)
        return {
            n: {"seconds": median(t), "fastest": min(t), "slowest": max(t), "runs": len(t)} | found[n]
            for n, t in times.items()
        }


def rates(device: torch.device, dtype: torch.dtype, repeat: int = 20) -> dict[str, dict[str, float]]:
    """What the device does at best: a large square matrix product in `dtype`, and a large copy (bytes read
    plus written).

    The fastest of `repeat` counts here: these are ceilings, and whatever else the machine does only lowers
    them.
    """
    side = MATMUL_SIDE.get(device.type, ACCELERATOR_SIDE)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.empty(side, side, device=device, dtype=dtype).normal_(generator=generator) for _ in range(2)
    )
    product = torch.empty_like(a)
    meter = Meter(device, repeat)
    seconds = meter({"matmul": lambda: lambda: torch.mm(a, b, out=product)})["matmul"]["fastest"]
    size = COPY_BYTES.get(device.type, ACCELERATOR_BYTES)
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_(generator=generator)
    target = torch.zeros_like(source)
    copying = meter({"copy": lambda: lambda: target.copy_(source)})["copy"]["fastest"]
    return {
        "matmul": {"side": side, "seconds": seconds, "flops_per_second": 2 * side**3 / seconds},
        "copy": {"bytes": 2 * size, "seconds": copying, "bytes_per_second": 2 * size / copying},
    }


# -- models --------------------------------------------------------------------------------------------------


def fill(module: M, make: Callable[[nn.Module, str, nn.Parameter], Tensor]) -> M:
    """A module with every parameter replaced by what `make` (its owner, its name there, itself) returns."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(make(owner, name, parameter), requires_grad=False))
    return module.eval()


def materialise(module: M, device: torch.device, dtype: torch.dtype) -> M:
    """A module on the meta device, its weights made random in place: norms one, the rest of variance 1 /
    fan-in.

    Each weight is allocated once, in its final dtype and place. Global random state is left alone.
    """
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(device)

    def random(owner: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
        weight = torch.empty(parameter.shape, device=device, dtype=dtype)
        if name == "gamma" or (name == "weight" and weight.dim() == 1):
            return weight.fill_(1)
        scaled = (block / (weight[0].numel() ** 0.5 if weight.dim() > 1 else 50)).to(dtype)
        for part in weight.view(-1).split(BLOCK):
            part.copy_(scaled[: len(part)])
        return weight

    return fill(module, random)


def cut_layers(model: DualExpert, layers: int) -> DualExpert:
    """The same model, weights shared, with its first `layers` layers only."""

    def cut(expert: E) -> E:
        short = copy.copy(expert)
        vars(short)["_modules"] = expert._modules | {"layers": expert.layers[:layers]}
        return short

    config = replace(model.config, num_layers=layers)
    gen = None if model.gen is None else cut(model.gen)
    return DualExpert(
        config, cut(model.und), gen, attention=model.attention, dtype=model.dtype, device=model.device
    )


# -- other processes -----------------------------------------------------------------------------------------


def child(
    module: str, *words: str, python: str = sys.executable, cwd: Path | None = None, path: Sequence[Path] = ()
) -> Any:
    """What `python -m module words` writes as JSON in its last line, in a process of its own.

    path: folders to look for modules in before that of lance_core.

    Raises:
        RequestError: it failed; with the last it said.
    """
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, root)))}
    done = subprocess.run([python, "-m", module, *words], capture_output=True, text=True, cwd=cwd, env=env)
    if done.returncode:
        raise RequestError(f"python -m {module} failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
