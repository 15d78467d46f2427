"""What every reader and writer shares: opening what was given, telling formats apart by content, errors, and
files that appear whole or not at all.
"""

from __future__ import annotations

import io
import os
import re
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import LanceError, MediaError
from . import limits

TEMPORARY = re.compile(r"\.\d+-[0-9a-f]{32}\.part")  # names that `replacing` gives
HEAD_BYTES = 64  # enough for every signature below
SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"qoif", "QOI"),
    *((f"P{n}{end}".encode(), "PPM") for n in range(1, 7) for end in "\n \t\r"),
)
AVIF_BRANDS = {b"avif", b"avis"}
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
READABLE = "PNG, JPEG, WebP, GIF, AVIF, TIFF, BMP, ... or MP4, MOV, MKV, WebM, AVI, ..."

T = TypeVar("T")


def name_of(source: Any) -> str:
    """What to call a source in a message: the end of its path, or "the file given"."""
    if not isinstance(source, str | os.PathLike):
        return "the file given"
    name = os.fsdecode(source)
    return name if len(name) <= 160 else f"...{name[-157:]}"


def refused(message: str) -> MediaError:
    """A MediaError whose message is short enough to be read."""
    return MediaError(
        message if len(message) <= limits.MAX_MESSAGE else f"{message[: limits.MAX_MESSAGE - 3]}..."
    )


def damaged(name: str, error: BaseException) -> MediaError:
    """The MediaError for whatever a decoder raised."""
    if isinstance(error, MemoryError):
        return refused(f"{name} takes more memory than there is; scale it down or shorten it.")
    told = " ".join(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}".split())
    if "truncated" in told.lower() or isinstance(error, EOFError):
        return early_end(name)
    return refused(
        f"{name} cannot be read ({told[:150]}); expected a whole {READABLE} file. Open it in a viewer, and "
        "save or download it again."
    )


def early_end(name: str) -> MediaError:
    """The MediaError for a file that stops before its last pixel."""
    return refused(
        f"{name} cannot be read: the file ends early, and a whole one is expected. It was cut while it was "
        "copied or downloaded; get it again."
    )


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Around one call of a decoder: whatever a damaged file makes it raise becomes a MediaError."""
    try:
        yield
    except LanceError:
        raise
    except Exception as error:
        raise damaged(name, error) from error


def decoded(items: Iterable[T], name: str) -> Iterator[T]:
    """The items of a decoder, with `decoding` around each step and around nothing else."""
    steps = iter(items)
    while True:
        with decoding(name):
            try:
                item = next(steps)
            except StopIteration:
                return
        yield item


@contextmanager
def opened(source: Any, what: str) -> Iterator[BinaryIO]:
    """A source as a binary file at its start; a path is closed again.

    Args:
        source: a path, bytes, or a binary file that can seek.
        what: what was expected, for the message.

    Raises:
        MediaError: missing, unreadable, empty, or a folder, pipe or device (nothing here waits for one).
    """
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    if hasattr(source, "read"):
        with decoding("the file given"):
            source.seek(0)
            empty = source.read(1)
            source.seek(0)
        if not isinstance(empty, bytes):
            raise MediaError("a file opened as text came; open it as binary ('rb').")
        if not empty:
            raise MediaError(f"the file given is empty; expected {what}.")
        yield source
        return
    if not isinstance(source, str | os.PathLike):
        raise MediaError(
            f"a {type(source).__name__} came; expected a path, a binary file, an array or PIL pictures "
            f"({what})."
        )
    with _open_regular(source, what) as file:
        yield file


def _open_regular(source: str | os.PathLike[str], what: str) -> BinaryIO:
    name = name_of(source)
    try:
        _require_regular(os.stat(source), name, what)
        # Without waiting, in case a pipe has taken the file's place since
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(source, flags), "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise refused(f"{name} does not exist or is no file; expected {what}. Check the path.") from error
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise refused(f"{name} cannot be opened ({told}); check the path and its permissions.") from error
    try:
        _require_regular(os.fstat(file.fileno()), name, what)
    except BaseException:
        file.close()
        raise
    return file


def _require_regular(status: os.stat_result, name: str, what: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        raise refused(f"{name} does not exist or is no file: it is {kind}; expected {what}. Check the path.")
    if status.st_size == 0:
        raise refused(f"{name} is empty (0 bytes); expected {what}.")


def picture_format(file: BinaryIO) -> str | None:
    """The format of a picture file by its first bytes, as Pillow names it, "HEIC", or None for anything
    else. The file is left at its start.
    """
    head = file.read(HEAD_BYTES)
    file.seek(0)
    for signature, kind in SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        size = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[i : i + 4] for i in (8, *range(16, size - 3, 4))}
        if brands & AVIF_BRANDS:
            return "AVIF"
        if head[8:12] in HEIC_BRANDS:
            return "HEIC"
    return None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when all went well and is gone otherwise.

    Its name is unlike any other's, so that several processes may write one path: the last one wins, whole.
    What a process that was killed left in the folder goes after `limits.STALE_SECONDS`.

    Raises:
        MediaError: the file cannot be written.
    """
    _clean(path.absolute().parent)
    temporary = path.absolute().with_name(f".{os.getpid()}-{uuid.uuid4().hex}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise refused(
            f"{name_of(path)} cannot be written ({str(told)[:150]}); check that its folder exists and has "
            "space."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _clean(folder: Path) -> None:
    oldest = time.time() - limits.STALE_SECONDS
    for left in folder.glob(".*-*.part"):
        with suppress(OSError):  # another process may be cleaning too
            if TEMPORARY.fullmatch(left.name) and left.lstat().st_mtime < oldest:
                left.unlink()
