"""Which rows a batch is about: read, checked, chosen by limit and shard, each with its checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import choice, shown, whole
from ..errors import LanceError, RequestError
from ..inputs import tasks
from . import layouts
from .row_files import read_entries
from .row_forms import Defaults, make_row
from .rows import ALIASES, GENERATION_OPTIONS, TEXT_OPTIONS, BadRow, Row, without_doubles
from .work import Settings

DEFAULT_FOLDER = Path("models") / "lance"
MAX_LIMIT = 1 << 40


@dataclass(frozen=True)
class Work:
    """What is to be done: rows of this run and, of those, what is wrong at once."""

    rows: list[Row]
    bad: list[BadRow]

    @property
    def total(self) -> int:
        """Of both."""
        return len(self.rows) + len(self.bad)


def shard_name(shard: str | tuple[int, int] | None) -> str:
    """A shard as part of a file name, empty for the whole."""
    return "" if shard is None else "{}of{}".format(*_shard(shard))


def checked_options(options: dict[str, Any], task: str | None, layout: str | None) -> dict[str, Any]:
    """The options for all rows, by their own names.

    Raises:
        RequestError: one that no task has, or that the task of all rows has not.
    """
    if layout is not None:
        choice("layout", layout, layouts.LAYOUTS)
        task = layouts.LAYOUTS[layout].task
    options = {ALIASES.get(name, name): value for name, value in options.items() if value is not None}
    known = {*GENERATION_OPTIONS, *TEXT_OPTIONS}
    kind = tasks.task_of(task) if task is not None else None
    if kind is not None:
        known = {*(TEXT_OPTIONS if kind.output == "text" else GENERATION_OPTIONS)}
    for name in options:
        if name not in known:
            whose = f"{kind.name} has" if kind else "a task has"
            raise RequestError(
                f"{shown(name)} is no option that {whose}; known are {', '.join(sorted(known))}"
            )
    return options


def rows_of(file: Path, defaults: Defaults, layout: str | None) -> list[Row | BadRow]:
    """The rows of a file, or of a benchmark's."""
    if layout is not None:
        return without_doubles(layouts.read(layout, file, defaults))
    return without_doubles([make_row(entry, defaults) for entry in read_entries(file)])


def _shard(shard: str | tuple[int, int]) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard) if isinstance(shard, str) else None
    first, count = map(int, match.groups()) if match else (0, 0) if isinstance(shard, str) else shard
    if not 1 <= first <= count:
        raise RequestError(f"shard is {shown(shard)}, expected i/n with i from 1 to n, such as 1/4")
    return first, count


def chosen(rows: list[Row | BadRow], limit: int | None, shard: str | tuple[int, int] | None) -> Work:
    """The first `limit` rows, and of these a shard's.

    Raises:
        RequestError: one of the two is none.
    """
    if limit is not None:
        rows = rows[: whole("limit", limit, 1, MAX_LIMIT)]
    if shard is not None:
        first, count = _shard(shard)
        rows = rows[first - 1 :: count]
    good = [row for row in rows if isinstance(row, Row)]
    return Work(good, [row for row in rows if isinstance(row, BadRow)])


def with_checkpoints(work: Work, settings: Settings, default: str | None) -> tuple[Work, int]:
    """The same work, each row with the checkpoint it runs on; and the bytes of the largest's weights.

    Rows whose own checkpoint cannot be opened, or cannot do their task, are bad rows.

    Raises:
        CheckpointError: it is the one for all rows that cannot be opened.
    """
    from ..checkpoint.checkpoint import Checkpoint

    known: dict[str, str | LanceError] = {}
    weights = 0
    rows, bad = [], list(work.bad)
    for row in work.rows:
        name = row.checkpoint or str(DEFAULT_FOLDER / ("Lance_3B_Video" if row.kind.is_video else "Lance_3B"))
        if name not in known:
            try:
                opened = Checkpoint(name, settings.vit, settings.vae)
                known[name] = opened.config.variant
                weights = max(weights, _bytes_of(opened.path))
            except LanceError as error:
                if row.checkpoint in (None, default):
                    raise
                known[name] = error
        variant = known[name]
        try:
            if isinstance(variant, LanceError):
                raise variant
            tasks.check_variant(row.kind, variant)
            rows.append(replace(row, checkpoint=str(Path(name).absolute())))
        except LanceError as error:
            bad.append(BadRow(row.number, row.id, str(error)))
    return Work(rows, sorted(bad, key=lambda row: row.number)), weights


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
