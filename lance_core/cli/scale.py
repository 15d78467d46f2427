"""Commands for more than one request, device or user: what they do is lance_core.scale's."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..config import RENORMS
from ..errors import RequestError
from ..inputs.sizes import PRESETS
from ..inputs.tasks import TASKS
from .common import DTYPES, Bars, model_options, output_options

LAYOUTS = ("geneval", "dpg", "gedit", "vbench")
UNSET = argparse.SUPPRESS


def add_commands(commands: Any) -> None:
    """`batch` and `serve`."""
    _add_serve(commands)
    text = "work through a JSON or JSONL file of requests; run it again to go on after anything"
    sub = commands.add_parser("batch", help=text, description=f"{text.capitalize()}.")
    model_options(sub)
    output_options(sub)
    sub.add_argument(
        "file", metavar="FILE", help="rows as the released code has them, or an object a request"
    )
    sub.add_argument("-o", "--output", metavar="DIR", required=True, help="results, and results.jsonl")
    sub.add_argument("--task", choices=TASKS, help="of rows without one")
    sub.add_argument("--layout", choices=LAYOUTS, help="a benchmark's prompt file in, its sample folders out")
    text = "processes with a model each, or `all`: one a GPU; default: this process alone"
    sub.add_argument("--workers", metavar="N", help=text)
    text = "`ray` places the workers on a Ray cluster, or a local one"
    sub.add_argument("--engine", choices=("processes", "ray"), default="processes", help=text)
    sub.add_argument("--address", help="of the Ray cluster; default: a local one")
    text = "ComfyUI servers, with commas between, draw the rows by their API"
    sub.add_argument("--comfyui", metavar="URL[,URL]", help=text)
    text = "what they are given, in API form; default: the pack's own for the task"
    sub.add_argument("--workflow", metavar="FILE", help=text)
    sub.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    sub.add_argument("--shard", metavar="I/N", help="every N-th row from the I-th, such as 1/4")
    sub.add_argument("--retry-errors", action="store_true", help="try rows again that failed before")
    sub.add_argument("--dry-run", action="store_true", help="check every row and its media, draw nothing")
    _add_task_options(sub.add_argument_group("options of the task, for rows that do not have their own"))
    sub.set_defaults(run=batch)


def _add_serve(commands: Any) -> None:
    text = "OpenAI's endpoints for pictures, videos and questions, by Ray Serve"
    sub = commands.add_parser("serve", help=text, description=f"{text.capitalize()}.")
    sub.add_argument("--config", metavar="FILE", help="JSON; see docs/scale.md. What is given here wins")
    sub.add_argument("-m", "--model", "--checkpoint", metavar="DIR", help="checkpoint folder")
    sub.add_argument("--port", type=int, help="default: 8000")
    sub.add_argument("--host", help="default: 127.0.0.1, this machine alone")
    sub.add_argument("--device", help="torch device; default: cuda where there is one, else cpu")
    sub.add_argument("--dtype", choices=[*DTYPES, *DTYPES.values()], help="default: bf16")
    sub.add_argument("--workers", type=int, metavar="N", help="replicas of the model, one a GPU; default: 1")
    sub.add_argument("--address", help="of a Ray cluster; default: a local one")
    sub.set_defaults(run=serve)


def serve(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Serve until interrupted."""
    from ..scale import serve as server
    from ..scale.serve_config import read_config

    dtype = DTYPES.get(args.dtype, args.dtype) if args.dtype else None
    options = {"checkpoint": args.model, "replicas": args.workers, "dtype": dtype}
    options |= {name: getattr(args, name) for name in ("port", "host", "device", "address")}
    config = read_config(args.config, **options)
    server.run(config, lambda url: print(f"serving {config.model} at {url}/v1", flush=True))
    return {}


def _add_task_options(group: Any) -> None:
    """Those of the nine tasks, unset unless given."""
    for name, kind in (("width", int), ("height", int), ("steps", int), ("shift", float), ("cfg", float)):
        group.add_argument(f"--{name}", type=kind, default=UNSET)
    group.add_argument("--frames", "--num-frames", dest="num_frames", type=int, default=UNSET)
    group.add_argument("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), default=UNSET)
    group.add_argument("--renorm", choices=RENORMS, default=UNSET)
    group.add_argument("--renorm-min", type=float, default=UNSET)
    group.add_argument("--negative-prompt", default=UNSET)
    group.add_argument("--system-prompt", default=UNSET)
    group.add_argument("--resolution", choices=PRESETS, default=UNSET)
    group.add_argument("--seed", type=int, default=UNSET)
    group.add_argument(
        "--batch", dest="batch_size", type=int, metavar="N", default=UNSET, help="results a row"
    )
    group.add_argument("--max-new-tokens", type=int, default=UNSET)
    group.add_argument("--temperature", type=float, default=UNSET)
    group.add_argument("--top-p", type=float, default=UNSET)


TASK_OPTIONS = (
    *("width", "height", "steps", "shift", "cfg", "num_frames", "cfg_interval", "renorm", "renorm_min"),
    *("negative_prompt", "system_prompt", "resolution", "seed", "batch_size"),
    *("max_new_tokens", "temperature", "top_p"),
)
PASSED = (
    *(
        "task",
        "layout",
        "workers",
        "engine",
        "address",
        "comfyui",
        "workflow",
        "limit",
        "shard",
        "retry_errors",
        "dry_run",
    ),
    *("device", "vit", "vae", "compile", "overlap"),
)


def batch(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Work through a file."""
    from ..scale import batch as scale

    def show(line: dict[str, Any]) -> None:
        if line["error"] is not None:
            bars.note(f"{line['id']}: {line['error']}")

    options = {name: getattr(args, name) for name in PASSED}
    options |= {name: getattr(args, name) for name in TASK_OPTIONS if hasattr(args, name)}
    result = scale.run(
        args.file,
        args.output,
        checkpoint=args.model,
        dtype=DTYPES.get(args.dtype, args.dtype),
        progress=bars,
        on_line=show,
        **options,
    )
    bars.close()
    if args.dry_run:
        return _dry(result, args)
    if not args.json:
        counts = f"{result['made']} made, {result['done']} were there, {result['failed']} failed"
        print(f"{counts}: {result['results']}")
    if result["skipped"]:
        text = f"{result['skipped']} rows failed in an earlier run; --retry-errors tries them again"
        print(text, file=sys.stderr)
    return result


def _dry(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    for name, error in result["errors"].items():
        print(f"{name}: {error}", file=sys.stderr)
    if result["failed"]:
        raise RequestError(f"{result['failed']} of {result['rows']} rows are wrong; nothing was drawn")
    if not args.json:
        print(f"{result['rows']} rows are right; nothing was drawn")
    return result
