"""A result's settings as JSON inside its file, and the formats that results are saved in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .files import name_of

KEY = "lance"
EXIF_DESCRIPTION = 0x010E
MAX_EXIF = 60_000  # characters; a JPEG segment has 65,533 bytes


def known_format(path: Path, known: Mapping[str, str], what: str) -> str:
    """The format that a path's extension asks for.

    Raises:
        RequestError: none of the known.
    """
    kind = known.get(path.suffix.lower())
    if kind is None:
        raise RequestError(
            f"{name_of(path)} has extension {path.suffix[:20]!r}; a {what} can be saved as "
            f"{', '.join(known)}."
        )
    return kind


def to_json(metadata: Mapping[str, Any] | None) -> str | None:
    """Settings as JSON.

    Raises:
        RequestError: they hold something else than strings, finite numbers, lists and objects.
    """
    if metadata is None:
        return None
    try:
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"metadata cannot be written as JSON ({str(error)[:150]}); expected strings, finite numbers, "
            "lists, objects."
        ) from error


def from_json(text: Any) -> dict[str, Any] | None:
    """The JSON object in a text, or None."""
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def wrap(text: str) -> str:
    """Our JSON under our name, for fields that other programs write too."""
    return f'{{"{KEY}": {text}}}'


def unwrap(text: Any) -> dict[str, Any] | None:
    """What `wrap` wrapped, or None."""
    inner = (from_json(text) or {}).get(KEY)
    return inner if isinstance(inner, dict) else None
