"""Values read from files of unknown origin: right, or refused by name before anything is built from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checks import shown
from .errors import CheckpointError
from .files import read_bytes

Shapes = Mapping[str, tuple[int, ...]]

MAX_JSON = 256 << 20  # bytes of a JSON file; the largest, a tokeniser's, has 7 MB
MAX_SIDE = 1 << 20  # of a matrix; the released ones stay below 152,000
MAX_LAYERS = 1024  # built from tensor names, so they are counted before anything is built


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: the file is missing, no regular file, larger than MAX_JSON, not JSON, or no object.
    """
    try:
        data = json.loads(read_bytes(path, MAX_JSON).decode("utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; a Lance checkpoint folder holds one. Download it again."
        ) from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({str(error)[:200]}); download it again."
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(data).__name__}, expected an object; download it again."
        )
    return data


def shape(shapes: Shapes, key: str, where: str, dims: int) -> tuple[int, ...]:
    """The shape of tensor `key`, which must exist and have `dims` dimensions."""
    found = shapes.get(key)
    if found is None:
        raise CheckpointError(f"{where} has no tensor {key}: it is not of the expected model, or incomplete.")
    if len(found) != dims or min(found) < 1 or max(found) > MAX_SIDE:
        raise CheckpointError(
            f"{where}: {key} has shape {list(found)}, expected {dims} positive dimensions of at most "
            f"{MAX_SIDE}."
        )
    return tuple(found)


def matrix(shapes: Shapes, key: str, where: str) -> tuple[int, ...]:
    """(rows, columns) of a tensor of two dimensions."""
    return shape(shapes, key, where, 2)


def vector(shapes: Shapes, key: str, where: str) -> int:
    """Length of a tensor of one dimension."""
    return shape(shapes, key, where, 1)[0]


def numbered(shapes: Shapes, prefix: str, where: str) -> int:
    """Counts the layers PREFIX0, PREFIX1, … from tensor names. Raises on gaps and above MAX_LAYERS, so that
    a crafted name cannot cause a huge allocation.

    Raises:
        CheckpointError: a number is missing, or there are too many.
    """
    found = {k[len(prefix) :].split(".")[0] for k in shapes if k.startswith(prefix)}
    if len(found) > MAX_LAYERS:
        raise CheckpointError(
            f"{where}: the tensors of {prefix}* are of {len(found)} layers, more than {MAX_LAYERS}: it is of "
            "another model."
        )
    if found != {str(i) for i in range(len(found))}:
        raise CheckpointError(
            f"{where}: the tensors of {prefix}* are not numbered 0 to {len(found) - 1}: some are missing. "
            "Download it again."
        )
    return len(found)


def positive(raw: Mapping[str, Any], key: str, where: str, most: int = MAX_SIDE) -> int:
    """Integer `key` of a configuration, from 1 to `most`."""
    value = raw.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(
            f"{where}: {key} is {shown(value)}, expected a positive integer of at most {most}."
        )
    return value


def number(raw: Mapping[str, Any], key: str, where: str, least: float = 0.0, most: float = math.inf) -> float:
    """Number `key` of a configuration: positive, finite, and from `least` to `most`."""
    value = raw.get(key)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (0 < value < math.inf and least <= value <= most)
    ):
        raise CheckpointError(
            f"{where}: {key} is {shown(value)}, expected a positive number from {least:g} to {most:g}."
        )
    return value
