"""A row of a file made a request, or refused alone: names, tasks, options and media paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .. import checks
from ..checks import shown
from ..errors import LanceError, RequestError
from ..inputs import tasks
from ..inputs.tasks import Task
from .row_files import Entry
from .rows import (
    ALIASES,
    ENDINGS,
    GENERATION_OPTIONS,
    MAX_NAME,
    MAX_SAMPLES,
    MEDIA,
    OTHERS,
    RELEASED,
    RELEASED_TASKS,
    TEXT_OPTIONS,
    BadRow,
    Row,
    target_name,
)


@dataclass(frozen=True)
class Defaults:
    """What rows have that do not say otherwise. folder: where relative media paths start."""

    folder: Path
    task: str | None = None
    checkpoint: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def make_row(entry: Entry, defaults: Defaults, **placed: Any) -> Row | BadRow:
    """The request that an entry is, checked as far as that needs neither its media nor a model.

    placed: `files`, `grid` and `beside` of a row that decides its own names (see layouts.py).
    """
    try:
        if isinstance(entry.content, LanceError):
            raise entry.content
        return _request(entry, {ALIASES.get(k, k): v for k, v in entry.content.items()}, defaults, placed)
    except LanceError as error:
        return BadRow(entry.number, _short(entry.id), str(error))


def _request(entry: Entry, raw: dict[str, Any], defaults: Defaults, placed: dict[str, Any]) -> Row:
    name = target_name(entry.id)
    if "interleave_array" in raw:
        raw = _interleaved(raw, defaults)
    kind = _task(raw.pop("task", None), name, defaults)
    raw = {key: value for key, value in raw.items() if key not in OTHERS and key != "id"}
    known = TEXT_OPTIONS if kind.output == "text" else GENERATION_OPTIONS
    strange = sorted(map(str, raw.keys() - {"prompt", "checkpoint", *MEDIA, *known}))
    if strange:
        raise RequestError(f"{shown(strange[0])} is no option of {kind.name}; known are {', '.join(known)}")
    options = {k: v for k, v in defaults.options.items() if applies(k, kind)}
    options |= {k: raw[k] for k in known if raw.get(k) is not None}
    given = {key: raw.get(key) for key in MEDIA}
    tasks.check_media(kind, **given)
    prompt = tasks.check_text("prompt", raw.get("prompt"))
    check_options(kind, options)
    checkpoint = raw.get("checkpoint", defaults.checkpoint)
    if checkpoint is not None:
        checks.text("checkpoint", checkpoint)
    media = _paths(given[kind.takes], kind, defaults.folder) if kind.takes else None
    files = placed.get("files") or ([] if placed.get("grid") else _names(name, kind, options))
    return Row(
        entry.number,
        name,
        kind.name,
        prompt,
        media,
        options,
        checkpoint,
        files,
        placed.get("grid"),
        placed.get("beside", {}),
    )


def applies(option: str, kind: Task) -> bool:
    """Whether a default given for all rows concerns rows of a task."""
    if kind.output == "text":
        return option in TEXT_OPTIONS
    if option == "num_frames" and (kind.output != "video" or kind.takes == "video"):
        return False
    return option in GENERATION_OPTIONS and not (kind.sized_by_input and option in ("width", "height"))


def _task(own: Any, name: str, defaults: Defaults) -> Task:
    """The row's task: its own, the default, or for a bare `{file name: prompt}` what its ending says."""
    if own is None and defaults.task is None:
        ending = PurePosixPath(name).suffix.lower()
        own = "t2i" if ending in ENDINGS["image"] else "t2v" if ending in ENDINGS["video"] else None
        if own is None:
            raise RequestError(f"no task: give rows a `task`, or --task; one of {', '.join(tasks.TASKS)}")
    task = defaults.task if own is None else own
    return tasks.task_of(RELEASED_TASKS.get(task, task) if isinstance(task, str) else shown(task))


