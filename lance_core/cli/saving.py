"""Results as files: their names, what is stored in them, and what is said of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..inputs.tasks import Task
from .common import Bars

if TYPE_CHECKING:
    from ..pipeline import Generated


def default_output(task: Task) -> str:
    """Where a task writes when nothing is said."""
    return f"{task.name}{'.mp4' if task.output == 'video' else '.png'}"


def turn_path(output: Path, turn: int, turns: int) -> Path:
    """Where the result of a turn goes, counted from 1: the last has the name asked for."""
    return output if turn == turns else output.with_stem(f"{output.stem}_{turn}")


def names(path: Path, count: int) -> list[Path]:
    """Where the results of a batch go."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}_{i}") for i in range(count)]


def save(
    result: Generated, path: Path, extra: dict[str, Any], args: argparse.Namespace, bars: Bars
) -> list[dict[str, Any]]:
    """Write every result of a batch, the request and its own seed inside; returns what was written."""
    frames = result.frames if result.frames.dim() == 5 else result.frames[None]
    written = []
    for i, (clip, one) in enumerate(zip(frames, names(path, len(frames)), strict=True)):
        asked = {k: v for k, v in (result.request | extra).items() if v is not None}
        asked |= {"seed": result.request["seed"] + i}
        written.append(save_one(one, clip, len(clip), result.fps, asked, args, bars))
    return written


def save_one(
    path: Path,
    frames: Iterable[Any],
    count: int,
    fps: float,
    asked: dict[str, Any],
    args: argparse.Namespace,
    bars: Bars,
) -> dict[str, Any]:
    """Write one picture or video, `asked` inside it, and say so."""
    from ..inputs import media

    if path.suffix.lower() in media.IMAGE_FORMATS:
        media.save_image(path, next(iter(frames)), asked)
    else:
        media.save_video(path, _watched(frames, count, bars), fps, asked)
    if not args.json:
        length = f", {asked['num_frames']} frames" if asked["num_frames"] > 1 else ""
        chosen = f", score {asked['score']:.3f}" if "score" in asked else ""
        what = f"{asked['width']}x{asked['height']}{length}, seed {asked['seed']}{chosen}"
        bars.close()
        print(f"{path}  ({what})", flush=True)
    return {"file": str(path), **asked}


def _watched(frames: Iterable[Any], count: int, bars: Bars) -> Iterator[Any]:
    """The frames one by one, with a bar while they are written."""
    for i, frame in enumerate(frames, 1):
        yield frame
        bars("saving", i, count)
