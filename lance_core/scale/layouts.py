"""Sample files of four benchmarks, in the folders their scorers read, from their own prompt files.

| layout | prompt file | written |
|---|---|---|
| geneval | GenEVAL.jsonl, evaluation_metadata.jsonl | 00000/samples/0.png, grid.png, metadata.jsonl |
| dpg | DPG.jsonl, or the folder of .txt files | ID.png, a grid of the samples |
| gedit | GEdit_en.json | fullset/TASK/LANGUAGE/KEY.webp |
| vbench | Vbench_recaption.jsonl, or VBench_full_info.json | PROMPT-0.mp4 ... |

Steps, counts and sizes are those of the released benchmark scripts' documentation. Sample i has the seed
SEED + i.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import LanceError, RequestError
from ..files import read_bytes
from .row_files import Entry, read_entries
from .row_forms import Defaults, make_row
from .rows import BadRow, Row

SEED = 42
IMAGE = {"steps": 50, "shift": 3.5, "cfg": 4.0, "cfg_interval": [0.4, 1.0], "seed": SEED}
SQUARE = IMAGE | {"width": 768, "height": 768, "batch_size": 4}
VIDEO = IMAGE | {"width": 848, "height": 480, "num_frames": 50, "resolution": "video_480p", "batch_size": 5}
FLICKER_FILE = "temporal_flickering_prompts.json"
FLICKER_DIMENSION = "temporal_flickering"
FLICKER_SAMPLES = 25  # for VBench's temporal flickering, whose prompts are filtered for static ones


@dataclass(frozen=True)
class Layout:
    """One benchmark. rows: (entry, defaults, prompt file) -> its rows; a file's prompts that come twice are
    drawn once.
    """

    task: str
    options: Mapping[str, Any]
    rows: Callable[[Entry, Defaults, frozenset[str]], list[Row | BadRow]]


def read(name: str, path: Path, defaults: Defaults) -> list[Row | BadRow]:
    """The rows of a benchmark's prompt file. defaults: their options win over the benchmark's.

    Raises:
        RequestError: the file cannot be read, or the task is not the benchmark's.
    """
    layout = LAYOUTS[name]
    if defaults.task not in (None, layout.task):
        raise RequestError(f"layout {name} is of {layout.task}, and task {defaults.task} was asked for")
    entries = _text_files(path) if name == "dpg" and path.is_dir() else read_entries(path)
    options = dict(layout.options) | dict(defaults.options)
    defaults = replace(defaults, task=layout.task, options=options)
    flicker = _flicker_prompts(path) if name == "vbench" else frozenset()
    rows: dict[str, Row | BadRow] = {}
    for entry in entries:
        try:
            for row in layout.rows(entry, defaults, flicker):
                rows.setdefault(row.id, row)
        except (LanceError, KeyError, TypeError, AttributeError, ValueError) as error:
            told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            rows.setdefault(entry.id, BadRow(entry.number, entry.id, f"no row of {name}: {told[:200]}"))
    return [replace(row, number=number) for number, row in enumerate(rows.values())]


def _text_files(folder: Path) -> list[Entry]:
    """A folder of prompts, one a .txt file, as DPG-Bench has them."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise RequestError(f"{str(folder)[-200:]} has no .txt files in it; expected a prompt in each")
    found = []
    for number, file in enumerate(files):
        try:
            content: Any = {"prompt": read_bytes(file, 1 << 20).decode().strip()}
        except (OSError, ValueError) as error:
            content = RequestError(f"{file.name} cannot be read ({str(error)[:150]})")
        found.append(Entry(number, file.stem, content))
    return found


def _flicker_prompts(path: Path) -> frozenset[str]:
    """The prompts of VBench's temporal flickering: in a list beside the prompt file, as released."""
    beside = path.with_name(FLICKER_FILE)
    try:
        return frozenset(json.loads(read_bytes(beside, 1 << 20)))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"{beside} is no JSON list of prompts ({str(error)[:150]})") from None


def _object(entry: Entry) -> dict[str, Any]:
    if isinstance(entry.content, LanceError):
        raise entry.content
    return entry.content


def _geneval(entry: Entry, defaults: Defaults, _: frozenset[str]) -> list[Row | BadRow]:
    raw = _object(entry)
    own = raw.get("additional_info", raw)
    name = f"{int(raw.get('index', entry.number)):05d}"
    samples = int(defaults.options["batch_size"])
    return [
        make_row(
            Entry(entry.number, name, {"prompt": raw.get("data", raw.get("prompt"))}),
            defaults,
            files=[f"{name}/samples/{i}.png" for i in range(samples)],
            grid=f"{name}/grid.png",
            beside={f"{name}/metadata.jsonl": json.dumps(own, ensure_ascii=False) + "\n"},
        )
    ]


def _dpg(entry: Entry, defaults: Defaults, _: frozenset[str]) -> list[Row | BadRow]:
    raw = _object(entry)
    text = {"prompt": raw.get("data", raw.get("prompt"))}
    return [make_row(Entry(entry.number, entry.id, text), defaults, grid=f"{entry.id}.png")]


def _gedit(entry: Entry, defaults: Defaults, _: frozenset[str]) -> list[Row | BadRow]:
    raw = _object(entry)
    about = raw["additional_info"]
    name = f"fullset/{about['task_type']}/{about['instruction_language']}/{about['key']}.webp"
    return [make_row(Entry(entry.number, name, raw), defaults)]


def _vbench(entry: Entry, defaults: Defaults, flicker: frozenset[str]) -> list[Row | BadRow]:
    raw = _object(entry)
    named = raw.get("original_prompt_en") or raw.get("prompt_en") or raw.get("data")
    text = {"prompt": raw.get("data") or raw.get("prompt_en")}
    samples = int(defaults.options["batch_size"])
    if named in flicker or FLICKER_DIMENSION in raw.get("dimension", ()):
        samples = max(samples, FLICKER_SAMPLES)
    first = int(defaults.options["seed"])
    rows = []
    for i in range(samples):
        options = dict(defaults.options) | {"batch_size": 1, "seed": first + i}
        one = Entry(entry.number, f"{named}-{i}.mp4", text)
        rows.append(make_row(one, replace(defaults, options=options)))
    return rows


LAYOUTS = {
    "geneval": Layout("t2i", SQUARE, _geneval),
    "dpg": Layout("t2i", SQUARE, _dpg),
    "gedit": Layout("image_edit", IMAGE, _gedit),
    "vbench": Layout("t2v", VIDEO, _vbench),
}
