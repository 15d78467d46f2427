"""A file of requests worked through, resumable after anything: `python -m lance_core batch`.

rows.py reads the file, results.py knows what is done, work.py draws, pool.py hands rows to several workers.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import choice, shown, whole
from ..errors import LanceError, RequestError
from ..inputs import tasks
from . import comfyui as comfy
from . import layouts
from .pool import Pool, grouped
from .results import Line, Results, finished, found, key_of, line_of
from .rows import (
    ALIASES,
    GENERATION_OPTIONS,
    TEXT_OPTIONS,
    BadRow,
    Defaults,
    Row,
    make_row,
    read_entries,
    without_doubles,
)
from .work import Session, Settings, here
from .workflow import filled

DEFAULT_FOLDER = Path("models") / "lance"
MAX_LIMIT = 1 << 40

Progress = Callable[[str, int, int], None]
OnLine = Callable[[Line], None]


@dataclass(frozen=True)
class Work:
    """What is to be done: rows of this run and, of those, what is wrong at once."""

    rows: list[Row]
    bad: list[BadRow]

    @property
    def total(self) -> int:
        """Of both."""
        return len(self.rows) + len(self.bad)


def run(
    file: str | os.PathLike,
    output: str | os.PathLike,
    *,
    task: str | None = None,
    checkpoint: str | os.PathLike | None = None,
    layout: str | None = None,
    workers: int | str | None = None,
    comfyui: str | None = None,
    workflow: str | os.PathLike | None = None,
    limit: int | None = None,
    shard: str | tuple[int, int] | None = None,
    retry_errors: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    dtype: str = "bfloat16",
    vit: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    compile: bool = False,
    overlap: bool = False,
    progress: Progress | None = None,
    on_line: OnLine | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Work through a file of requests. What an earlier run has done, and is still right, is left as it is.

    Args:
        file: JSON or JSONL; see docs/scale.md for its forms.
        output: the folder of results and of results.jsonl, made if there is none.
        task, checkpoint, options: for rows that have none of their own. Options are those of the tasks.
        layout: "geneval", "dpg", "gedit" or "vbench": `file` is that benchmark's, and results lie as its
            scorer wants them.
        workers: processes that draw, each with a model of its own; "all" is one a GPU; None draws here.
        comfyui: addresses of ComfyUI servers, with commas between: they draw, not this process.
        workflow: what they are given, in API form; by default the pack's own for each task.
        limit: only the first so many rows. shard: (i, n) or "i/n", every n-th row from the i-th.
        retry_errors: rows that failed in an earlier run are tried again.
        dry_run: check every row, and its media, and draw nothing.
        device, dtype, vit, vae, compile, overlap: as `lance_core.load`; dtype by name.
        progress: ("rows", done, total). on_line: called with each new line of results.jsonl.

    Returns: {"rows", "done", "made", "failed", "skipped", "results", "errors"}: numbers of rows of this run
        (done: there and right before it), the path of results.jsonl, and of a dry run the errors by id.

    Raises:
        RequestError: the file, the folder or an option is wrong, or the output takes nothing more.
        CheckpointError: the checkpoint cannot be opened.
    """
    options = _options(options, task, layout)
    own_folder = Path(file).absolute() if Path(file).is_dir() else Path(file).absolute().parent
    defaults = Defaults(own_folder, task, os.fspath(checkpoint) if checkpoint is not None else None, options)
    found_rows = _rows(Path(file), defaults, layout)
    name = shard_name(shard)
    work = _chosen(found_rows, limit, shard)
    settings = Settings(
        str(Path(output).absolute()), _device(device), _dtype(dtype), _path(vit), _path(vae), compile, overlap
    )
    weights, plan = 0, None
    if comfyui is None:
        work, weights = _with_checkpoints(work, settings, defaults.checkpoint)
    else:
        plan = comfy.plan(comfyui, Path(settings.folder), work.rows, workflow)
    if (workflow is not None and plan is None) or (workers is not None and plan is not None):
        raise RequestError("workflow= belongs to comfyui=, and workers= does not: a server is a worker")
    if dry_run:
        return _checked(work, plan, progress)
    results = Results(Path(settings.folder))
    with results.claimed(name):
        todo, summary = _todo(work, results, retry_errors, on_line, plan.made_by if plan else "")
        with contextlib.closing(_draw(todo, settings, workers, weights, plan)) as lines:
            return _record(lines, results, len(todo), summary, progress, on_line)


def shard_name(shard: str | tuple[int, int] | None) -> str:
    """A shard as part of a file name, empty for the whole."""
    return "" if shard is None else "{}of{}".format(*_shard(shard))


# -- what is asked -------------------------------------------------------------------------------------------


def _options(options: dict[str, Any], task: str | None, layout: str | None) -> dict[str, Any]:
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


