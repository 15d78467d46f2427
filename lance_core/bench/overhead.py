"""What ComfyUI adds to a denoising step: the pack's nodes in ComfyUI against lance_core alone.

ComfyUI runs in a process of its own, by its own Python, without its server listening (in_comfyui.py). There,
Lance Sampler, KSampler and lance_core's own denoising take turns on the same device, with the same weights,
dtype, schedule and guidance in every step; the medians count. Then one run of each is profiled: which
operations and which Python files take the difference.

Without `--model` the weights are random at the released widths, cut to few layers: a step then costs less,
and a fixed overhead shows more than it would with all of them. On a CPU, ComfyUI has an attention of its own
unless told otherwise (`--comfy use-pytorch-cross-attention`); on a GPU it takes torch's, as lance_core does.
On a CPU that others use too, set OMP_NUM_THREADS=1 and read the processor's time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import checks
from ..checkpoint import tiny
from ..checkpoint.checkpoint import Progress
from ..config import RELEASED_LLM
from ..errors import RequestError
from .case import RELEASED, case_of
from .device import child
from .report import Block, Table

GOAL = 0.03  # overhead of a step
OURS = "lance_core"
PATHS = ("Lance Sampler", "KSampler", OURS)
PACK = Path(__file__).resolve().parents[2]
HELP = "`python scripts/comfyui.py prepare` makes one and prints its folder and its Python"


def run(args: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    """Measure in the ComfyUI that `args.comfyui` or COMFYUI_PATH names.

    Raises:
        RequestError: an option out of range, no ComfyUI, or it failed.
    """
    case = case_of(RELEASED, args.size)
    for what, least in (("steps", 2), ("rounds", 1), ("layers", 1), ("top", 0)):
        checks.whole(what, getattr(args, what), least, 10_000)
    comfyui = find_comfyui(args.comfyui)
    python = find_python(args.comfyui_python, comfyui)
    if not (PACK / "nodes").is_dir():
        raise RequestError(f"{PACK} has lance_core and no nodes; run this from the folder of the node pack")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        made = base / "made"
        checkpoint = (
            Path(args.model).absolute() if args.model else write_checkpoint(made, args.layers, args.tiny)
        )
        request = {
            "comfyui": str(comfyui),
            "arguments": [*lay_out(base / "comfyui", checkpoint.parent, args.gpu), *_dashed(args.comfy)],
            "checkpoint": str(checkpoint),
            "size": [case.width, case.height],
            **{name: getattr(args, name) for name in ("steps", "rounds", "top")},
        }
        (base / "request.json").write_text(json.dumps(request), encoding="utf-8")
        if progress is not None:
            progress("measuring in ComfyUI", 0, 1)
        inside = f"{__package__}.in_comfyui"
        found = child(inside, str(base / "request.json"), python=str(python), cwd=comfyui, path=[comfyui])
    widths = "tiny" if args.tiny else "released"
    random = f"random weights, {widths} widths, {args.layers} layers"
    told = {"bench": "overhead", "model": args.model or random, "size": args.size}
    return told | {"steps": args.steps, "rounds": args.rounds} | found


def find_comfyui(named: str | None) -> Path:
    """The folder of ComfyUI.

    Raises:
        RequestError: none is named, or that is none.
    """
    named = named or os.environ.get("COMFYUI_PATH")
    if not named:
        raise RequestError(
            f"this measures inside ComfyUI: name its folder with --comfyui or COMFYUI_PATH; {HELP}"
        )
    path = Path(named).expanduser().absolute()
    if not all((path / name).exists() for name in ("main.py", "nodes.py", "comfy")):
        raise RequestError(
            f"{named} is not ComfyUI's folder: it has no main.py, nodes.py and comfy together; {HELP}"
        )
    return path


def find_python(named: str | None, comfyui: Path) -> Path:
    """The Python that runs ComfyUI: the one named, the one in its venv, or this one.

    Raises:
        RequestError: what is named is no program.
    """
    named = named or os.environ.get("COMFYUI_PYTHON")
    if named:
        found = shutil.which(named)
        if not found:
            raise RequestError(f"--comfyui-python {named} is not a program; {HELP}")
        return Path(found)
    program = Path("Scripts/python.exe") if os.name == "nt" else Path("bin/python")
    own = (comfyui / name / program for name in ("venv", ".venv"))
    return next((python for python in own if python.exists()), Path(sys.executable))


def write_checkpoint(folder: Path, layers: int, small: bool) -> Path:
    """Random weights at the released widths (or tiny ones), `layers` deep, few rows of vocabulary, a tiny ViT
    and VAE.
    """
    llm = replace(tiny.LLM if small else replace(RELEASED_LLM, vocab_size=8192), num_layers=layers)
    vit = replace(tiny.VIT, out_hidden_size=llm.hidden_size)
    return tiny.write(folder, llm=llm, vit=vit, dtype=torch.bfloat16) / "Lance_3B"


def lay_out(base: Path, models: Path, gpu: bool) -> list[str]:
    """Folders of its own for ComfyUI, the pack and the models linked into them. Returns its arguments."""
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / "ComfyUI-Lance").symlink_to(PACK, target_is_directory=True)
    (base / "models" / "lance").symlink_to(models, target_is_directory=True)
    database = f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}"
    folders = ["--base-directory", str(base), "--database-url", database]
    return [*folders, *_dashed(["disable-auto-launch", "disable-api-nodes", *([] if gpu else ["cpu"])])]


def _dashed(names: list[str]) -> list[str]:
    return [f"--{name}" for name in names]


def difference(
    found: dict[str, tuple[float, float]], core: dict[str, tuple[float, float]], top: int
) -> list[dict[str, Any]]:
    """What differs most in time from the core's, more or less; both: name -> (calls, seconds)."""
    rows: list[dict[str, Any]] = []
    for name in {*found, *core}:
        a, b = found.get(name, (0.0, 0.0)), core.get(name, (0.0, 0.0))
        rows.append({"name": name, "calls": a[0], "core_calls": b[0], "seconds": a[1], "core_seconds": b[1]})
    return sorted(rows, key=lambda r: -abs(r["seconds"] - r["core_seconds"]))[:top]


