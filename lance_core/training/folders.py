"""Data sets as folders: media with .txt captions, pairs for edits, folders of both, and JSON lines.

A folder may have subfolders `N_name`, whose rows count N times an epoch, as other trainers and ComfyUI have
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files import read_bytes
from .rows import DataSet, Row, is_media, made

EDITED = "_edit"  # ending of an edited picture's stem: name.png, name_edit.png
PAIRS = (("source", "target"), ("input", "output"), ("before", "after"), ("control", "target"))
MAX_CAPTION = 1 << 20  # bytes of a caption file
MAX_LINES = 1 << 30  # bytes of a JSON lines file
MAX_REPEATS = 10_000
KEYS = {
    "media": ("media", "target", "image", "video", "file_name", "output"),
    "sources": ("source", "sources", "input", "control"),
    "references": ("references", "reference"),
    "text": ("caption", "text", "prompt", "instruction", "question"),
    "answer": ("answer",),
    "system": ("system", "system_prompt"),
    "repeats": ("repeats",),
}


def read_folder(folder: Path, task: str | None = None, question: str | None = None) -> DataSet:
    """A folder's rows; which form it has is found out. task, question: see `rows.made`.

    Raises:
        RequestError: nothing to train on is in it.
    """
    lines = sorted(folder.glob("*.jsonl"))
    if len(lines) == 1:
        return read_lines(lines[0], task, question)
    if len(lines) > 1:
        raise RequestError(
            f"{folder} holds {len(lines)} .jsonl files, and which one is meant is unclear; name the file"
        )
    names = {p.name.lower(): p for p in folder.iterdir() if p.is_dir()}
    for before, after in PAIRS:
        if before in names and after in names:
            return _pair_folders(names[before], names[after], task, question)
    return _captioned(folder, task, question)


def _captioned(folder: Path, task: str | None, question: str | None) -> DataSet:
    """Media with captions beside them, in the folder and its subfolders; edits by their names."""
    found = DataSet("folder of pictures or clips with .txt captions")
    for path, repeats in _media_in(folder):
        name = path.relative_to(folder).as_posix()
        edited = _sibling(path, path.stem + EDITED)
        if edited is not None:
            continue  # the source of a pair, which has a row of its own
        source = _sibling(path, path.stem.removesuffix(EDITED)) if path.stem.endswith(EDITED) else None
        values: dict[str, Any] = {"media": path, "repeats": repeats}
        try:
            values["text"] = _caption(path)
            if source is not None:
                values |= {"sources": [source], "text": values["text"] or _caption(source)}
            row = made(name, values, task=task, question=question)
        except RequestError as error:
            found.problems[name] = _with_hint(str(error), path)
        else:
            found.rows.append(row)
    if not found.rows and not found.problems:
        raise RequestError(
            f"{folder} holds no pictures or clips; expected files such as name.png or name.mp4 with "
            "name.txt beside them, pairs name.png and name_edit.png, or a .jsonl file"
        )
    return found


def _pair_folders(before: Path, after: Path, task: str | None, question: str | None) -> DataSet:
    """Edits whose sources and targets lie in two folders under the same names."""
    found = DataSet(f"pairs in {before.name}/ and {after.name}/")
    for path, repeats in _media_in(after):
        name = path.relative_to(after).as_posix()
        source = _sibling(before / path.relative_to(after), path.stem)
        try:
            if source is None:
                raise RequestError(f"no {path.stem}.* in {before.name}/")
            values = {"media": path, "sources": [source], "repeats": repeats}
            values["text"] = _caption(path) or _caption(source)
            found.rows.append(made(name, values, task=task, question=question))
        except RequestError as error:
            found.problems[name] = _with_hint(str(error), path)
    if not found.rows and not found.problems:
        raise RequestError(f"{after} holds no pictures or clips")
    return found


def _media_in(folder: Path) -> Iterator[tuple[Path, int]]:
    """Media below a folder, sorted, and their repeats. Hidden files and folders are left out."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or not is_media(path) or not path.is_file():
            continue
        first = parts[0].split("_")[0] if len(parts) > 1 else "1"
        repeats = int(first) if first.isdecimal() and len(first) <= 5 else 1
        yield path, min(max(repeats, 1), MAX_REPEATS)


def _sibling(path: Path, stem: str) -> Path | None:
    """The picture or clip of that stem in a file's folder, whatever its ending."""
    same = path.with_name(stem + path.suffix)
    if same.is_file():
        return same
    others = sorted(p for p in path.parent.glob(f"{_escaped(stem)}.*") if p.stem == stem and is_media(p))
    return others[0] if others else None


def _escaped(stem: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)


def _caption(path: Path) -> str:
    """The text beside a file; empty where there is none.

    Raises:
        RequestError: it is no UTF-8 text.
    """
    beside = path.with_suffix(".txt")
    try:
        return read_bytes(beside, MAX_CAPTION).decode("utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{beside.name} cannot be read as UTF-8 text ({str(error)[:80]})") from None


def _with_hint(problem: str, path: Path) -> str:
    if problem != "no caption":
        return problem
    beside = path.with_suffix(".txt")
    return f"no caption: {beside.name} is {'empty' if beside.is_file() else 'missing'}"


def read_lines(path: Path, task: str | None = None, question: str | None = None) -> DataSet:
    """A file of JSON lines, one row each; paths in it count from its folder.

        {"image": "a.png", "caption": "..."}               or "video", or "file_name" and "text"
        {"source": "a.png", "target": "b.png", "instruction": "..."}
        {"references": ["a.png"], "image": "b.png", "caption": "..."}
        {"image": "a.png", "question": "...", "answer": "..."}

    Raises:
        RequestError: it cannot be read, or holds no row.
    """
    try:
        text = read_bytes(path, MAX_LINES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as UTF-8 text ({str(error)[:120]})") from None
    found = DataSet("JSON lines")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name = f"line {number}"
        try:
            found.rows.append(_line(name, line, path.parent, task, question))
        except RequestError as error:
            found.problems[name] = str(error)
    if not found.rows and not found.problems:
        raise RequestError(f"{path} is empty; expected a JSON object a line")
    return found


def _line(name: str, line: str, folder: Path, task: str | None, question: str | None) -> Row:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"no JSON ({str(error)[:80]})") from None
    if not isinstance(raw, dict):
        raise RequestError(f"a JSON {type(raw).__name__}, expected an object")
    values: dict[str, Any] = {}
    for part, keys in KEYS.items():
        given = next((raw[k] for k in keys if raw.get(k) is not None), None)
        if part == "media":
            values[part] = None if given is None else _file(given, folder)
        elif part in ("sources", "references"):
            listed = given if isinstance(given, list) else [] if given is None else [given]
            values[part] = [_file(one, folder) for one in listed]
        elif part == "repeats":
            values[part] = given if type(given) is int and 1 <= given <= MAX_REPEATS else 1
        else:
            values[part] = _text(part, given)
    return made(name, values, task=raw.get("task") or task, question=question)


def _text(part: str, given: Any) -> str | None:
    if given is not None and not isinstance(given, str):
        raise RequestError(f"its {part} is a JSON {type(given).__name__}, expected text")
    return given


def _file(given: Any, folder: Path) -> Path:
    if not isinstance(given, str) or "\0" in given:
        raise RequestError("a path that is no text")
    path = folder / given
    if not is_media(path):
        raise RequestError(f"{given} has no picture's or clip's ending")
    if not path.is_file():
        raise RequestError(f"{given} is missing")
    return path
