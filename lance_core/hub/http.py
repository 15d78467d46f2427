"""Bytes from a server to a disk, whatever either does: never stuck, resumable, hashed on the way.

Whatever may block runs in a thread, while the caller's thread looks at `check` and tells `progress` four
times a second.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import http.client
import importlib.util
import logging
import os
import queue
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

CHUNK = 1 << 20  # bytes read at a time
POLL = 0.25  # seconds between looks at `check`
STALL = 30.0  # seconds without a byte before a connection is given up
LOG_EVERY = 30.0  # seconds
LOG = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what is going on, bytes done, bytes in all (0: unknown)


class Transient(Exception):
    """A failure of the network that may not come again."""


class WrongSize(Exception):
    """The server offers something else than the file expected."""


class Entry(NamedTuple):
    """What a file must be: its size in bytes, and the SHA-256 of its content or (40 digits) the SHA-1 of its
    git blob.
    """

    size: int
    digest: str

    def hasher(self) -> Any:
        return (
            hashlib.sha256()
            if len(self.digest) == 64
            else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        )


class Watch:
    """Keeps the caller informed, and asks whether to go on, while something takes long."""

    def __init__(self, progress: Progress | None, check: Callable[[], None] | None) -> None:
        self.progress, self.check = progress or (lambda *_: None), check or (lambda: None)
        self.told, self.logged = 0.0, time.monotonic()
        self.stage("looking", 0, 0)

    def stage(self, what: str, done: int, total: int) -> None:
        self.what, self.done, self.total = what, done, total
        self.tick(force=True)

    def tick(self, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self.told >= POLL:
            self.told = now
            self.check()
            self.progress(self.what, self.done, self.total)
        if now - self.logged >= LOG_EVERY:
            self.logged = now
            LOG.info("%s: %.2f of %.2f GB", self.what, self.done / 1e9, self.total / 1e9)

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.tick()
            time.sleep(min(POLL, left))

    def outcome(self, call: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
        """What `call` returned or raised. It runs in a thread, so nothing that blocks in it keeps us from
        ticking.
        """
        box: queue.SimpleQueue = queue.SimpleQueue()

        def work() -> None:
            try:
                box.put((call(*args), None))
            except Exception as error:
                box.put((None, error))

        threading.Thread(target=work, daemon=True).start()
        while True:
            self.tick()
            with contextlib.suppress(queue.Empty):
                return box.get(timeout=POLL)

    def hash_into(self, hasher: Any, path: Path) -> int:
        """Hash a file; returns its size."""
        outer = self.what, self.done, self.total
        self.stage(f"checking {path.name}", 0, path.stat().st_size)
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(CHUNK):
                hasher.update(piece)
                self.done += len(piece)
                self.tick()
        size = self.done
        self.stage(*outer)
        return size


@contextlib.contextmanager
def locked(path: Path, watch: Watch) -> Iterator[None]:
    """One download at a time in a folder. The system's lock on an open file: it goes when the process does,
    however it ends.
    """
    with open(path, "ab") as file:
        while not _try_lock(file):
            watch.what = "waiting for another download into this folder"
            watch.sleep(POLL)
        yield


def _try_lock(file: Any) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            LOG.warning("this disk knows no locks (%s); do not start two downloads into one folder", error)
            return True
        return False
    return True


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects as the hub sends them to its storage: the token stays with the host it is for."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # not known to Python 3.10

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        if new is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            new.remove_header("Authorization")
        return new


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    certifi = importlib.util.find_spec(
        "certifi"
    )  # comes with huggingface_hub; some Pythons have no certificates else
    if certifi and certifi.origin:
        context.load_verify_locations(Path(certifi.origin).with_name("cacert.pem"))
    return urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=context))


class Part:
    """The bytes of a file so far, on disk, and their running hash. A restart unlinks, as the file may be a
    link to the cache's.
    """

    def __init__(self, path: Path, entry: Entry) -> None:
        self.path, self.entry, self.hasher, self.size, self.file = path, entry, entry.hasher(), 0, None

    def write(self, piece: bytes) -> None:
        self.file = self.file or open(self.path, "ab")  # noqa: SIM115 - open from the first piece to `close`
        self.file.write(piece)
        self.file.flush()
        self.hasher.update(piece)
        self.size += len(piece)

    def close(self, sync: bool = False) -> None:
        if self.file:
            if sync:
                os.fsync(self.file.fileno())
            self.file.close()
        self.file = None

    def start_as(self, other: Path, watch: Watch) -> None:
        """Begin as a link to another file, or as its copy where that is on another disk."""
        self.restart()
        try:
            os.link(other, self.path)
        except OSError:
            with open(other, "rb", buffering=0) as file:
                while piece := file.read(CHUNK):
                    self.write(piece)
                    watch.tick()

    def restart(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
        self.hasher, self.size = self.entry.hasher(), 0


def receive(url: str, headers: dict[str, str], part: Part, watch: Watch) -> None:
    """One request, from where the part ends to the end of the file; `watch.done` goes up with it.

    Raises:
        Transient: the network failed; another try may do better, and goes on where this one stopped.
        WrongSize: it is not the file expected.
        urllib.error.HTTPError: the server refused in a way that another try will not change.
    """
    start, size = part.size, part.entry.size
    base = watch.done - start
    headers = headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    response = _ask(watch, lambda: _opener().open(request, timeout=STALL))
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range") or "")
    length = int(span[2]) if span else response.length if response.status == 200 else None
    if length not in (None, size):
        raise WrongSize(f"{url} offers {length} bytes where {size} were expected")
    if response.status != 206:  # the server does not do ranges
        part.restart()
    elif not span or int(span[1]) != start:
        raise Transient("the server sent another range than asked for")
    while piece := _ask(watch, lambda: _take(response, min(CHUNK, size - part.size + 1))):
        part.write(piece)
        watch.done = base + part.size
        if part.size > size:
            part.restart()
            raise WrongSize(f"{url} sends more than the {size} bytes expected")
    response.close()
    if part.size < size:
        raise Transient("the connection ended early")


def _ask(watch: Watch, call: Callable[[], Any]) -> Any:
    """The network's answer, its failures told apart."""
    value, error = watch.outcome(call)
    if error is None:
        return value
    lasting = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
    if not lasting and isinstance(error, OSError | http.client.HTTPException):
        raise Transient(f"{type(error).__name__}: {error}")
    raise error


def _take(response: http.client.HTTPResponse, limit: int) -> bytes:
    """Up to `limit` bytes, fewer if POLL is over; b"" at the end. What came before a failure is not lost with
    it.
    """
    pieces, end = [], time.monotonic() + POLL
    while limit > 0 and (not pieces or time.monotonic() < end):
        try:
            pieces.append(response.read1(limit))
        except (OSError, http.client.HTTPException):
            if pieces:
                break
            raise
        if not pieces[-1]:
            break
        limit -= len(pieces[-1])
    return b"".join(pieces)