def _interleaved(raw: dict[str, Any], defaults: Defaults) -> dict[str, Any]:
    """The released interleaved form as one of ours. Targets (`istarget` 1) are left out, but for an answer,
    [system prompt, question, answer], whose answer is.
    """
    lists = [raw.get(name) for name in RELEASED]
    if lists[2] is None and isinstance(lists[0], list):
        lists[2] = [0] * len(lists[0])
    items, kinds, targets = (one if isinstance(one, list) else [] for one in lists)
    if not items or not len(items) == len(kinds) == len(targets):
        raise RequestError(f"{', '.join(RELEASED)}: expected three lists of one length")
    request: dict[str, Any] = {}
    media: dict[str, list[Any]] = {"image": [], "video": []}
    for item, kind, target in zip(items, kinds, targets, strict=True):
        if kind == "text" and isinstance(item, list):
            if len(item) < 2:
                raise RequestError(f"{shown(item)}: expected [system prompt, question, answer]")
            request |= {"system_prompt": item[0] or None, "prompt": item[1]}
        elif kind == "text":
            request["prompt"] = item
        elif kind in media:
            media[kind] += [] if target else [item]
        else:
            raise RequestError(f"element_dtype_array has {shown(kind)}, expected text, image or video")
    name = raw.get("task", defaults.task)
    task = tasks.TASKS.get(RELEASED_TASKS.get(name, name)) if isinstance(name, str) else None
    if task is not None and task.takes == "references":
        request["references"] = media["image"] or None
    else:
        for key, found in media.items():
            if len(found) > 1:
                raise RequestError(f"{len(found)} of {key}, and {name or 'a row'} takes one")
            request[key] = found[0] if found else None
    rest = {k: v for k, v in raw.items() if k not in RELEASED}
    return rest | request


def check_options(kind: Task, options: dict[str, Any]) -> None:
    """What `generate` or `understand` would refuse, refused now."""
    from ..model.sampler import Guidance, schedule
    from ..text_generation import MAX_SEED, Chooser

    tasks.resolve_resolution(kind, options.get("resolution"))
    for name in ("system_prompt", "negative_prompt"):
        if name in options:
            checks.text(name, options[name])
    if kind.output == "text":
        Chooser(options.get("temperature", 0.0), options.get("top_p", 1.0), options.get("seed", 0))
        checks.whole("max_new_tokens", options.get("max_new_tokens", 256), 1, tasks.MAX_NEW_TOKENS)
        return
    samples = checks.whole("batch_size", options.get("batch_size", 1), 1, MAX_SAMPLES)
    checks.whole("seed", options.get("seed", 0), 0, MAX_SEED - samples + 1)
    schedule(*(options[k] for k in ("steps", "shift") if k in options)) if "steps" in options else None
    if "shift" in options:
        schedule(1, options["shift"])
    named = {"cfg": "scale", "cfg_interval": "interval", "renorm": "renorm", "renorm_min": "renorm_min"}
    Guidance(**{own: options[key] for key, own in named.items() if key in options})
    if kind.output == "video":
        tasks.resolve_frames(options.get("num_frames"))
    elif options.get("num_frames", 1) != 1:
        raise RequestError(f"{kind.name} makes one picture and num_frames is {shown(options['num_frames'])}")
    if not kind.sized_by_input:
        resolution = tasks.resolve_resolution(kind, options.get("resolution"))
        tasks.resolve_size(kind, options.get("width"), options.get("height"), resolution)


def _paths(given: Any, kind: Task, folder: Path) -> Any:
    """Media paths that can be opened from anywhere: absolute, beside the file, or in the current folder."""
    if isinstance(given, list) and kind.takes == "references":
        return [_path(one, folder) for one in given]
    path = _path(given, folder)
    return [path] if kind.takes == "references" else path


def _path(given: Any, folder: Path) -> str:
    text = checks.text("a media path", given)
    beside = folder / text
    return str(beside if beside.exists() or not Path(text).exists() else Path(text).absolute())


def _names(name: str, kind: Task, options: Mapping[str, Any]) -> list[str]:
    """Where a row's results go: its id, with the usual ending where it has none."""
    ending = next((e for e in ENDINGS[kind.output] if name.lower().endswith(e)), None)
    stem = name[: -len(ending)] if ending else name
    ending = name[len(stem) :] if ending else ENDINGS[kind.output][0]
    samples = int(options.get("batch_size", 1)) if kind.output != "text" else 1
    return [f"{stem}{ending}"] if samples == 1 else [f"{stem}_{i}{ending}" for i in range(samples)]


def _short(text: str) -> str:
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}…"
