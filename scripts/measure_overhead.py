"""What ComfyUI's path costs over the core: time of a denoising step through the pack's nodes, against
lance_core alone.

    python scripts/measure_overhead.py [--layers 2] [--size 256x256] [--steps 6] [--rounds 5] [--json FILE]
    python scripts/measure_overhead.py --model models/lance/Lance_3B --size 768x768 --gpu

On a CPU, ComfyUI has an attention of its own unless told otherwise (`--comfy use-pytorch-cross-attention`);
on a GPU it takes torch's, as lance_core does.

Finds ComfyUI as scripts/comfyui.py does and starts it in one process, without its server listening. There, Lance
Sampler, KSampler and lance_core's own denoising take turns on the same device, with the same weights, dtype,
schedule and guidance in every step; the medians count. Without `--model` the weights are random at the
released widths, cut to few layers (a step then costs less, and a fixed overhead shows more than it would with
all of them). On a CPU that others use too, set OMP_NUM_THREADS=1 and read the processor's time. Then one run
of
either is profiled: which operations and which Python files take the difference.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "host" / "inproc")]

import comfyui as comfyui_script  # noqa: E402

GOAL = 0.03  # overhead of a step
INSIDE = "LANCE_OVERHEAD_COMFYUI"  # set where the script runs again, in the host's Python
CFG = 4.0
OURS = "lance_core"
PATHS = ("Lance Sampler", "KSampler", OURS)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint folder, instead of random weights")
    parser.add_argument("--layers", type=int, default=2, help="of the random weights; default: %(default)s")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny widths: hardly any arithmetic, so that a step is what calling it costs",
    )
    parser.add_argument("--size", default="256x256", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=6, help="in a run, at least 2; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each path; default: %(default)s")
    parser.add_argument("--gpu", action="store_true", help="let ComfyUI use the GPU")
    parser.add_argument(
        "--comfy",
        nargs="+",
        default=[],
        metavar="ARG",
        help="ComfyUI's own, without dashes: use-pytorch-cross-attention",
    )
    parser.add_argument("--top", type=int, default=10, help="lines of each profile; default: %(default)s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sides = args.size.split("x")
    if len(sides) != 2 or not all(s.isdecimal() for s in sides):
        parser.error(f"--size is {args.size!r}, expected WIDTHxHEIGHT in pixels")
    if args.steps < 2 or args.rounds < 1 or args.layers < 1:
        parser.error("--steps must be at least 2, --rounds and --layers at least 1")
    return args


def write_checkpoint(folder: Path, layers: int, small: bool) -> Path:
    """Random weights at the released widths (or tiny ones), `layers` deep, few rows of vocabulary, a tiny ViT
    and VAE.
    """
    import torch

    from lance_core.checkpoint import tiny
    from lance_core.config import RELEASED_LLM

    llm = (
        replace(tiny.LLM, num_layers=layers)
        if small
        else replace(RELEASED_LLM, num_layers=layers, vocab_size=8192)
    )
    return (
        tiny.write(
            folder, llm=llm, vit=replace(tiny.VIT, out_hidden_size=llm.hidden_size), dtype=torch.bfloat16
        )
        / "Lance_3B"
    )


class Paths:
    """The ways to the same picture, in one process with ComfyUI."""

    def __init__(self, comfy: Any, checkpoint: Path, width: int, height: int, steps: int) -> None:
        import small
        from graphs import node

        self.comfy, self.steps = comfy, steps
        self.grid = (1, height // 16, width // 16)
        self.graph = {
            "loader": node("LanceLoader", checkpoint=checkpoint.name, weight_dtype="default"),
            "text": small.text("a red fox in the snow"),
            "latent": node(
                "EmptyLanceLatent",
                size="custom",
                aspect="1:1",
                width=width,
                height=height,
                frames=1,
                batch_size=1,
            ),
        }
        model = comfy.value(self.graph, "loader")
        self.dtype = model.model.compute_dtype
        self.device = model.load_device
        core = small.module(comfy, "lance_core.pipeline")
        self.modules = {
            name: small.module(comfy, f"lance_core.{name}")
            for name in ("prompts", "request", "sampler", "bench_tools")
        }
        self.lance = core.load(checkpoint, self.device, self.dtype)
        self.samplers = {"Lance Sampler": small.lance, "KSampler": small.ksampler}
        self.seed = 0
        self.stamps: list[tuple[float, float]] = []
        keep = comfy.server.send_sync
        comfy.server.send_sync = lambda event, data, sid=None: (
            event == "progress" and self.stamp(),
            keep(event, data, sid),
        )[1]

    def stamp(self) -> None:
        """The time now, by the clock and by what this process has computed, the device's work included."""
        self.modules["bench_tools"].synchronize(self.device)
        self.stamps.append((time.perf_counter(), time.process_time()))

    def run(self, path: str) -> tuple[float, list[tuple[float, float]]]:
        """(seconds of a whole run; of each step after the first, seconds and processor seconds)."""
        self.seed += 1
        self.stamps.clear()
        self.modules["bench_tools"].synchronize(self.device)
        began = time.perf_counter()
        if path == OURS:
            self._core()
        else:
            sampler = self.samplers[path]
            self.comfy.run(sampler(self.graph, seed=self.seed, steps=self.steps, cfg=CFG), [("sampler", 0)])
        self.modules["bench_tools"].synchronize(self.device)
        whole = time.perf_counter() - began
        if len(self.stamps) != self.steps:
            raise RuntimeError(f"{path} reported {len(self.stamps)} steps instead of {self.steps}")
        return whole, [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self.stamps)]

    def _core(self) -> None:
        import torch

        prompts, sampler, lance = self.modules["prompts"], self.modules["sampler"], self.lance
        guidance = sampler.Guidance(CFG, (0.0, 1.0))
        with torch.inference_mode():
            system = self.modules["request"].TASKS["t2i"].default_system_prompt
            sequence = prompts.generation(
                lance.checkpoint.tokenizer, system, [], "a red fox in the snow", self.grid
            )
            prepared = lance._prefill(sequence, True, None)
            x = sampler.seeded_noise(self.seed, self.grid)[None].to(self.device)
            self.modules["denoise"].denoise(
                lance.components.experts(),
                prepared,
                x,
                sampler.schedule(self.steps),
                guidance,
                callback=lambda *_: self.stamp(),
            ).cpu()


