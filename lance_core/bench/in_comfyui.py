"""Run by ComfyUI's Python, in its folder, for `bench overhead`: the same steps through it and without it.

ComfyUI is run from its main.py, as `python main.py` does, and not imported: whatever it has loaded is taken
from what that file holds. The one argument is the request, a JSON file; the result is JSON on stdout.
"""

from __future__ import annotations

import asyncio
import cProfile
import inspect
import json
import pstats
import runpy
import sys
import time
import uuid
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch.profiler import ProfilerActivity, profile

from ..config import latent_grid
from ..inputs import prompts
from ..inputs.tasks import TASKS
from ..model.denoise import denoise
from ..model.plan import Plan
from ..model.sampler import Guidance, schedule, seeded_noise
from ..pipeline import load
from .device import synchronize
from .overhead import OURS, PATHS, difference

CFG = 4.0
PROMPT = "a red fox in the snow"
Graph = dict[str, dict[str, Any]]
Seen = dict[str, tuple[float, float]]  # name -> (calls, seconds) of a step


class Sink:
    """An output node: ComfyUI runs only what leads to one."""

    OUTPUT_NODE = True
    RETURN_TYPES = ()
    FUNCTION = "keep"
    CATEGORY = "testing"
    kept: ClassVar[list[Any]] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Any) -> bool:
        return True  # of any type

    def keep(self, value: Any) -> tuple[()]:
        """Put the value where `ComfyUI.value` finds it."""
        self.kept[:] = [value]
        return ()


class ComfyUI:
    """ComfyUI in this process, started and not listening."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        sys.argv = ["main.py", *arguments]
        main = runpy.run_path(str(folder / "main.py"), run_name="main")
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        _, self.server, _ = main["start_comfyui"](loop)
        self.execution = main["execution"]
        main["nodes"].NODE_CLASS_MAPPINGS["Sink"] = Sink
        # Newer ones drop results when memory is short, unless told to keep them.
        newer = "cache_args" in inspect.signature(self.execution.PromptExecutor).parameters
        cache = {"cache_args": dict.fromkeys(("lru", "ram", "ram_inactive"), 0)} if newer else {}
        self.executor = self.execution.PromptExecutor(self.server, **cache)

    def value(self, graph: Graph, node: str) -> Any:
        """The first output of a node; what did not change since the last call is not run again."""
        graph = {**graph, "sink": _node("Sink", value=[node, 0])}
        key = uuid.uuid4().hex
        valid, error, outputs, wrong = asyncio.run(self.execution.validate_prompt(key, graph, None))
        if not valid or wrong:
            raise RuntimeError(f"ComfyUI refuses the workflow: {error} {wrong}")
        self.executor.execute(graph, key, {"client_id": "bench"}, outputs)
        for event, data in self.executor.status_messages:
            if event == "execution_error":
                raise RuntimeError(f"{data.get('node_type')}: {data.get('exception_message')}")
        return Sink.kept[0]


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


class Paths:
    """The ways to the same latent."""

    def __init__(self, comfy: ComfyUI, checkpoint: Path, width: int, height: int, steps: int) -> None:
        self.comfy, self.steps, self.grid = comfy, steps, latent_grid(width, height)
        size = {"size": "custom", "aspect": "1:1", "width": width, "height": height}
        text = {"prompt": PROMPT, "negative_prompt": "", "target": "image"}
        self.graph: Graph = {
            "loader": _node("LanceLoader", checkpoint=checkpoint.name, weight_dtype="default"),
            "text": _node("LanceTextEncode", lance=["loader", 1], **text),
            "latent": _node("EmptyLanceLatent", **size, frames=1, batch_size=1),
        }
        patcher = comfy.value(self.graph, "loader")
        self.dtype, self.device = patcher.model.compute_dtype, patcher.load_device
        self.lance = load(checkpoint, self.device, self.dtype)
        self.seed = 0
        self.stamps: list[tuple[float, float]] = []
        send = comfy.server.send_sync

        def watched(event: Any, data: Any, sid: Any = None) -> None:
            if event == "progress":
                self.stamp()
            send(event, data, sid)

        comfy.server.send_sync = watched

    def stamp(self, *_: Any) -> None:
        """The time now, by the clock and by what this process has computed, the device's work included."""
        synchronize(self.device)
        self.stamps.append((time.perf_counter(), time.process_time()))

    def run(self, path: str) -> tuple[float, list[tuple[float, float]]]:
        """(seconds of a whole run; of each step after the first, seconds and processor seconds)."""
        self.seed += 1
        self.stamps.clear()
        self.stamp()
        self._core() if path == OURS else self.comfy.value(self._sampling(path), "sampler")
        self.stamp()
        (began, *steps, ended) = self.stamps
        if len(steps) != self.steps:
            raise RuntimeError(f"{path} reported {len(steps)} steps instead of {self.steps}")
        return ended[0] - began[0], [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(steps)]

    def _sampling(self, path: str) -> Graph:
        shared: dict[str, Any] = {"model": ["loader", 0], "positive": ["text", 0], "negative": ["text", 1]}
        shared |= {"seed": self.seed, "steps": self.steps, "cfg": CFG, "denoise": 1.0}
        latent = ["latent", 0]
        if path == "KSampler":
            sampler = _node(path, **shared, latent_image=latent, sampler_name="euler", scheduler="simple")
        else:
            guidance = {"cfg_start": 1.0, "cfg_end": 0.0, "renorm": "global", "renorm_min": 0.0}
            sampler = _node("LanceSampler", **shared, **guidance, latent=latent, sampler="euler", shift=3.5)
        return {**self.graph, "sampler": sampler}

    @torch.inference_mode()
    def _core(self) -> None:
        lance = self.lance
        system = TASKS["t2i"].default_system_prompt
        sequence = prompts.generation(lance.checkpoint.tokenizer, system, [], PROMPT, self.grid)
        model = lance.components.experts()
        prepared = model.prefill(Plan.of(sequence, lance.config.tokens_per_second, guided=True))
        x = seeded_noise(self.seed, self.grid)[None].to(self.device)
        guidance = Guidance(CFG, (0.0, 1.0))
        denoise(model, prepared, x, schedule(self.steps), guidance, callback=self.stamp).cpu()