def _rows(file: Path, defaults: Defaults, layout: str | None) -> list[Row | BadRow]:
    if layout is not None:
        return without_doubles(layouts.read(layout, file, defaults))
    return without_doubles([make_row(entry, defaults) for entry in read_entries(file)])


def _shard(shard: str | tuple[int, int]) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard) if isinstance(shard, str) else None
    first, count = map(int, match.groups()) if match else (0, 0) if isinstance(shard, str) else shard
    if not 1 <= first <= count:
        raise RequestError(f"shard is {shown(shard)}, expected i/n with i from 1 to n, such as 1/4")
    return first, count


def _chosen(rows: list[Row | BadRow], limit: int | None, shard: str | tuple[int, int] | None) -> Work:
    if limit is not None:
        rows = rows[: whole("limit", limit, 1, MAX_LIMIT)]
    if shard is not None:
        first, count = _shard(shard)
        rows = rows[first - 1 :: count]
    good = [row for row in rows if isinstance(row, Row)]
    return Work(good, [row for row in rows if isinstance(row, BadRow)])


def _device(device: str | None) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(dtype: Any) -> str:
    return choice("dtype", str(dtype).removeprefix("torch."), ("bfloat16", "float16", "float32"))


def _path(path: str | os.PathLike | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _with_checkpoints(work: Work, settings: Settings, default: str | None) -> tuple[Work, int]:
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


# -- what is done and what is left ---------------------------------------------------------------------------


def _todo(
    work: Work, results: Results, retry: bool, on_line: OnLine | None, made_by: str
) -> tuple[list[Row], dict[str, Any]]:
    """The rows to draw; lines of the others are put right: added where they are missing, kept where not."""
    lines = results.read()
    summary = {"rows": work.total, "done": 0, "made": 0, "failed": 0, "skipped": 0}
    todo: list[Row] = []
    missing: list[Line] = []
    known: dict[str, str | None] = {}
    for row in work.rows:
        line = lines.get(row.id)
        written = any((results.folder / name).exists() for name in row.targets)
        if line is None and not written:
            todo.append(row)
            continue
        key = key_of(row, known, made_by)
        if finished(row, line, results.folder, key):
            summary["done"] += 1
        elif line is not None and line.get("error") is not None and line.get("row") == key and not retry:
            summary["skipped"] += 1
        elif (made := found(row, results.folder, key)) is not None:
            missing.append(made)
            summary["done"] += 1
        else:
            todo.append(row)
    again = {row.id for row in todo} | {row.id for row in work.bad} | {line["id"] for line in missing}
    results.rewrite(again)
    for line in [*missing, *(line_of(row.id, error=row.error) for row in work.bad)]:
        results.append(line)
        if on_line is not None:
            on_line(line)
    summary["failed"] = len(work.bad)
    return todo, summary


def _draw(
    todo: list[Row], settings: Settings, workers: int | str | None, weights: int, plan: comfy.Plan | None
) -> Generator[Line, None, None]:
    """The lines of the rows as they are drawn, here, by workers or by servers."""
    if plan is not None and todo:
        return Pool(todo, comfy.starter(plan), len(plan.servers)).lines()
    if workers is None or not todo:
        return here(grouped(todo), Session(settings))
    from . import processes

    count = processes.worker_count(workers, weights)
    return Pool(todo, processes.starter(settings, count), count).lines()


def _record(
    lines: Iterable[Line],
    results: Results,
    total: int,
    summary: dict[str, Any],
    progress: Progress | None,
    on_line: OnLine | None,
) -> dict[str, Any]:
    """Write each line as it comes."""
    say = progress or (lambda stage, done, total: None)
    say("rows", 0, total)
    for done, line in enumerate(lines, 1):
        results.append(line)
        summary["made" if line["error"] is None else "failed"] += 1
        if on_line is not None:
            on_line(line)
        say("rows", done, total)
    return summary | {"results": str(results.path)}


# -- a dry run -----------------------------------------------------------------------------------------------


def _checked(work: Work, plan: comfy.Plan | None, progress: Progress | None) -> dict[str, Any]:
    """Every row's media opened, every workflow filled; nothing is written."""
    errors = {row.id: row.error for row in work.bad}
    for done, (row, error) in enumerate(_opened(work.rows, plan), 1):
        if error is not None:
            errors[row.id] = str(error)
        if progress is not None:
            progress("checking", done, len(work.rows))
    return {"rows": work.total, "failed": len(errors), "errors": errors}


def _opened(rows: Iterable[Row], plan: comfy.Plan | None) -> Iterator[tuple[Row, LanceError | None]]:
    from ..inputs import media

    for row in rows:
        try:
            if plan is not None:
                filled(plan.workflows[row.task], row, row.paths, "")
            for path in row.paths:
                if row.kind.takes == "video":
                    media.read_clip(path, pick=lambda total, _: [0])
                else:
                    media.load_image(path)
            yield row, None
        except LanceError as error:
            yield row, error
