"""The nine tasks: one command each, for pictures, videos and answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RELEASED_SAMPLING, RENORMS
from ..errors import RequestError
from ..inputs.sizes import PRESETS
from ..inputs.tasks import SIZES, TASKS, Task
from .common import Bars, check_target, device_of, dtype_of, model_options, output_options

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipeline import Generated, Lance

MEDIA_HELP = {"image": "picture", "video": "clip", "references": "one or more pictures of the subjects"}
TASK_HELP = {
    "t2i": "text to image",
    "t2v": "text to video",
    "i2v": "image to video: the picture is the first frame",
    "image_edit": "change a picture; --then edits the result again",
    "video_edit": "change a clip",
    "subject_image": "a new picture of the subjects in the reference pictures",
    "subject_video": "a new video of the subjects in the reference pictures",
    "x2t_image": "answer a question about a picture",
    "x2t_video": "answer a question about a clip",
}
SPLITS = ("guidance", "sequence", "both")
OPTIONS = ["width", "height", "steps", "shift", "cfg", "cfg_interval", "renorm", "renorm_min", "seed"]
OPTIONS += ["negative_prompt", "system_prompt", "resolution"]


def add_commands(commands: Any) -> None:
    """A subcommand a task."""
    for task in TASKS.values():
        text = TASK_HELP[task.name]
        sub = commands.add_parser(task.name, help=text, description=f"{text.capitalize()}.")
        model_options(sub)
        output_options(sub)
        sub.add_argument("prompt", help="the question" if task.output == "text" else "what to make or change")
        if task.takes:
            several = "+" if task.takes == "references" else None
            sub.add_argument(task.takes, nargs=several, help=MEDIA_HELP[task.takes])
        sub.add_argument("--system-prompt", help="instead of the instruction the weights were trained with")
        sub.add_argument("--resolution", choices=PRESETS, help=f"default: {task.default_resolution}")
        (_add_text_options if task.output == "text" else _add_generation_options)(sub, task)
        sub.set_defaults(run=run)


def _add_generation_options(sub: argparse.ArgumentParser, task: Task) -> None:
    video, default = task.output == "video", RELEASED_SAMPLING
    shown = "default: %(default)s"
    sub.add_argument("-o", "--output", metavar="FILE", help=f"default: {default_output(task)}")
    if not task.sized_by_input:
        sizes = ", ".join(f"{w}x{h}" for w, h in SIZES["video_480p" if video else "image_768res"].values())
        sub.add_argument(
            "--width", type=int, help=f"pixels, lowered to a multiple of 16; good sizes: {sizes}"
        )
        sub.add_argument("--height", type=int)
    if video and task.takes != "video":
        text = "lowered to 4k+1, at most 121, 12 a second; default: 49"
        sub.add_argument("--frames", "--num-frames", type=int, help=text)
    sub.add_argument("--steps", type=int, default=default.steps, help=shown)
    sub.add_argument("--shift", type=float, default=default.shift, help=shown)
    sub.add_argument(
        "--cfg", type=float, default=default.cfg, help=f"guidance scale, 1 turns it off; {shown}"
    )
    low, high = default.cfg_interval
    sub.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        default=default.cfg_interval,
        metavar=("LOW", "HIGH"),
        help=f"guidance applies at times above LOW up to HIGH; default: {low} {high}",
    )
    sub.add_argument("--renorm", choices=RENORMS, default=default.renorm, help=shown)
    sub.add_argument("--renorm-min", type=float, default=default.renorm_min, help=shown)
    text = "what to stay away from; default: the trained unconditional sequence"
    sub.add_argument("--negative-prompt", help=text)
    sub.add_argument("--seed", type=int, default=default.seed, help=shown)
    text = "N results with seeds SEED, SEED+1, …; default: 1"
    sub.add_argument("--batch", type=int, default=1, metavar="N", help=text)
    text = "several processes, a GPU each, draw one result: guidance's passes apart, tokens divided, or both"
    sub.add_argument("--split", choices=SPLITS, help=text)
    sub.add_argument("--workers", metavar="N", help="how many for --split; default: all GPUs")
    if task.name == "image_edit":
        text = "another edit, of the last result; repeatable"
        sub.add_argument("--then", action="append", default=[], metavar="PROMPT", help=text)


def _add_text_options(sub: argparse.ArgumentParser, task: Task) -> None:
    shown = "default: %(default)s"
    sub.add_argument("--max-new-tokens", type=int, default=256, help=shown)
    text = f"0 takes the likeliest token; {shown}"
    sub.add_argument("--temperature", type=float, default=0.0, help=text)
    sub.add_argument("--top-p", type=float, default=1.0, help=shown)
    sub.add_argument("--seed", type=int, default=0, help=shown)


def run(args: argparse.Namespace, bars: Bars) -> dict[str, Any] | int | None:
    """One generation or understanding command; returns its machine-readable result, or of several processes
    the exit code.
    """
    task = TASKS[args.command]
    output = None if task.output == "text" else _checked_output(args, task)
    if output is None:
        return _understand(args, task, _load(args, task, device_of(args.device), bars), bars)
    if args.split is not None:
        return _split(args, task, output, bars)
    if args.workers is not None:
        raise RequestError(
            "--workers is for --split: one result by several processes. Lists of requests: `batch`"
        )
    return _generate(args, task, _load(args, task, device_of(args.device), bars), output, bars)


def _load(args: argparse.Namespace, task: Task, device: str, bars: Bars) -> Lance:
    from ..pipeline import load

    where = args.model or Path("models/lance") / ("Lance_3B_Video" if task.is_video else "Lance_3B")
    options = {key: getattr(args, key) for key in ("vit", "vae", "compile", "overlap")}
    return load(where, device, dtype_of(args.dtype), **options, progress=bars)


def _split(args: argparse.Namespace, task: Task, output: Path, bars: Bars) -> dict[str, Any] | int | None:
    """Start the processes of a split request; or, in one of them, do its part."""
    from ..scale import launch

    if not launch.is_rank():
        return launch.run(args.arguments, launch.count_for(args.split, args.workers))
    device = launch.device(args.device)
    first = launch.rank() == 0
    bars.enabled = bars.enabled and first
    with launch.member(device):
        from ..scale.split import joined

        lance = joined(_load(args, task, device, bars), args.split)
        result = _generate(args, task, lance, output if first else None, bars)
    return result if first else None


def default_output(task: Task) -> str:
    """Where a task writes when nothing is said."""
    return f"{task.name}{'.mp4' if task.output == 'video' else '.png'}"


def _checked_output(args: argparse.Namespace, task: Task) -> Path:
    """The file to write; it and all beside it are refused before any work if they could not be written."""
    from ..inputs import media

    output = Path(args.output or default_output(task))
    known = media.VIDEO_FORMATS if task.output == "video" else media.IMAGE_FORMATS
    if output.suffix.lower() not in known:
        raise RequestError(f"{output}: {task.name} writes {task.output}s, as one of {', '.join(known)}")
    turns = 1 + len(getattr(args, "then", []))
    if turns > 1 and args.batch > 1:
        raise RequestError(
            f"--then edits one result further and --batch {args.batch} makes several; use one of them"
        )
    for turn in range(1, turns + 1):
        for name in _names(_turn_path(output, turn, turns), min(max(args.batch, 1), 1000)):
            check_target(name)
    return output


def _turn_path(output: Path, turn: int, turns: int) -> Path:
    """Where the result of a turn goes, counted from 1: the last has the name asked for."""
    return output if turn == turns else output.with_stem(f"{output.stem}_{turn}")


def _names(path: Path, count: int) -> list[Path]:
    """Where the results of a batch go."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}_{i}") for i in range(count)]


