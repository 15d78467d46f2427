"""Data sets from one form to another: captioned folder, JSON lines, or the released trainer's parquet."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files import written
from .dataset import read, require
from .folders import EDITED
from .rows import Cell, Media, Row, source_of
from .tables import parquet

FORMS = ("folder", "jsonl", "parquet")
TABLE_ROWS = 64  # of a row group: as many media are in memory at once


def convert(
    path: str | os.PathLike, target: str | os.PathLike, form: str, task: str | None = None
) -> dict[str, Any]:
    """Write a data set in another form into the new folder `target`, media copied.

    Args:
        form: "folder" (media with .txt; edits as name and name_edit), "jsonl" (media and dataset.jsonl), or
            "parquet" (a file for each of the released kinds).

    Returns: form, rows, folder, problems (rows that were left out).

    Raises:
        RequestError: nothing to convert, a form the rows do not fit, or a target that cannot be written.
    """
    found, folder = read(path, task), Path(target)
    require(found, path)
    writer = {"folder": _folder, "jsonl": _lines, "parquet": _tables}.get(form)
    if writer is None:
        raise RequestError(f"form {form!r} is unknown; expected one of {', '.join(FORMS)}")
    if form == "parquet":
        parquet()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"{folder} is there already; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        writer(found.rows, folder)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written ({error.strerror or error})") from None
    told = {"form": form, "rows": len(found.rows), "folder": str(folder)}
    return told | {"problems": found.problems, "notes": found.notes}


def _folder(rows: list[Row], folder: Path) -> None:
    unfit = [r.name for r in rows if r.answer or r.kind.takes == "references"]
    if unfit:
        raise RequestError(
            f"{len(unfit)} rows have answers or references, such as {unfit[0]}, which a captioned folder "
            "cannot hold; convert to jsonl"
        )
    for stem, row in _numbered(rows):
        place = folder if row.repeats == 1 else folder / f"{row.repeats}_rows"
        place.mkdir(exist_ok=True)
        if row.sources:
            _copy(row.sources[0], place / stem)
            stem += EDITED
        copied = _copy(row.media, place / stem)
        copied.with_suffix(".txt").write_text(f"{row.text}\n", encoding="utf-8")


def _lines(rows: list[Row], folder: Path) -> None:
    lines = []
    for stem, row in _numbered(rows):
        value: dict[str, Any] = {}
        sources = [_copy(one, folder / f"{stem}_{i}").name for i, one in enumerate(row.sources)]
        if sources:
            value["references" if row.kind.takes == "references" else "source"] = sources
        value["media"] = _copy(row.media, folder / stem).name
        value["question" if row.answer else "caption"] = row.text
        value |= {"answer": row.answer} if row.answer else {}
        value |= {"system": row.system} if row.system is not None else {}
        value |= {"repeats": row.repeats} if row.repeats > 1 else {}
        value |= {"task": "i2v"} if row.task == "i2v" else {}
        lines.append(json.dumps(value, ensure_ascii=False))
    with written(folder / "dataset.jsonl") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


RELEASED_COLUMNS = {
    "t2i": ("image_bytes", None),
    "t2v": ("video_bytes", None),
    "i2v": ("video_bytes", None),
    "image_edit": ("output_image_bytes", "input_image_bytes"),
    "video_edit": ("output_video_bytes", "input_video_bytes"),
    "x2t_image": ("image_bytes", None),
    "x2t_video": ("video_bytes", None),
}


def _tables(rows: list[Row], folder: Path) -> None:
    import pyarrow

    unfit = [r.name for r in rows if r.task not in RELEASED_COLUMNS]
    if unfit:
        raise RequestError(
            f"{len(unfit)} rows have references, such as {unfit[0]}, which parquet has no form for; convert "
            "to jsonl"
        )
    for task, (target, source) in RELEASED_COLUMNS.items():
        chosen = [r for r in rows if r.task == task for _ in range(r.repeats)]
        if not chosen:
            continue
        texts = ["caption_i", "caption_q", "caption_a"] if task.startswith("x2t") else ["caption"]
        fields = [(name, pyarrow.string()) for name in texts]
        fields += [(name, pyarrow.binary()) for name in (target, source) if name]
        schema = pyarrow.schema(fields)
        with parquet().ParquetWriter(folder / f"{task}.parquet", schema) as writer:
            for start in range(0, len(chosen), TABLE_ROWS):
                part = [_released(row, target, source) for row in chosen[start : start + TABLE_ROWS]]
                writer.write_table(pyarrow.Table.from_pylist(part, schema=schema))


def _released(row: Row, target: str, source: str | None) -> dict[str, Any]:
    value: dict[str, Any] = {target: _bytes(row.media)}
    if source:
        value[source] = _bytes(row.sources[0])
    if row.answer:
        system = row.kind.default_system_prompt if row.system is None else row.system
        return value | {"caption_i": system, "caption_q": row.text, "caption_a": row.answer}
    return value | {"caption": row.text}


def _bytes(media: Media) -> bytes:
    source = source_of(media)
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """A stem for each row that no other has."""
    for number, row in enumerate(rows, 1):
        own = "" if isinstance(row.media, Cell) else f"_{row.media.stem.removesuffix(EDITED)}"
        yield f"{number:05d}{own}", row


def _copy(media: Media, stem: Path) -> Path:
    """A copy of a picture or clip under a stem, its ending kept."""
    if isinstance(media, Cell):
        data = media.read()
        place = stem.with_name(stem.name + _ending(data, media.is_video))
        place.write_bytes(data)
        return place
    place = stem.with_name(stem.name + media.suffix.lower())
    shutil.copyfile(media, place)
    return place


def _ending(data: bytes, video: bool) -> str:
    """Of a file that is known by its bytes alone."""
    if video:
        return ".webm" if data[:4] == b"\x1a\x45\xdf\xa3" else ".mp4"
    if data[:3] == b"\xff\xd8\xff":
        return ".jpg"
    return ".webp" if data[8:12] == b"WEBP" else ".png"
