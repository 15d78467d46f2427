"""Opening and writing files that others may have prepared: regular files only, and nothing half written.

A FIFO or a device among the models would block whoever opens it; a symlink in the place of a part file would
have its target written to. A file that is written has a name of its own until it is whole, and a lock that
ends with its process, so the next run can tell what a killed one left behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # ending of a file that is being written
OLD = 24 * 3600  # seconds after which a part without a lock is nobody's, where the disk knows no locks
_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_CAREFUL = _FLAGS | getattr(os, "O_NONBLOCK", 0)  # opening a FIFO does not wait for its other end


class NotRegular(OSError):
    """A FIFO, a device, a socket, a folder or (for writing) a symlink where a regular file was expected."""


def kind_of(mode: int) -> str:
    """What a file's mode says it is, in words."""
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    kinds |= {stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symlink"}
    return kinds.get(stat.S_IFMT(mode), "a file" if stat.S_ISREG(mode) else "no regular file")


def open_regular(path: str | os.PathLike, buffering: int = -1) -> BinaryIO:
    """Open a regular file (or a symlink to one) for reading bytes; never blocks on what is none.

    Raises:
        NotRegular: it is something else.
        OSError: it is missing or cannot be read.
    """
    mode = os.stat(path).st_mode  # opening a device can already do something: look first
    if not stat.S_ISREG(mode):
        raise NotRegular(errno.EINVAL, f"it is {kind_of(mode)}, expected a regular file")
    return _checked(os.open(path, os.O_RDONLY | _CAREFUL), "rb", buffering)


def open_append(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for appending, or make it. A symlink is refused: its target is not ours to write.

    Raises:
        NotRegular: it is a symlink or no regular file.
        OSError: it cannot be written.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):
            raise NotRegular(
                errno.EINVAL, f"{Path(path).name} is {kind_of(mode)}, which is not written to; remove it"
            )
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _CAREFUL | getattr(os, "O_NOFOLLOW", 0)
    return _checked(os.open(path, flags, 0o666), "ab", -1)


def _checked(descriptor: int, mode: str, buffering: int) -> BinaryIO:
    """The open descriptor as a file, if it is a regular file's: it may have changed since the look."""
    try:
        found = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(found):
            raise NotRegular(errno.EINVAL, f"it is {kind_of(found)}, expected a regular file")
        return os.fdopen(descriptor, mode, buffering)  # type: ignore[return-value]
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """The contents of a regular file of at most so many bytes.

    Raises:
        OSError: as `open_regular`, or the file is larger.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most >> 20} MB")
    return data


@contextlib.contextmanager
def written(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file that gets the name `path` when the block ends without an error, whole and synced.

    Until then it is NAME.HEX.part beside it, of this writer alone: two writers of one name cannot mix, and
    the last to end gives the name. What killed writers of the name left is removed first.

    Raises:
        OSError: the folder or the disk cannot be written, or `path` is a folder or no regular file.
    """
    path = Path(path)
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise NotRegular(
                errno.EINVAL, f"{path.name} is {kind_of(mode)}, expected a file or nothing there"
            )
    sweep(path)
    file, part = _new_part(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name != "nt":
                os.replace(part, path)  # still locked, so that nobody takes it for a dead writer's
        if os.name == "nt":  # an open file cannot be renamed there
            os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _new_part(path: Path) -> tuple[BinaryIO, Path]:
    """A new, locked part file for `path`. The name is cut where it would be too long for a file system."""
    stem = path.name.encode()[:200].decode(errors="ignore")
    while True:
        part = path.with_name(f"{stem}.{secrets.token_hex(8)}{PART}")
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666), "w+b")
        lock(file)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                return file, part
        file.close()  # a sweep took it between opening and locking


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new folder NAME.HEX.folder beside `path` for files that are moved together; removed at the end.

    What killed writers of the name left is removed first.
    """
    sweep(path)
    guard, part = _new_part(path)  # its lock says that the folder beside it is in use
    folder = part.with_suffix(".folder")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        guard.close()
        with contextlib.suppress(OSError):
            part.unlink()


def sweep(path: Path) -> None:
    """Remove what killed writers of `path` left beside it: part files that nobody has locked, and their
    folders.
    """
    stem = path.name.encode()[:200].decode(errors="ignore")
    with contextlib.suppress(OSError):
        names = [n for n in os.listdir(path.parent) if n.startswith(f"{stem}.") and n.endswith(PART)]
        for name in names:
            digits = name[len(stem) + 1 : -len(PART)]
            if len(digits) == 16 and not set(digits) - set("0123456789abcdef"):
                with contextlib.suppress(OSError):
                    _remove_dead(path.with_name(name))


def _remove_dead(part: Path) -> None:
    """Remove a part file if its writer is gone."""
    if not stat.S_ISREG(os.lstat(part).st_mode):
        return
    if os.name == "nt":
        part.unlink()  # fails while its writer has it open
        shutil.rmtree(part.with_suffix(".folder"), ignore_errors=True)
        return
    with open(part, "rb") as file:
        held = lock(file)
        if held or (held is None and time.time() - os.fstat(file.fileno()).st_mtime > OLD):
            shutil.rmtree(part.with_suffix(".folder"), ignore_errors=True)
            part.unlink()


def lock(file: BinaryIO) -> bool | None:
    """Take the system's lock on an open file, which ends with the process: True, False if another has it,
    None if this disk knows no locks.
    """
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK) else None
    return True
