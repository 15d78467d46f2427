"""The nine tasks: one command each, for pictures, videos and answers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks
from ..config import MAX_FRAMES
from ..errors import RequestError
from ..inputs.sizes import PRESETS
from ..inputs.tasks import TASKS, Task
from . import options
from .common import Bars, check_target, device_of, dtype_of, model_options, output_options
from .saving import default_output, names, save, save_one, turn_path

if TYPE_CHECKING:
    from ..pipeline import Generated, Lance

MAX_BEST = 64
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
        if task.output == "text":
            text = "another picture or clip, after the first; repeatable"
            sub.add_argument("--also", action="append", default=[], metavar="FILE", help=text)
            options.add_text_options(sub)
            options.add_clip_options(sub)
        else:
            options.add_generation_options(sub, task)
        sub.set_defaults(run=run)


def run(args: argparse.Namespace, bars: Bars) -> dict[str, Any] | int | None:
    """One generation or understanding command; returns its machine-readable result, or of several processes
    the exit code.
    """
    task = TASKS[args.command]
    if task.output == "text":
        return _understand(args, task, opened(args, task.is_video, bars), bars)
    output = checked_output(args, task)
    if args.split is not None:
        return _split(args, task, output, bars)
    if args.workers is not None:
        raise RequestError(
            "--workers is for --split: one result by several processes. Lists of requests: `batch`"
        )
    return generate(args, task, opened(args, task.is_video, bars), output, bars)


def _split(args: argparse.Namespace, task: Task, output: Path, bars: Bars) -> dict[str, Any] | int | None:
    """Start the processes of a split request; or, in one of them, do its part."""
    from ..scale import launch

    for name in ("best_of", "enhance"):
        if getattr(args, name):
            raise RequestError(
                f"--split draws one result by several processes; leave out --{name.replace('_', '-')}"
            )
    if task.output == "video" and getattr(args, "then", []):
        raise RequestError("--split draws one video by several processes; leave out --then")
    if not launch.is_rank():
        return launch.run(args.arguments, launch.count_for(args.split, args.workers))
    device = launch.device(args.device)
    first = launch.rank() == 0
    bars.enabled = bars.enabled and first
    with launch.member(device):
        from ..scale.split import joined

        lance = joined(opened(args, task.is_video, bars, device), args.split)
        result = generate(args, task, lance, output if first else None, bars)
    return result if first else None


def opened(args: argparse.Namespace, video: bool, bars: Bars, device: str | None = None) -> Lance:
    """The checkpoint the options name, or the default one; on their device, or on another."""
    from ..pipeline import load

    where = args.model or Path("models/lance") / ("Lance_3B_Video" if video else "Lance_3B")
    chosen = {key: getattr(args, key) for key in ("vit", "vae", "compile", "overlap")}
    place = device_of(args.device) if device is None else device
    return load(where, place, dtype_of(args.dtype), **chosen, progress=bars)


def checked_output(args: argparse.Namespace, task: Task) -> Path:
    """The file to write; it and all beside it are refused before any work if they could not be written."""
    from ..inputs import media

    output = Path(args.output or default_output(task))
    known = media.VIDEO_FORMATS if task.output == "video" else media.IMAGE_FORMATS
    if output.suffix.lower() not in known:
        raise RequestError(f"{output}: {task.name} writes {task.output}s, as one of {', '.join(known)}")
    turns = 1 + len(getattr(args, "then", []))
    if turns > 1 and args.batch > 1:
        raise RequestError(
            f"--then goes on from one result and --batch {args.batch} makes several; use one of them"
        )
    _check_best(args, turns)
    count = args.batch if args.best_of is None else args.keep or 1
    turns = turns if task.output == "image" else 1  # of a video all turns are in one file
    for turn in range(1, turns + 1):
        for name in names(turn_path(output, turn, turns), min(max(count, 1), 1000)):
            check_target(name)
    return output


def _check_best(args: argparse.Namespace, turns: int) -> None:
    """Refuse what does not go with --best-of, before anything is loaded."""
    if args.best_of is None:
        if args.keep is not None:
            raise RequestError(f"--keep {args.keep} says how many of --best-of are written; give both")
        return
    checks.whole("--best-of", args.best_of, 1, MAX_BEST)
    keep = 1 if args.keep is None else args.keep
    checks.whole("--keep", keep, 1, args.best_of, f"a whole number from 1 to --best-of, {args.best_of}")
    if args.batch != 1:
        raise RequestError(f"--best-of draws {args.best_of} itself; leave out --batch {args.batch}")
    if turns > 1 and keep > 1:
        raise RequestError(
            f"--then goes on from one result and --keep {keep} writes several; use one of them"
        )


def _understand(args: argparse.Namespace, task: Task, lance: Lance, bars: Bars) -> dict[str, Any]:
    live = not args.json and sys.stdout.isatty()

    def show(text: str) -> None:
        bars.close()
        print(text, end="", flush=True)

    chosen = {name: getattr(args, name) for name in (*options.ANSWERING, *options.CLIP, "frames")}
    first = getattr(args, str(task.takes))
    given = {"images": [first, *args.also]} if args.also else {str(task.takes): first}
    answer = lance.understand(args.prompt, **given, **chosen, on_token=show if live else None)
    if live:
        print()
    elif not args.json:
        print(answer.text)
    return {"task": task.name, "text": answer.text, "token_ids": answer.token_ids}


def generate(
    args: argparse.Namespace, task: Task, lance: Lance, output: Path | None, bars: Bars
) -> dict[str, Any]:
    """Draw, and draw on, as a task's options say; returns what was written: nothing without an output."""
    chosen = {key: getattr(args, key) for key in options.SAMPLING if hasattr(args, key)}
    chosen |= _video_options(args)
    source: dict[str, Any] = {task.takes: getattr(args, task.takes)} if task.takes else {}
    turns = [args.prompt, *getattr(args, "then", [])]
    written: list[dict[str, Any]] = []
    goes_on = task.output == "video" and len(turns) > 1
    for turn, wish in enumerate(turns if not goes_on else turns[:1], 1):
        prompt, extra = enhanced(args, task.name, wish, next(iter(source.values()), None), lance)
        extra |= {"turns": turns if goes_on else turns[:turn]} if len(turns) > 1 else {}
        if args.best_of is None:
            results = [lance.generate(task.name, prompt, **source, **chosen, batch_size=args.batch)]
        else:
            keep = args.keep or 1
            results = lance.best_of(args.best_of, task.name, prompt, keep=keep, **source, **chosen)
        if goes_on and output is not None:
            written.append(continued(args, lance, results[0], turns[1:], chosen, output, extra, bars))
            break
        if output is not None:
            paths = names(turn_path(output, turn, len(turns)), len(results))
            for result, path in zip(results, paths, strict=True):
                written += save(result, path, extra, args, bars)
        source = {str(task.takes): results[0].frames[0]}
    return {"task": task.name, "files": written}


