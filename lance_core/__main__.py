"""The command line, `python -m lance_core`: one subcommand a task, and info, tiny, bench.

Exit codes: 0 done, 2 the request or a file is wrong, 130 cancelled.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .bench import run as bench_run
from .checkpoint import convert, describe, tiny
from .errors import LanceError, RequestError
from .hub import download
from .inputs import media
from .inputs.preprocess import PRESETS
from .inputs.tasks import SIZES, TASKS, Task
from .model.sampler import RENORMS
from .pipeline import Generated, Lance, load
from .text_generation import NewText

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
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


class Bars:
    """Progress bars on stderr, one a stage, shown once the stage has lasted a second."""

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.stage, self.bar = enabled, None, None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self.enabled:
            return
        if self.bar is None or stage != self.stage or done < self.bar.n:
            self.close()
            self.stage, self.bar = stage, tqdm(total=total, desc=stage, delay=1, leave=False, file=sys.stderr)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="python -m lance_core", description="Lance: understand, generate and edit images and video."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-m",
        "--model",
        "--checkpoint",
        metavar="DIR",
        help="checkpoint folder; default: models/lance/Lance_3B, or Lance_3B_Video for video",
    )
    common.add_argument(
        "--vit", metavar="FILE", help="vision tower, if it is not inside or beside the checkpoint"
    )
    common.add_argument("--vae", metavar="FILE", help="VAE, if it is not beside the checkpoint")
    common.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    common.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    common.add_argument(
        "--compile", action="store_true", help="fuse small steps with torch.compile: takes minutes once"
    )
    common.add_argument(
        "--overlap",
        action="store_true",
        help="run the understanding expert's few tokens beside the rest; CUDA only",
    )
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
    for task in TASKS.values():
        sub = commands.add_parser(
            task.name,
            parents=[common],
            help=TASK_HELP[task.name],
            description=TASK_HELP[task.name].capitalize() + ".",
        )
        sub.add_argument("prompt", help="the question" if task.output == "text" else "what to make or change")
        if task.takes:
            sub.add_argument(
                task.takes, nargs="+" if task.takes == "references" else None, help=MEDIA_HELP[task.takes]
            )
        sub.add_argument("--system-prompt", help="instead of the instruction the weights were trained with")
        sub.add_argument("--resolution", choices=PRESETS, help=f"default: {task.default_resolution}")
        (_add_text_options if task.output == "text" else _add_generation_options)(sub, task)
    about = commands.add_parser(
        "info", parents=[common], help="what a checkpoint is, its sizes, what it needs"
    )
    about.add_argument("path", metavar="PATH")
    small = commands.add_parser("tiny", help="write a small random checkpoint in the released layout")
    small.add_argument("folder", metavar="DIR")
    small.add_argument("--seed", type=int, default=0)
    small.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    fetch = commands.add_parser(
        "download", help="fetch a released checkpoint; without a name, list what there is"
    )
    download.add_arguments(fetch)
    fetch.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    fetch.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
    shrink = commands.add_parser("convert", help="write a checkpoint as one file, smaller if wanted")
    shrink.add_argument("source", metavar="SRC", help="checkpoint folder or file")
    shrink.add_argument("target", metavar="DST", help="the .safetensors file to write")
    shrink.add_argument(
        "--dtype",
        choices=convert.DTYPES,
        default="bf16",
        help="what both experts are kept in; below 16 bits only their middle layers' matrices are, the rest "
        "is bf16; default: %(default)s",
    )
    shrink.add_argument(
        "--understanding",
        choices=convert.DTYPES,
        help="another one for the understanding expert; int4 and nvfp4 are for files that only answer "
        "questions",
    )
    shrink.add_argument(
        "--generation",
        choices=convert.DTYPES,
        help="another one for the generation expert; below 16 bits pictures are reported to lose detail",
    )
    shrink.add_argument(
        "--no-vae", action="store_true", help="leave the VAE out; it is then looked for beside the file"
    )
    shrink.add_argument(
        "--vit", metavar="FILE", help="vision tower, if it is not inside or beside the checkpoint"
    )
    shrink.add_argument("--vae", metavar="FILE", help="VAE, if it is not beside the checkpoint")
    shrink.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    shrink.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
    speed = commands.add_parser("bench", help="measure speed and memory on this machine")
    bench_run.add_arguments(speed)
    speed.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    speed.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
    return top


def _add_generation_options(sub: argparse.ArgumentParser, task: Task) -> None:
    video = task.output == "video"
    sub.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="default: %s" % (f"{task.name}.mp4" if video else f"{task.name}.png"),
    )
    if not task.sized_by_input:
        sizes = ", ".join(f"{w}x{h}" for w, h in SIZES["video_480p" if video else "image_768res"].values())
        sub.add_argument(
            "--width", type=int, help=f"pixels, lowered to a multiple of 16; good sizes: {sizes}"
        )
        sub.add_argument("--height", type=int)
    if video and task.takes != "video":
        sub.add_argument(
            "--frames",
            "--num-frames",
            type=int,
            help="lowered to 4k+1, at most 121, 12 a second; default: 49",
        )
    sub.add_argument("--steps", type=int, default=30, help="default: %(default)s")
    sub.add_argument("--shift", type=float, default=3.5, help="default: %(default)s")
    sub.add_argument(
        "--cfg", type=float, default=4.0, help="guidance scale, 1 turns it off; default: %(default)s"
    )
    sub.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        default=(0.4, 1.0),
        metavar=("LOW", "HIGH"),
        help="default: 0.4 1.0",
    )
    sub.add_argument("--renorm", choices=RENORMS, default="global", help="default: %(default)s")
    sub.add_argument("--renorm-min", type=float, default=0.0, help="default: %(default)s")
    sub.add_argument(
        "--negative-prompt", help="what to stay away from; default: the trained unconditional sequence"
    )
    sub.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    sub.add_argument(
        "--batch", type=int, default=1, metavar="N", help="N results with seeds SEED, SEED+1, …; default: 1"
    )
    if task.name == "image_edit":
        sub.add_argument(
            "--then",
            action="append",
            default=[],
            metavar="PROMPT",
            help="another edit, of the last result; repeatable",
        )


def _add_text_options(sub: argparse.ArgumentParser, task: Task) -> None:
    sub.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    sub.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token; default: %(default)s"
    )
    sub.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    sub.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def run_task(args: argparse.Namespace, task: Task, bars: Bars) -> dict[str, Any]:
    """One generation or understanding command; returns its machine-readable result."""
    output = _check_output(args, task)
    name = "Lance_3B_Video" if task.is_video else "Lance_3B"
    where = args.model or Path("models/lance") / name
    options = {key: getattr(args, key) for key in ("vit", "vae", "compile", "overlap")}
    lance = load(where, args.device, DTYPES[args.dtype], **options, progress=bars)
    if task.output == "text":
        return _understand(args, task, lance, bars)
    return _generate(args, task, lance, output, bars)


def _check_output(args: argparse.Namespace, task: Task) -> Path | None:
    """The file to write, refused before any work if it could not be written."""
    if task.output == "text":
        return None
    output = Path(args.output or f"{task.name}{'.mp4' if task.output == 'video' else '.png'}")
    known = media.VIDEO_FORMATS if task.output == "video" else media.IMAGE_FORMATS
    if output.suffix.lower() not in known:
        raise RequestError(f"{output}: {task.name} writes {task.output}s, as one of {', '.join(known)}")
    if not output.parent.is_dir():
        raise RequestError(f"{output}: the folder {output.parent} does not exist; make it first")
    return output


def _understand(args: argparse.Namespace, task: Task, lance: Lance, bars: Bars) -> dict[str, Any]:
    live = not args.json and sys.stdout.isatty()

    def show(piece: NewText) -> None:
        bars.close()
        print(piece, end="", flush=True)

    answer = lance.understand(
        args.prompt,
        **{task.takes: getattr(args, task.takes)},
        system_prompt=args.system_prompt,
        resolution=args.resolution,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        on_token=show if live else None,
    )
    if live:
        print()
    elif not args.json:
        print(answer.text)
    return {"task": task.name, "text": answer.text, "token_ids": answer.token_ids}


def _generate(args: argparse.Namespace, task: Task, lance: Lance, output: Path, bars: Bars) -> dict[str, Any]:
    options = {
        key: getattr(args, key)
        for key in [
            "width",
            "height",
            "steps",
            "shift",
            "cfg",
            "cfg_interval",
            "renorm",
            "renorm_min",
            "seed",
            "negative_prompt",
            "system_prompt",
            "resolution",
        ]
        if hasattr(args, key)
    }
    options |= {"batch_size": args.batch, "num_frames": getattr(args, "frames", None)}
    source = {task.takes: getattr(args, task.takes)} if task.takes else {}
    turns = [args.prompt, *getattr(args, "then", [])]
    if len(turns) > 1 and args.batch > 1:
        raise RequestError(
            f"--then edits one result further and --batch {args.batch} makes several; use one of them"
        )
    written = []
    for turn, prompt in enumerate(turns, 1):
        result = lance.generate(task.name, prompt, **source, **options)
        last = turn == len(turns)
        path = output if last else output.with_stem(f"{output.stem}_{turn}")
        written += _save(result, path, {"turns": turns[:turn]} if len(turns) > 1 else {}, args, bars)
        source = {task.takes: result.frames[0]}
    return {"task": task.name, "files": written}


def _save(
    result: Generated, path: Path, extra: dict[str, Any], args: argparse.Namespace, bars: Bars
) -> list[dict[str, Any]]:
    """Write every result of a batch, the request and its own seed inside; returns what was written."""
    frames = result.frames if result.frames.dim() == 5 else result.frames[None]
    written = []
    for i, clip in enumerate(frames):
        one = path if len(frames) == 1 else path.with_stem(f"{path.stem}_{i}")
        asked = {k: v for k, v in (result.request | extra).items() if v is not None} | {
            "seed": result.request["seed"] + i
        }
        if path.suffix.lower() in media.IMAGE_FORMATS:
            media.save_image(one, clip[0], asked)
        else:
            media.save_video(one, _watched(clip, bars), result.fps, asked)
        written.append({"file": str(one), **asked})
        if not args.json:
            size = f"{asked['width']}x{asked['height']}" + (
                f", {asked['num_frames']} frames" if asked["num_frames"] > 1 else ""
            )
            print(f"{one}  ({size}, seed {asked['seed']})")
    return written


def _watched(frames: Tensor, bars: Bars) -> Iterator[Tensor]:
    """The frames one by one, with a bar while they are written."""
    for i, frame in enumerate(frames, 1):
        yield frame
        bars("saving", i, len(frames))


def _dispatch(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    if args.command in TASKS:
        return run_task(args, TASKS[args.command], bars)
    if args.command == "tiny":
        folder = tiny.write(args.folder, seed=args.seed)
        if not args.json:
            print(
                f"{folder}: Lance_3B, Lance_3B_Video, Qwen2.5-VL-ViT and Wan2.2_VAE.pth, with random "
                "weights (they draw noise)"
            )
        return {"folder": str(folder)}
    if args.command == "convert":
        result = convert.convert(
            args.source,
            args.target,
            args.dtype,
            understanding=args.understanding,
            generation=args.generation,
            include_vae=not args.no_vae,
            vit=args.vit,
            vae=args.vae,
            progress=bars,
        )
        if not args.json:
            print(convert.report(result))
        return result
    if args.command == "download":
        result = download.run(args, bars)
        if not args.json:
            print(download.report(result))
        return result
    if args.command == "bench":
        result = bench_run.run(args, bars)
        if not args.json:
            print(bench_run.report(result))
        return result
    result = describe.describe(args.path, vit=args.vit, vae=args.vae)
    if not args.json:
        print(describe.report(result))
    return result


def main(argv: Sequence[str] | None = None, emit: Callable[[str], None] = print) -> int:
    """Run one command; returns the exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    bars = Bars(not getattr(args, "quiet", False))
    began = time.perf_counter()
    try:
        result = _dispatch(args, bars)
    except LanceError as error:
        bars.close()
        print(f"error: {error}", file=sys.stderr)
        if getattr(args, "json", False):
            emit(json.dumps({"error": str(error), "type": type(error).__name__}))
        return 2
    except KeyboardInterrupt:
        bars.close()
        print("cancelled", file=sys.stderr)
        return 130
    bars.close()
    if getattr(args, "json", False):
        emit(json.dumps(result | {"seconds": round(time.perf_counter() - began, 3)}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
