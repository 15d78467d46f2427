"""Captions by Lance itself, written beside the media as .txt files that can be edited before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.loading import Progress
from ..errors import LanceError, RequestError
from ..files import written
from ..pipeline import Lance
from .rows import CLIPS, is_media

QUESTION = "Describe this {kind} in one detailed sentence."
NEW_TOKENS = 128


def caption(
    folder: Path,
    lance: Lance,
    question: str | None = None,
    overwrite: bool = False,
    resolution: str | None = None,
    max_new_tokens: int = NEW_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write NAME.txt beside every picture and clip of a folder that has none (or all, with `overwrite`).

    Returns: captions by name, problems by name, and how many had a caption already.

    Raises:
        RequestError: no media are there, or none could be captioned.
        CheckpointError: the model cannot be loaded.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; captions are written beside the media in one")
    media = list(_media(folder))
    if not media:
        raise RequestError(f"{folder} holds no pictures or clips to caption")
    todo = [p for p in media if overwrite or not _has_text(p)]
    captions: dict[str, str] = {}
    problems: dict[str, str] = {}
    for done, path in enumerate(todo, 1):
        name, video = path.relative_to(folder).as_posix(), path.suffix.lower() in CLIPS
        asked = question or QUESTION.format(kind="video" if video else "image")
        try:
            answer = lance.understand(
                asked,
                image=None if video else path,
                video=path if video else None,
                resolution=resolution,
                max_new_tokens=max_new_tokens,
            )
            with written(path.with_suffix(".txt")) as file:
                file.write(f"{answer.text.strip()}\n".encode())
            captions[name] = answer.text.strip()
        except LanceError as error:
            problems[name] = str(error)
        except OSError as error:
            raise RequestError(f"{path.with_suffix('.txt')} cannot be written ({error.strerror})") from None
        if progress is not None:
            progress("captioning", done, len(todo))
    if todo and not captions:
        raise RequestError(f"none of {len(todo)} files could be captioned: {next(iter(problems.values()))}")
    return {"captions": captions, "problems": problems, "kept": len(media) - len(todo)}


def _media(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and is_media(path) and path.is_file():
            yield path


def _has_text(path: Path) -> bool:
    beside = path.with_suffix(".txt")
    return beside.is_file() and beside.stat().st_size > 0
