"""The released trainer's data: parquet files with media as bytes, and the YAML files that list them.

Needs pyarrow, and PyYAML for YAML files: `pip install 'comfyui-lance[training]'`. Of a YAML, groups, their
files, their kind and `task_type` count; sizes and weights are given on our command line, so they do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files import read_bytes
from .rows import Cell, DataSet, made
from .tables import EXTRA, parquet

MAX_YAML = 1 << 20
IGNORED = ("weight", "is_mandatory", "debug_parquet_repeat", "video_transform_args", "task_type_rate")
# media column -> (other columns, whether it is a clip)
TARGETS = {
    "output_image_bytes": ("input_image_bytes", False),
    "output_video_bytes": ("input_video_bytes", True),
    "image_bytes": (None, False),
    "video_bytes": (None, True),
}


def read_parquet(paths: list[Path], task: str | None = None, question: str | None = None) -> DataSet:
    """The rows of parquet files, by their columns: image_bytes, video_bytes, input_*_bytes, output_*_bytes,
    caption, caption_i, caption_q, caption_a. task, question: see `rows.made`.

    Raises:
        RequestError: pyarrow is missing, a file cannot be read, or has none of these columns.
    """
    found = DataSet("parquet of the released trainer")
    for path in paths:
        try:
            file = parquet().ParquetFile(path)
            for group in range(file.num_row_groups):
                _read_group(found, file, path, group, task, question)
        except (OSError, ValueError) as error:  # pyarrow's errors are of these
            raise RequestError(f"{path} cannot be read as parquet ({str(error)[:150]})") from None
    return found


def _read_group(
    found: DataSet, file: Any, path: Path, group: int, task: str | None, question: str | None
) -> None:
    """Add a row group's rows; of media only whether they are there is looked at."""
    names = file.schema_arrow.names
    target = next((n for n in TARGETS if n in names), None)
    listed = sorted(n for n in names if n.startswith("output_") and n.endswith("_bytes"))
    if target is None and not listed:
        raise RequestError(
            f"{path} has the columns {', '.join(names)[:150]}; expected one of {', '.join(TARGETS)}"
        )
    target = target or listed[0]
    video = "video" in target
    source = next(
        (n for n in sorted(names) if n.startswith("input_") and n.endswith("_bytes")),
        None,
    )
    texts = [n for n in ("caption", "caption_i", "caption_q", "caption_a") if n in names]
    columns = file.read_row_group(group, columns=[*texts, target, *([source] if source else [])])
    told = {n: columns.column(n).to_pylist() for n in texts}
    there = {n: columns.column(n) for n in ([target, source] if source else [target])}
    for row in range(columns.num_rows):
        name = f"{path.name} row {len(found.rows) + len(found.problems) + 1}"
        try:
            if any(not isinstance(column[row].as_py(), bytes) for column in there.values()):
                raise RequestError("its media are no bytes; the files themselves belong into the table")
            values: dict[str, Any] = {"media": Cell(path, group, row, target, video)}
            if source:
                values["sources"] = [Cell(path, group, row, source, video)]
            if "caption_a" in told:
                answer, system = told["caption_a"][row], told.get("caption_i", {row: None})[row]
                values |= {"answer": answer or "", "system": system or None}
                values["text"] = told.get("caption_q", {row: ""})[row] or ""
            else:
                values["text"] = told.get("caption", {row: ""})[row]
            found.rows.append(made(name, values, task=task, question=question))
        except RequestError as error:
            found.problems[name] = str(error)


def read_yaml(path: Path, task: str | None = None, question: str | None = None) -> DataSet:
    """The rows of all groups of a YAML file; its paths count from its folder or the working directory.

    Raises:
        RequestError: PyYAML or pyarrow is missing, or it lists no parquet file.
    """
    try:
        import yaml
    except ImportError as error:
        raise RequestError(f"YAML files need PyYAML ({error}): {EXTRA}") from None
    try:
        raw = yaml.safe_load(read_bytes(path, MAX_YAML))
    except (OSError, yaml.YAMLError) as error:
        raise RequestError(f"{path} cannot be read as YAML ({str(error)[:150]})") from None
    found = DataSet("YAML of the released trainer")
    ignored: set[str] = set()
    for group in _groups(raw, path):
        wanted = group.get("task_type")
        first = wanted[0] if isinstance(wanted, list) and wanted else wanted
        chosen = "i2v" if first in ("ff2v", "flf2v") else task
        part = read_parquet(list(_listed(group, path)), chosen, question)
        found.rows += part.rows
        found.problems |= part.problems
        ignored |= {key for key in IGNORED if key in group}
    if ignored:
        found.notes.append(
            f"not taken from {path.name}: {', '.join(sorted(ignored))} (every row counts once an epoch; "
            "--resolution gives sizes)"
        )
    return found


def _groups(raw: Any, path: Path) -> Iterator[dict[str, Any]]:
    groups = raw.values() if isinstance(raw, dict) else ()
    entries = [e for g in groups if isinstance(g, dict) for e in g.values() if isinstance(e, dict)]
    if not entries:
        raise RequestError(
            f"{path} has no groups; expected D1: x2v_interleave_local or x2t_interleave_local: ..."
        )
    yield from entries


def _listed(group: dict[str, Any], path: Path) -> Iterator[Path]:
    """A group's parquet files."""
    sets = group.get("dataset_names")
    listed = [d for s in (sets.values() if isinstance(sets, dict) else ()) for d in _as_list(s)]
    if not listed:
        raise RequestError(f"{path} has a group without dataset_names: NAME: data_dir: [...]")
    for entry in listed:
        for folder in (path.parent, path.parent.parent, Path()):
            place = folder / str(entry)
            if place.exists():
                yield from sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
                break
        else:
            raise RequestError(f"{path} lists {str(entry)[:150]}, which is missing")


def _as_list(entry: Any) -> list[Any]:
    given = entry.get("data_dir") if isinstance(entry, dict) else None
    return given if isinstance(given, list) else [] if given is None else [given]
