"""A file of requests worked through, resumable after anything: `python -m lance_core batch`.

row_files.py reads the file, row_forms.py makes requests of it, selection.py chooses; results.py knows what is
done, work.py draws, and pool.py hands rows to several workers or servers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from ..checks import choice
from ..errors import RequestError
from . import comfyui as comfy
from .dry_run import checked
from .pool import Pool, grouped
from .results import Line, Results, finished, found, key_of, line_of
from .row_forms import Defaults
from .rows import Row
from .selection import Work, checked_options, chosen, rows_of, shard_name, with_checkpoints
from .work import Session, Settings, here

ENGINES = ("processes", "ray")

Progress = Callable[[str, int, int], None]
OnLine = Callable[[Line], None]


def run(
    file: str | os.PathLike,
    output: str | os.PathLike,
    *,
    task: str | None = None,
    checkpoint: str | os.PathLike | None = None,
    layout: str | None = None,
    workers: int | str | None = None,
    engine: str = "processes",
    address: str | None = None,
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
        engine: "processes", or "ray": the workers are Ray actors, on the cluster at `address` or a local one.
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
    options = checked_options(options, task, layout)
    own_folder = Path(file).absolute() if Path(file).is_dir() else Path(file).absolute().parent
    defaults = Defaults(own_folder, task, os.fspath(checkpoint) if checkpoint is not None else None, options)
    found_rows = rows_of(Path(file), defaults, layout)
    name = shard_name(shard)
    work = chosen(found_rows, limit, shard)
    settings = Settings(
        str(Path(output).absolute()), _device(device), _dtype(dtype), _path(vit), _path(vae), compile, overlap
    )
    choice("engine", engine, ENGINES)
    weights, plan = 0, None
    if comfyui is None:
        work, weights = with_checkpoints(work, settings, defaults.checkpoint)
    else:
        plan = comfy.plan(comfyui, Path(settings.folder), work.rows, workflow)
    if (workflow is not None and plan is None) or (workers is not None and plan is not None):
        raise RequestError("workflow= belongs to comfyui=, and workers= does not: a server is a worker")
    if dry_run:
        return checked(work, plan, progress)
    results = Results(Path(settings.folder))
    with results.claimed(name):
        todo, summary = _todo(work, results, retry_errors, on_line, plan.made_by if plan else "")
        with contextlib.closing(_draw(todo, settings, (workers, engine, address), weights, plan)) as lines:
            return _record(lines, results, len(todo), summary, progress, on_line)


def _device(device: str | None) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(dtype: Any) -> str:
    return choice("dtype", str(dtype).removeprefix("torch."), ("bfloat16", "float16", "float32"))


def _path(path: str | os.PathLike | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


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
    todo: list[Row], settings: Settings, how: Any, weights: int, plan: comfy.Plan | None
) -> Generator[Line, None, None]:
    """The lines of the rows as they are drawn, here, by workers or by servers."""
    workers, engine, address = how
    if plan is not None and todo:
        return Pool(todo, comfy.starter(plan), len(plan.servers)).lines()
    if engine == "ray" and todo:
        from . import ray_engine

        return ray_engine.lines(todo, settings, workers, address)
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
