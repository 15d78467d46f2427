"""What a data set is, row by row: problems, sizes, buckets, and how many tokens a row will be."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from ..checkpoint.loading import Progress
from ..config import latent_frames, latent_grid
from ..errors import LanceError
from ..inputs import media as files
from ..inputs.preprocess import vae_size, vit_size
from .dataset import read, require
from .rows import Media, Row, is_video, source_of

FEW_ROWS = 5


def inspect(
    path: str | os.PathLike,
    resolution: str | None = None,
    task: str | None = None,
    question: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read every row's media and describe the set: form, rows, tasks, buckets, problems, notes.

    resolution: a preset; None for each task's own. task, question: see `dataset.read`.

    Raises:
        RequestError: no row can be trained on.
    """
    found = read(path, task, question)
    rows, buckets, tokens = [], Counter[str](), []
    for i, row in enumerate(found.rows):
        try:
            told = _describe(row, resolution or row.kind.default_resolution)
        except LanceError as error:
            found.problems[row.name] = str(error)
            continue
        finally:
            if progress is not None:
                progress("reading the data set", i + 1, len(found.rows))
        rows.append(told)
        buckets[f"{row.task} {told['bucket']}"] += row.repeats
        tokens.append(told["visual_tokens"])
    kept = {told["name"] for told in rows}
    found.rows = [row for row in found.rows if row.name in kept]
    require(found, path)
    notes = [*found.notes, *_notes(found.rows, rows)]
    return {
        "form": found.form,
        "rows": len(rows),
        "repeats": sum(row.repeats for row in found.rows),
        "tasks": dict(Counter(row.task for row in found.rows)),
        "buckets": dict(buckets.most_common()),
        "visual_tokens": {"least": min(tokens), "most": max(tokens)},
        "problems": found.problems,
        "notes": notes,
        "listed": rows,
    }


def _describe(row: Row, preset: str) -> dict[str, Any]:
    """A row's sizes, all its media read."""
    frames, width, height = _size(row.media)
    wide, tall = vae_size(width, height, preset)
    if row.answer:
        wide, tall = vit_size(width, height, preset)
    tokens = 0 if row.answer else _latent_tokens(wide, tall, frames)
    for source in (row.media,) if row.answer else row.sources:
        count, across, down = _size(source)
        seen = vit_size(across, down, preset)
        tokens += (count + 1) // 2 * (seen[0] // 28) * (seen[1] // 28)
        tokens += 0 if row.answer else _latent_tokens(*vae_size(across, down, preset), count)
    length = f"x{frames}" if frames > 1 else ""
    told = {"name": row.name, "task": row.task, "size": f"{width}x{height}{length}"}
    told |= {"bucket": f"{wide}x{tall}{length}", "text": row.text}
    return told | {"visual_tokens": tokens, "enlarged": wide * tall > 1.5 * width * height}


def _latent_tokens(width: int, height: int, frames: int) -> int:
    t, h, w = latent_grid(width, height, frames)
    return t * h * w


def _size(media: Media) -> tuple[int, int, int]:
    """(frames the model sees, width, height)."""
    source = source_of(media)
    frames = files.read_clip(source)[0] if is_video(media) else files.load_image(source)[None]
    return len(frames), frames.shape[2], frames.shape[1]


def _notes(rows: list[Row], told: list[dict[str, Any]]) -> list[str]:
    notes = []
    if len(rows) == 1:
        notes.append("one row only: it will be learnt by heart, and nothing is held out for validation")
    elif len(rows) < FEW_ROWS:
        notes.append(f"{len(rows)} rows only: expect them to be learnt by heart")
    enlarged = [one["name"] for one in told if one["enlarged"]]
    if enlarged:
        notes.append(
            f"{len(enlarged)} rows are enlarged to their bucket, such as {enlarged[0]}; use larger media or "
            "a smaller --resolution"
        )
    short = [r.name for r, one in zip(rows, told, strict=True) if _is_short(r, one)]
    if short:
        notes.append(f"{len(short)} clips are shorter than 5 frames and will be left out, such as {short[0]}")
    texts = Counter(r.text for r in rows if not r.answer)
    same = texts.most_common(1)[0] if texts else ("", 0)
    if same[1] > 1 and same[1] == len(rows):
        notes.append("all captions are the same: what they all show will be tied to every one of its words")
    return notes


def _is_short(row: Row, told: dict[str, Any]) -> bool:
    if row.answer or row.kind.output != "video":
        return False
    frames = int(told["size"].split("x")[2]) if told["size"].count("x") == 2 else 1
    return latent_frames(frames) < 2


def report(told: dict[str, Any]) -> str:
    """The description for people."""
    tasks = ", ".join(f"{count} {task}" for task, count in told["tasks"].items())
    least, most = told["visual_tokens"].values()
    lines = [f"{told['form']}: {told['rows']} rows ({tasks})"]
    if told["repeats"] != told["rows"]:
        lines.append(f"  {told['repeats']} rows an epoch, with repeats")
    lines.append(f"  visual tokens of a row: {least:,} to {most:,}")
    lines += [f"  bucket {name}: {count}" for name, count in told["buckets"].items()]
    lines += [f"  note: {note}" for note in told["notes"]]
    lines += [f"  bad: {name}: {why}" for name, why in told["problems"].items()]
    return "\n".join(lines)
