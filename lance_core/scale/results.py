"""What a batch has written: a line a row in results.jsonl, and whether a row's result is there and right.

A line is written after its files are whole, so whatever kills a batch leaves either a result without a line,
which the next run adds, or no result, which it makes. A result is right when the row it was made from is the
row asked for now and its bytes are those that were written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RELEASED_SAMPLING
from ..errors import LanceError, RequestError
from ..files import lock, open_append, open_regular, read_bytes, written
from ..inputs.files import TEMPORARY
from .rows import Row

NAME = "results.jsonl"
MAX_RESULTS = 4 << 30  # bytes
# Of an output that takes nothing more: no row's fault, and the end of a run
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)

Line = dict[str, Any]


class StorageFullError(RequestError):
    """The output folder takes nothing more. A run ends with it; the next one goes on."""

    @classmethod
    def of(cls, folder: Path | str, error: BaseException) -> StorageFullError:
        """From whatever the system said."""
        told = getattr(error, "strerror", None) or str(error)
        return cls(
            f"{str(folder)[-200:]} takes nothing more ({told[:150]}); make room and run the same again: it "
            "goes on where it was"
        )


def storage_error(error: BaseException) -> BaseException | None:
    """The system's own error behind another, where it says that a disk is full, failing or read-only."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in STORAGE:  # an OSError, or FFmpeg's own
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


# -- what a row is -------------------------------------------------------------------------------------------


def digest_of(path: str | os.PathLike) -> str | None:
    """SHA-256 of a file, None where it cannot be read."""
    found = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while data := file.read(1 << 20):
                found.update(data)
    except (OSError, ValueError):
        return None
    return found.hexdigest()


def key_of(row: Row, known: dict[str, str | None] | None = None, made_by: str = "") -> str:
    """What makes a row's result right: task, prompt, options, checkpoint and the contents of its media.

    known: digests of media, filled here, where many rows share them. made_by: what else a result depends on.
    """
    known = {} if known is None else known
    for path in row.paths:
        if path not in known:
            known[path] = digest_of(path)
    asked: list[Any] = [row.task, row.prompt, row.options, [known[path] for path in row.paths], row.targets]
    asked.append(Path(row.checkpoint).name if row.checkpoint else None)
    asked += [made_by] if made_by else []
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def line_of(
    row_id: str, task: str | None = None, key: str | None = None, *, error: str | None = None, **made: Any
) -> Line:
    """A line of results.jsonl. file, seed, seconds and error are always in it."""
    base = {"id": row_id, "task": task, "file": None, "seed": None, "seconds": None, "error": error}
    return base | {"row": key} | made