def _understand(args: argparse.Namespace, task: Task, lance: Lance, bars: Bars) -> dict[str, Any]:
    live = not args.json and sys.stdout.isatty()

    def show(text: str) -> None:
        bars.close()
        print(text, end="", flush=True)

    names = ("system_prompt", "resolution", "max_new_tokens", "temperature", "top_p", "seed")
    options = {name: getattr(args, name) for name in names} | {
        str(task.takes): getattr(args, str(task.takes))
    }
    answer = lance.understand(args.prompt, **options, on_token=show if live else None)
    if live:
        print()
    elif not args.json:
        print(answer.text)
    return {"task": task.name, "text": answer.text, "token_ids": answer.token_ids}


def _generate(
    args: argparse.Namespace, task: Task, lance: Lance, output: Path | None, bars: Bars
) -> dict[str, Any]:
    """Draw all turns; without an output nothing is written."""
    options = {key: getattr(args, key) for key in OPTIONS if hasattr(args, key)}
    options |= {"batch_size": args.batch, "num_frames": getattr(args, "frames", None)}
    source: dict[str, Any] = {task.takes: getattr(args, task.takes)} if task.takes else {}
    turns = [args.prompt, *getattr(args, "then", [])]
    written = []
    for turn, prompt in enumerate(turns, 1):
        result = lance.generate(task.name, prompt, **source, **options)
        if output is not None:
            path = _turn_path(output, turn, len(turns))
            written += _save(result, path, {"turns": turns[:turn]} if len(turns) > 1 else {}, args, bars)
        source = {str(task.takes): result.frames[0]}
    return {"task": task.name, "files": written}


def _save(
    result: Generated, path: Path, extra: dict[str, Any], args: argparse.Namespace, bars: Bars
) -> list[dict[str, Any]]:
    """Write every result of a batch, the request and its own seed inside; returns what was written."""
    from ..inputs import media

    frames = result.frames if result.frames.dim() == 5 else result.frames[None]
    written = []
    for i, (clip, one) in enumerate(zip(frames, _names(path, len(frames)), strict=True)):
        asked = {k: v for k, v in (result.request | extra).items() if v is not None}
        asked |= {"seed": result.request["seed"] + i}
        if path.suffix.lower() in media.IMAGE_FORMATS:
            media.save_image(one, clip[0], asked)
        else:
            media.save_video(one, _watched(clip, bars), result.fps, asked)
        written.append({"file": str(one), **asked})
        if not args.json:
            length = f", {asked['num_frames']} frames" if asked["num_frames"] > 1 else ""
            print(f"{one}  ({asked['width']}x{asked['height']}{length}, seed {asked['seed']})", flush=True)
    return written


def _watched(frames: Tensor, bars: Bars) -> Iterator[Tensor]:
    """The frames one by one, with a bar while they are written."""
    for i, frame in enumerate(frames, 1):
        yield frame
        bars("saving", i, len(frames))