# -- telling -------------------------------------------------------------------------------------------------


def document(result: dict[str, Any]) -> list[Block]:
    """A row a path, the verdict, and what takes the difference."""
    cpu = result["device"] == "cpu"
    rows = []
    for path, p in result["paths"].items():
        processor = [_ms(p["processor"], 1), f"{p['processor_overhead']:+.1%}"] if cpu else ["", ""]
        cells = [path, _ms(p["step"], 1), f"{p['step_overhead']:+.1%}", *processor]
        rows.append([*cells, _ms(p["run"]), _ms(p["run_beside_steps"])])
    # On a CPU other programs are in the clock's time; with one thread, what this process computed is free of
    # them.
    key = "processor_overhead" if cpu and result["threads"] == 1 else "step_overhead"
    worst = max(p[key] for path, p in result["paths"].items() if path != OURS)
    blocks: list[Block] = [
        "{model}; {size}, {dtype} on {device} ({threads} threads), torch {torch}; {rounds} runs of {steps} "
        "guided steps".format(**result),
        Table(("", "a step", "over core", "processor", "over core", "run", "besides steps"), rows),
        f"A step's overhead is {worst:+.1%}; the goal is at most {GOAL:.0%}: "
        f"{'met' if worst <= GOAL else 'MISSED'}.",
    ]
    head = ("", "calls", "core", "ms", "core")
    for what, seen in result["profiles"].items():
        for path, lines in seen.items():
            cells = [
                [r["name"], f"{r['calls']:.1f}", f"{r['core_calls']:.1f}"]
                + [f"{r[key] * 1e3:.2f}" for key in ("seconds", "core_seconds")]
                for r in lines
            ]
            blocks += [f"{path} against {OURS}, a step: {what}", Table(head, cells)]
    return blocks


def _ms(seconds: float, digits: int = 0) -> str:
    return f"{seconds * 1e3:.{digits}f} ms"