# -- the file ------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """results.jsonl of an output folder. Several batches may write into one, each row being one's."""

    folder: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / NAME

    def read(self) -> dict[str, Line]:
        """The last whole line of each row, by id. What was cut off or is no line of ours is left out."""
        try:
            data = read_bytes(self.path, MAX_RESULTS)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RequestError(f"{self.path} cannot be read ({error.strerror or error})") from None
        lines: dict[str, Line] = {}
        for part in data.split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(part)
                if isinstance(line, dict) and isinstance(line.get("id"), str):
                    lines.pop(line["id"], None)
                    lines[line["id"]] = line
        return lines

    def append(self, line: Line) -> None:
        """Add a line, and have it on the disk.

        Raises:
            StorageFullError: the disk takes nothing more.
        """
        with self._writing():
            broken = self.path.exists() and self.path.stat().st_size and not self._ends_whole()
            with open_append(self.path) as file:
                file.write((b"\n" if broken else b"") + json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def rewrite(self, without: set[str]) -> None:
        """Keep one line a row, and none of these rows."""
        with self._writing():
            lines = self.read()
            if not lines and not self.path.exists():
                return
            with written(self.path) as file:
                for row_id, line in lines.items():
                    if row_id not in without:
                        file.write(json.dumps(line).encode() + b"\n")

    def _ends_whole(self) -> bool:
        with open_regular(self.path) as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time."""
        try:
            with _held(self.folder / ".results.lock", 60):
                yield
        except OSError as error:
            raise StorageFullError.of(self.folder, error) from error

    @contextlib.contextmanager
    def claimed(self, shard: str) -> Iterator[None]:
        """This folder and shard for one run; the claim ends with the process, however that ends.

        What a killed run left half written is removed.

        Raises:
            RequestError: another run has it, or the folder cannot be written.
        """
        name = f".batch{'-' + shard if shard else ''}.lock"
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_held(self.folder / name, 0))
            except BlockingIOError:
                raise RequestError(
                    f"another batch is writing into {self.folder}; wait for it, stop it, or use another -o"
                ) from None
            except (OSError, ValueError) as error:
                told = getattr(error, "strerror", None) or error
                raise RequestError(
                    f"{str(self.folder)[-200:]} cannot be written ({told}); name another folder with -o"
                ) from None
            self._sweep()
            yield

    def _sweep(self) -> None:
        for left in self.folder.rglob(".*-*.part"):
            if TEMPORARY.fullmatch(left.name) and not _alive(int(left.name[1:].partition("-")[0])):
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(path: Path, seconds: float) -> Iterator[None]:
    """The system's lock on a file, waited for so long.

    Raises:
        BlockingIOError: another has it.
    """
    with open_append(path) as file:
        until = time.monotonic() + seconds
        while lock(file) is False:
            if time.monotonic() >= until:
                raise BlockingIOError(errno.EAGAIN, "it is in use", str(path))
            time.sleep(0.02)
        yield


def _alive(process: int) -> bool:
    """Whether a process may still be there; where that cannot be asked, it may."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


# -- done or not ---------------------------------------------------------------------------------------------


def finished(row: Row, line: Mapping[str, Any] | None, folder: Path, key: str) -> bool:
    """Whether a row's results are all there and right, by its line."""
    if line is None or line.get("error") is not None or line.get("row") != key:
        return False
    digests = line.get("sha256")
    if not isinstance(digests, list) or len(digests) != len(row.targets):
        return False
    names = (*row.targets, *row.beside)
    if not all((folder / name).is_file() for name in names):
        return False
    return all(digest_of(folder / name) == one for name, one in zip(row.targets, digests, strict=True))


def found(row: Row, folder: Path, key: str) -> Line | None:
    """The line of a row whose results are there and whole, but whose run ended before it wrote the line."""
    from ..inputs import media

    texts = [folder / name for name in row.beside]
    if not all((folder / name).is_file() for name in row.targets) or not all(t.is_file() for t in texts):
        return None
    about: dict[str, Any] = {}
    for name in row.targets:
        path = folder / name
        try:
            if row.kind.output == "text":
                about = json.loads(read_bytes(path, MAX_RESULTS))
            else:
                about = media.read_metadata(path) or {}
                _decode(path, row.kind.output == "video")
        except (LanceError, OSError, ValueError):
            return None
        if not isinstance(about, dict) or about.get("row") != key or about.get("id") != row.id:
            return None
    return made_line(row, key, folder, about)


def _decode(path: Path, video: bool) -> None:
    """Every pixel of a result, so that a cut or damaged one shows."""
    from ..inputs import media

    if video:
        media.read_clip(path, pick=lambda total, _: list(range(total)))
    else:
        media.load_image(path)


def place(folder: Path, name: str) -> Path:
    """Where a result goes; its folder is made."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def default_seed(row: Row) -> int:
    """The seed of a row that names none."""
    return 0 if row.kind.output == "text" else RELEASED_SAMPLING.seed


def made_line(
    row: Row, key: str, folder: Path, about: Mapping[str, Any], seconds: float | None = None
) -> Line:
    """The line of a row whose results are written. about: the metadata in them."""
    names = row.targets
    line = line_of(row.id, row.task, key, file=names[0], seed=row.options.get("seed", default_seed(row)))
    line |= {"seconds": seconds, "sha256": [digest_of(folder / name) for name in names]}
    if len(names) > 1:
        line["files"] = names
    if "text" in about:
        line["text"] = about["text"]
    return line
