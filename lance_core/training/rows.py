"""Rows of a data set: what each trains, and its media as files or as cells of a table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import MediaError, RequestError
from ..inputs.tasks import TASKS, Task
from .tables import parquet

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
CLIPS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".gif")
MAX_MEDIA = 4 << 30  # bytes of one file


@dataclass(frozen=True)
class Cell:
    """A picture or clip inside a parquet file."""

    path: Path
    group: int
    row: int
    column: str
    is_video: bool

    def read(self) -> bytes:
        """Its bytes."""
        return _column(self.path, self.group, self.column)[self.row]


@lru_cache(maxsize=4)
def _column(path: Path, group: int, column: str) -> list[Any]:
    table = parquet().ParquetFile(path).read_row_group(group, columns=[column])
    return table.column(column).to_pylist()


Media: TypeAlias = Path | Cell


@dataclass(frozen=True)
class Row:
    """One row.

    name: as messages call it. task: of `tasks.TASKS`. text: caption, instruction or question. media: the
    target, or what a question is about. sources: what an edit starts from, or a subject's pictures. answer:
    of understanding. system: instead of the trained instruction. repeats: how often an epoch has it.
    """

    name: str
    task: str
    text: str
    media: Media
    sources: tuple[Media, ...] = ()
    answer: str = ""
    system: str | None = None
    repeats: int = 1

    @property
    def kind(self) -> Task:
        """The task."""
        return TASKS[self.task]


@dataclass
class DataSet:
    """Rows that can be trained on, and what is wrong with others, by name.

    form: what the data was taken for. notes: what is to be known and is no fault of a row.
    """

    form: str
    rows: list[Row] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_video(media: Media) -> bool:
    """Whether it is a clip, by its name's ending or its column."""
    return media.is_video if isinstance(media, Cell) else media.suffix.lower() in CLIPS


def is_media(path: Path) -> bool:
    """Whether a file's ending is that of a picture or clip."""
    return path.suffix.lower() in (*PICTURES, *CLIPS)


def source_of(media: Media) -> Any:
    """What media.py reads: a path or bytes."""
    return media.read() if isinstance(media, Cell) else media


def digest(media: Media) -> str:
    """SHA-256 of a file's or cell's bytes.

    Raises:
        MediaError: it cannot be read.
    """
    if isinstance(media, Cell):
        return hashlib.sha256(media.read()).hexdigest()
    found = hashlib.sha256()
    try:
        with open(media, "rb") as file:
            while chunk := file.read(1 << 20):
                found.update(chunk)
    except OSError as error:
        raise MediaError(f"{media} cannot be read ({error.strerror or error})") from None
    return found.hexdigest()


def made(
    name: str,
    values: Mapping[str, Any],
    *,
    task: str | None = None,
    question: str | None = None,
) -> Row:
    """A row from its parts: text, media, sources, references, answer, system, repeats.

    Args:
        task: wanted for rows that fit it: i2v instead of t2v, or understanding (x2t_image, x2t_video), for
            which the caption is the answer to `question`.

    Raises:
        RequestError: a part is missing, or the parts fit no task; a sentence for people.
    """
    media, text = values.get("media"), str(values.get("text") or "").strip()
    if media is None:
        raise RequestError("no picture or clip")
    sources = tuple(values.get("sources") or ())
    references = tuple(values.get("references") or ())
    answer = values.get("answer")
    video = is_video(media)
    rest: dict[str, Any] = {"system": values.get("system"), "repeats": int(values.get("repeats") or 1)}
    if answer is None and task in ("x2t_image", "x2t_video") and not sources and not references:
        answer, text = text, question or _question(video)
        if not answer:
            raise RequestError("no caption, which would be the answer")
    if answer is not None:
        if not str(answer).strip():
            raise RequestError("an empty answer")
        name_of_task = "x2t_video" if video else "x2t_image"
        return Row(name, name_of_task, text, media, answer=str(answer).strip(), **rest)
    if not text:
        raise RequestError("no caption")
    if references:
        if any(is_video(r) for r in references):
            raise RequestError("a clip among the references, which are pictures")
        return Row(name, "subject_video" if video else "subject_image", text, media, references, **rest)
    if sources:
        if len(sources) > 1 or is_video(sources[0]) != video:
            raise RequestError("an edit needs one source of its target's kind, both pictures or both clips")
        return Row(name, "video_edit" if video else "image_edit", text, media, sources, **rest)
    return Row(name, ("i2v" if task == "i2v" else "t2v") if video else "t2i", text, media, **rest)


def _question(video: bool) -> str:
    return f"Describe the {'video' if video else 'image'}."
