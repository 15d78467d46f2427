"""The rows of a batch file: read in every form they come in, and each one made a request or refused alone.

Forms: the released code's `{file name: prompt}` and `{id: {interleave_array, element_dtype_array,
istarget_in_interleave}}`, its `{"index", "data"}` lines, and ours, an object a request. A file holds them as
JSON (an object or a list) or as JSONL.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .. import checks
from ..checks import shown
from ..errors import LanceError, RequestError
from ..files import read_bytes
from ..inputs import tasks
from ..inputs.tasks import Task

MAX_FILE = 1 << 30  # bytes
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


@dataclass(frozen=True)
class Entry:
    """A row as the file has it: an object, or what is wrong with it."""

    number: int
    name: str | None
    content: dict[str, Any] | LanceError

    @property
    def id(self) -> str:
        """What to call it: its own id, else its place."""
        own = self.content.get("id", self.content.get("index")) if isinstance(self.content, dict) else None
        value = self.name if self.name is not None else own
        return f"{self.number:06d}" if value is None else str(value)


@dataclass(frozen=True)
class Defaults:
    """What rows have that do not say otherwise. folder: where relative media paths start."""

    folder: Path
    task: str | None = None
    checkpoint: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


# -- the file ------------------------------------------------------------------------------------------------


def read_entries(path: str | os.PathLike) -> list[Entry]:
    """The rows of a JSON or JSONL file, in its order.

    Raises:
        RequestError: it cannot be read, is neither, or holds no row.
    """
    path = Path(path)
    try:
        text = read_bytes(path, MAX_FILE).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            f"{str(path)[-200:]} cannot be read ({told[:150]}); expected a JSON or JSONL file of requests"
        ) from None
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    if not lines:
        try:
            return _numbered(_of_json(json.loads(text), path), path)
        except (ValueError, RecursionError) as error:
            first = text.lstrip()[:1]
            if path.suffix.lower() == ".json" or first != "{":
                raise RequestError(
                    f"{str(path)[-200:]} is no JSON ({str(error)[:150]}); expected an object, a list, or "
                    "JSONL (an object a line, in a file that ends in .jsonl)"
                ) from None
    found: list[tuple[str | None, Any]] = []
    for line in text.split("\n"):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                found.append((None, RequestError(f"this line is no JSON ({str(error)[:150]})")))
                continue
            found += list(value.items()) if _is_released(value) else [(None, value)]
    return _numbered(found, path)


def _of_json(value: Any, path: Path) -> list[tuple[str | None, Any]]:
    if isinstance(value, list):
        return [(None, one) for one in value]
    if isinstance(value, dict):
        return list(value.items()) if _is_released(value) else [(None, value)] if value else []
    raise RequestError(
        f"{str(path)[-200:]} holds {shown(value)}, expected an object of prompts or a list of requests"
    )


def _is_released(value: Any) -> bool:
    """Whether an object is `{name: prompt or interleaved request}` and no request itself."""
    return isinstance(value, dict) and not value.keys() & OURS and bool(value)


def _numbered(found: list[tuple[str | None, Any]], path: Path) -> list[Entry]:
    if not found:
        raise RequestError(f"{str(path)[-200:]} has no rows in it; expected a request a line or entry")
    entries = []
    for number, (name, value) in enumerate(found):
        if isinstance(value, str) and name is not None:
            value = {"prompt": value}
        elif not isinstance(value, dict | LanceError):
            value = RequestError(f"it is {shown(value)}, expected an object or, under a name, a prompt")
        entries.append(Entry(number, name, value))
    return entries


# -- one row -------------------------------------------------------------------------------------------------


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
    _check_options(kind, options)
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


def _check_options(kind: Task, options: dict[str, Any]) -> None:
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


# -- names ---------------------------------------------------------------------------------------------------


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


def _names(name: str, kind: Task, options: Mapping[str, Any]) -> list[str]:
    """Where a row's results go: its id, with the usual ending where it has none."""
    ending = next((e for e in ENDINGS[kind.output] if name.lower().endswith(e)), None)
    stem = name[: -len(ending)] if ending else name
    ending = name[len(stem) :] if ending else ENDINGS[kind.output][0]
    samples = int(options.get("batch_size", 1)) if kind.output != "text" else 1
    return [f"{stem}{ending}"] if samples == 1 else [f"{stem}_{i}{ending}" for i in range(samples)]


def _short(text: str) -> str:
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}…"


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