# -- measuring -----------------------------------------------------------------------------------------------


def measure(paths: Paths, rounds: int) -> dict[str, Any]:
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
    found: dict[str, Any] = {}
    for path in PATHS:
        clock, processor = (median(times) for times in zip(*steps[path], strict=True))
        found[path] = {"step": clock, "processor": processor, "run": median(runs[path])}
        found[path]["run_beside_steps"] = found[path]["run"] - paths.steps * clock
    core = dict(found[OURS])
    for path in PATHS:
        found[path] |= {
            f"{key}_overhead": found[path][key] / core[key] - 1 for key in ("step", "processor", "run")
        }
    return found


def profiled_operations(paths: Paths, path: str) -> dict[str, tuple[float, float]]:
    """torch operation -> (calls, seconds of its own) a step, in one run."""
    from torch.profiler import ProfilerActivity, profile

    cuda = paths.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        paths.run(path)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    return {e.key: (e.count / paths.steps, getattr(e, own) / 1e6 / paths.steps) for e in seen.key_averages()}


def profiled_python(paths: Paths, path: str) -> dict[str, tuple[float, float]]:
    """Python file -> (calls, seconds of its own) a step, in one run; what is built in counts for the file
    that calls it.
    """
    profiler = cProfile.Profile()
    profiler.runcall(paths.run, path)
    calls, seconds = Counter(), Counter()
    for (file, _, _), (_, count, own, _, callers) in pstats.Stats(profiler).stats.items():
        if file.startswith(("~", "<")):
            for (caller, _, _), (_, times, inside, _) in callers.items():
                calls[_short(caller)] += times
                seconds[_short(caller)] += inside
        else:
            calls[_short(file)] += count
            seconds[_short(file)] += own
    return {file: (calls[file] / paths.steps, seconds[file] / paths.steps) for file in calls}


def _short(file: str) -> str:
    parts = Path(file).parts
    return "/".join(parts[-2:]) if len(parts) > 1 else file


