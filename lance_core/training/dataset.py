"""Any data set by its path, and what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import RequestError
from .folders import read_folder, read_lines
from .released_data import read_parquet, read_yaml
from .rows import DataSet

SHOWN_PROBLEMS = 5


def read(path: str | os.PathLike, task: str | None = None, question: str | None = None) -> DataSet:
    """The rows of a folder, a .jsonl, .parquet or .yaml file; see folders.py and released_data.py.

    Args:
        task: "i2v" for clips that start from their first frame; "x2t_image" or "x2t_video" to train captions
            as answers to `question`.

    Raises:
        RequestError: there is nothing to train on.
    """
    place = Path(path)
    try:
        if not place.exists():
            raise RequestError(f"{place} does not exist; name a folder, or a .jsonl, .parquet or .yaml file")
        if place.is_dir():
            tables = sorted(place.glob("*.parquet"))
            listing = sorted((*place.glob("*.yaml"), *place.glob("*.yml")))
            if len(listing) == 1:
                return read_yaml(listing[0], task, question)
            return read_parquet(tables, task, question) if tables else read_folder(place, task, question)
    except OSError as error:
        raise RequestError(f"{place} cannot be read ({error.strerror or error})") from None
    kind = place.suffix.lower()
    if kind == ".jsonl":
        return read_lines(place, task, question)
    if kind == ".parquet":
        return read_parquet([place], task, question)
    if kind in (".yaml", ".yml"):
        return read_yaml(place, task, question)
    raise RequestError(f"{place} is no data set; name a folder, or a .jsonl, .parquet or .yaml file")


def require(found: DataSet, where: str | os.PathLike, strict: bool = False) -> None:
    """Refuse a set without a usable row, and with `strict` one with a bad row.

    Raises:
        RequestError: names the first bad rows.
    """
    if found.rows and not (strict and found.problems):
        return
    listed = [f"{name}: {why}" for name, why in list(found.problems.items())[:SHOWN_PROBLEMS]]
    more = len(found.problems) - len(listed)
    tail = f" and {more} more" if more > 0 else ""
    what = "no row that can be trained on" if not found.rows else f"{len(found.problems)} bad rows"
    raise RequestError(f"{where} has {what} ({'; '.join(listed)[:300]}{tail})")