def measure(paths: Paths, rounds: int) -> dict[str, dict[str, float]]:
    """Each path's median step and run, and what ComfyUI's add to lance_core's."""
    for path in PATHS:
        paths.run(path)  # warms up: loads the model, fills caches
    steps: dict[str, list[tuple[float, float]]] = {path: [] for path in PATHS}
    runs: dict[str, list[float]] = {path: [] for path in PATHS}
    for _ in range(rounds):
        for path in PATHS:
            whole, each = paths.run(path)
            steps[path] += each
            runs[path].append(whole)
    found: dict[str, dict[str, float]] = {}
    for path in PATHS:
        clock, processor = (median(times) for times in zip(*steps[path], strict=True))
        run = median(runs[path])
        beside = run - paths.steps * clock
        found[path] = {"step": clock, "processor": processor, "run": run, "run_beside_steps": beside}
    core = dict(found[OURS])
    for one in found.values():
        one |= {f"{key}_overhead": one[key] / core[key] - 1 for key in ("step", "processor", "run")}
    return found


def profiled_operations(paths: Paths, path: str) -> Seen:
    """torch's operations in one run, each with what it computes itself."""
    cuda = paths.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        paths.run(path)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    return {e.key: (e.count / paths.steps, getattr(e, own) / 1e6 / paths.steps) for e in seen.key_averages()}


def profiled_python(paths: Paths, path: str) -> Seen:
    """Python files in one run; what is built in counts for the file that calls it."""
    profiler = cProfile.Profile()
    profiler.runcall(paths.run, path)
    calls: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)

    def count(file: str, times: int, took: float) -> None:
        short = "/".join(Path(file).parts[-2:])
        calls[short] += times
        seconds[short] += took

    stats: dict[Any, Any] = vars(pstats.Stats(profiler))["stats"]
    for (file, _, _), (_, times, own, _, callers) in stats.items():
        if file.startswith(("~", "<")):
            for (caller, _, _), (_, its, inside, _) in callers.items():
                count(caller, its, inside)
        else:
            count(file, times, own)
    return {file: (calls[file] / paths.steps, seconds[file] / paths.steps) for file in calls}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Everything; the keys of `request` are overhead.run's."""
    comfy = ComfyUI(Path(request["comfyui"]), request["arguments"])
    width, height = request["size"]
    paths = Paths(comfy, Path(request["checkpoint"]), width, height, request["steps"])
    found = measure(paths, request["rounds"])
    profiles = {}
    for what, look in (("operations", profiled_operations), ("python", profiled_python)):
        seen = {path: look(paths, path) for path in PATHS}
        profiles[what] = {p: difference(seen[p], seen[OURS], request["top"]) for p in PATHS if p != OURS}
    attention = sys.modules["comfy.ldm.modules.attention"].optimized_attention
    return {
        "device": str(paths.device),
        "dtype": str(paths.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "attention": attention.__name__.removeprefix("attention_"),
        "paths": found,
        "profiles": profiles,
    }


if __name__ == "__main__":
    answer = run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
