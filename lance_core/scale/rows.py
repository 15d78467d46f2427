"""A row of a batch: one request, what it is called, and where its results go."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from .. import checks
from ..checks import shown
from ..errors import RequestError
from ..inputs import tasks
from ..inputs.tasks import Task

MAX_NAME = 240  # bytes of one part of a file name
MAX_SAMPLES = 64  # of one row
GENERATION_OPTIONS = (
    *("width", "height", "num_frames", "resolution", "steps", "shift", "cfg", "cfg_interval"),
    *("renorm", "renorm_min", "seed", "negative_prompt", "system_prompt", "batch_size"),
)
TEXT_OPTIONS = ("system_prompt", "resolution", "max_new_tokens", "temperature", "top_p", "seed")
MEDIA = ("image", "video", "references")
ALIASES = {"frames": "num_frames", "batch": "batch_size", "question": "prompt", "model": "checkpoint"}
ALIASES |= {"index": "id", "data": "prompt"}
RELEASED = ("interleave_array", "element_dtype_array", "istarget_in_interleave")
RELEASED_TASKS = {"idip_image": "subject_image", "idip_video": "subject_video"}
OTHERS = ("original_prompt_en", "additional_info")  # of the released benchmark files: not part of a request
OURS = {"id", "task", "prompt", "checkpoint", *MEDIA, *GENERATION_OPTIONS, *TEXT_OPTIONS, *ALIASES, *RELEASED}
ENDINGS = {
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "video": (".mp4", ".mov", ".mkv"),
    "text": (".json",),
}
CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True)
class Row:
    """One request. What is JSON goes in, so that a row can be sent to another process.

    number: its place in the file, from 0. media: a path, or a list of them (references). files: where its
    results go, below the output folder, one a sample, or none where only the grid is kept. grid: a picture
    of all samples side by side. beside: texts to write with it, by name.
    """

    number: int
    id: str
    task: str
    prompt: str
    media: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    files: list[str] = field(default_factory=list)
    grid: str | None = None
    beside: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Task:
        """Its task."""
        return tasks.TASKS[self.task]

    @property
    def paths(self) -> list[str]:
        """Its media, one path after another."""
        return [] if self.media is None else [self.media] if isinstance(self.media, str) else self.media

    @property
    def targets(self) -> list[str]:
        """Everything it writes of pictures, clips and answers."""
        return [*self.files, *([self.grid] if self.grid else [])]

    @property
    def group(self) -> tuple[str, ...]:
        """Rows of one group run on one checkpoint, one task and one size."""
        sized = ("width", "height", "num_frames", "resolution")
        return (self.checkpoint or "", self.task, *(str(self.options.get(key)) for key in sized))


@dataclass(frozen=True)
class BadRow:
    """A row that is no request, and why."""

    number: int
    id: str
    error: str


def target_name(name: str) -> str:
    """An id as a path below the output folder, with `/` between folders.

    Raises:
        RequestError: empty, absolute, upwards, too long, or with characters no file name should have.
    """
    checks.text("id", name)
    parts = name.split("/")
    if (
        CONTROL.search(name)
        or any(part.strip() in ("", ".", "..") or len(part.encode()) > MAX_NAME for part in parts)
        or re.match(r"[A-Za-z]:", name)
    ):
        raise RequestError(
            f"id {shown(name)} cannot name a file below the output folder; expected a name without `..`, "
            f"backslashes and control characters, at most {MAX_NAME} bytes"
        )
    return name


def without_doubles(found: list[Row | BadRow]) -> list[Row | BadRow]:
    """The same rows; one that would write what an earlier row writes, or has its id, is refused."""
    ids: dict[str, int] = {}
    taken: dict[str, int] = {}
    kept: list[Row | BadRow] = []
    for row in found:
        names = [os.path.normcase(name) for name in row.targets] if isinstance(row, Row) else []
        clash = next((taken[name] for name in names if name in taken), ids.get(row.id))
        if clash is not None:
            text = f"row {row.number + 1} has the id or the file of row {clash + 1}; ids must differ"
            kept.append(BadRow(row.number, f"{row.id} (row {row.number + 1})", text))
            continue
        ids[row.id] = row.number
        taken |= dict.fromkeys(names, row.number)
        kept.append(row)
    return kept