def difference(
    found: dict[str, tuple[float, float]], core: dict[str, tuple[float, float]], top: int
) -> list[dict[str, Any]]:
    """What differs most in time from the core's, more or less."""
    rows = []
    for name in {*found, *core}:
        a, b = found.get(name, (0.0, 0.0)), core.get(name, (0.0, 0.0))
        rows.append({"name": name, "calls": a[0], "core_calls": b[0], "seconds": a[1], "core_seconds": b[1]})
    return sorted(rows, key=lambda r: -abs(r["seconds"] - r["core_seconds"]))[:top]


def inside(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, in ComfyUI's Python."""
    import torch
    from inprocess import InProcessComfy

    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        checkpoint = (
            args.model.absolute() if args.model else write_checkpoint(base / "made", args.layers, args.tiny)
        )
        laid = comfyui_script.lay_out(base / "comfyui", models={"lance": checkpoint.parent})
        given = [
            *comfyui_script.arguments(laid, cpu=not args.gpu),
            *(f"--{argument}" for argument in args.comfy),
        ]
        comfy = InProcessComfy(Path(os.environ[INSIDE]), given)
        from comfy.ldm.modules.attention import optimized_attention

        paths = Paths(comfy, checkpoint, width, height, args.steps)
        found = measure(paths, args.rounds)
        profiles = {}
        for what, look in (("operations", profiled_operations), ("python", profiled_python)):
            seen = {path: look(paths, path) for path in PATHS}
            profiles[what] = {
                path: difference(seen[path], seen[OURS], args.top) for path in PATHS if path != OURS
            }
        return {
            "device": str(paths.device),
            "dtype": str(paths.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "attention": optimized_attention.__name__.removeprefix("attention_"),
            "model": str(args.model)
            if args.model
            else f"random weights, {'tiny' if args.tiny else 'released'} widths, {args.layers} layers",
            "size": args.size,
            "steps": args.steps,
            "rounds": args.rounds,
            "paths": found,
            "profiles": profiles,
        }


# -- telling -------------------------------------------------------------------------------------------------


def report(told: dict[str, Any]) -> str:
    """For people."""
    lines = [
        "{model}; {size}, {dtype} on {device} ({threads} threads), torch {torch}; {rounds} runs of {steps} "
        "guided steps".format(**told)
    ]
    cpu = told["device"] == "cpu"
    head = f"{'':14} {'a step':>10} {'over core':>10}" + f" {'processor':>10} {'over core':>10}" * cpu
    lines += ["", head + f" {'run':>10} {'besides steps':>14}"]
    for path, p in told["paths"].items():
        line = f"{path:14} {p['step'] * 1e3:7.1f} ms {p['step_overhead']:+10.1%}"
        line += f" {p['processor'] * 1e3:7.1f} ms {p['processor_overhead']:+10.1%}" if cpu else ""
        lines.append(line + f" {p['run'] * 1e3:7.0f} ms {p['run_beside_steps'] * 1e3:11.0f} ms")
    # On a CPU other programs are in the clock's time; with one thread, what this process computed is free of
    # them.
    key = "processor_overhead" if cpu and told["threads"] == 1 else "step_overhead"
    worst = max(p[key] for path, p in told["paths"].items() if path != OURS)
    lines.append(
        f"\nA step's overhead is {worst:+.1%}; the goal is at most {GOAL:.0%}: "
        f"{'met' if worst <= GOAL else 'MISSED'}."
    )
    for what, seen in told["profiles"].items():
        for path, rows in seen.items():
            lines += [
                "",
                f"{path} against {OURS}, a step: {what}",
                f"{'calls':>10} {'core':>10} {'ms':>10} {'core':>10}",
            ]
            lines += [
                f"{r['calls']:10.1f} {r['core_calls']:10.1f} {r['seconds'] * 1e3:10.2f} "
                f"{r['core_seconds'] * 1e3:10.2f}  {r['name']}"
                for r in rows
            ]
    return "\n".join(lines)


def main() -> int:
    """Measure and print; the first process only looks for the host and runs this in its Python."""
    args = arguments()
    if INSIDE not in os.environ:
        try:
            found = comfyui_script.prepare()
        except comfyui_script.HostUnavailableError as error:
            print(f"no ComfyUI to measure in: {error}", file=sys.stderr)
            return comfyui_script.EXIT_UNAVAILABLE
        return subprocess.call(
            [str(found.python), __file__, *sys.argv[1:]], env=os.environ | {INSIDE: str(found.path)}
        )
    told = inside(args)
    print(report(told))
    if args.json:
        args.json.write_text(json.dumps(told, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