def enhanced(
    args: argparse.Namespace, task: str, wish: str, shown: Any, lance: Lance
) -> tuple[str, dict[str, Any]]:
    """The prompt to draw, and what is stored of the wish it was made from."""
    if not args.enhance:
        return wish, {}
    prompt = lance.enhance(wish, task, shown, by=args.enhance_by, seed=max(args.seed, 0))
    return prompt, {"enhanced_from": wish} if prompt != wish else {}


def _video_options(args: argparse.Namespace) -> dict[str, Any]:
    """Frames, windows and keyframes, where a task has them."""
    if not hasattr(args, "frames"):
        return {}
    out: dict[str, Any] = {"num_frames": args.frames}
    if args.frames is not None and args.frames > MAX_FRAMES:
        from ..model.windows import Windows

        out["windows"] = Windows(args.window, args.window_overlap, args.blend)
    kept: dict[int, str] = {}
    for frame, file in getattr(args, "keyframe", []):
        try:
            kept[int(frame)] = file
        except ValueError:
            raise RequestError(f"--keyframe {frame}: expected a frame number, then a picture") from None
    if kept:
        out["keyframes"] = kept
    return out


def continued(
    args: argparse.Namespace,
    lance: Lance,
    first: Generated,
    prompts: list[str],
    chosen: dict[str, Any],
    output: Path,
    extra: dict[str, Any],
    bars: Bars,
) -> dict[str, Any]:
    """Write a video and what happens next, part after part, as one file."""
    height, width = first.frames.shape[1:3]
    wishes = [enhanced(args, "i2v", wish, first.frames[-1], lance)[0] for wish in prompts]
    new = max((first.frames.shape[0] if args.frames is None else args.frames) - 1, 4) // 4 * 4
    kept = {k: v for k, v in chosen.items() if k not in ("num_frames", "windows", "keyframes")}
    kept |= {"width": width, "height": height, "seed": first.request["seed"] + 1}
    frames = lance.extend((first.frames, first.fps), wishes, num_frames=new, **kept)
    asked = {k: v for k, v in (first.request | extra).items() if v is not None}
    asked["num_frames"] = count = len(first.frames) + new * len(wishes)
    return save_one(output, frames, count, first.fps, asked, args, bars)
