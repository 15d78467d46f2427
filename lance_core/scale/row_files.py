"""The rows of a batch file as it has them: JSON or JSONL, in the released code's forms or ours.

Forms: the released code's `{file name: prompt}` and `{id: {interleave_array, element_dtype_array,
istarget_in_interleave}}`, its `{"index", "data"}` lines, and ours, an object a request.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import shown
from ..errors import LanceError, RequestError
from ..files import read_bytes
from .rows import OURS

MAX_FILE = 1 << 30  # bytes


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


def read_entries(path: str | os.PathLike) -> list[Entry]:
    """The rows of a JSON or JSONL file, in its order.

    Raises:
        RequestError: it cannot be read, is neither, or holds no row.
    """
    path = Path(path)
    try:
        # A byte that is no UTF-8 is the fault of the row that has it, which then holds half a character
        text = read_bytes(path, MAX_FILE).decode("utf-8-sig", "surrogateescape")
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
