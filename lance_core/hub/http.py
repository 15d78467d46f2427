"""Requests to a server: files from where they end, and JSON. Never stuck, and failures told apart.

One client for everything, urllib's, which comes with Python: huggingface_hub's own downloads notice an
interrupt only when a read returns, and its client is another one in each of its releases (requests, httpx,
httpx2), each with an idea of its own of proxies. Here: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY in
either case, or the system's setting; the proxy is an HTTP or a SOCKS5 one (`proxy`).
"""

from __future__ import annotations

import functools
import http.client
import importlib.util
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from ..files import open_append, open_regular
from . import watch as watching
from .proxy import Proxies, handlers
from .record import Expected
from .watch import Watch

STALL = 30.0  # seconds without a byte before a connection is given up
MAX_JSON = 32 << 20  # bytes of a listing


class Transient(Exception):
    """A failure of the network that may not come again."""


class WrongFile(Exception):
    """The server offers something else than what was asked for."""


class BadRedirect(Exception):
    """The server sends on to an address that is not followed."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects as the hub sends them to its storage: to https, or with the scheme there is; the token stays
    with the host it is for.
    """

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, target = urlsplit(req.full_url), urlsplit(newurl)
        if target.scheme not in ("https", old.scheme) or not target.hostname:
            raise BadRedirect(f"{old.netloc} sends on to {newurl[:80]!r}, which is not https")
        new = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        if new is not None and target[:2] != old[:2]:
            new.remove_header("Authorization")
        return new

    def http_error_302(self, req, fp, code, msg, headers):
        target = headers.get("Location") or headers.get("URI") or ""
        try:
            scheme = urlsplit(target).scheme
        except ValueError:
            raise BadRedirect(f"the server sends on to {target[:80]!r}, which is no address") from None
        if scheme not in ("", "http", "https"):
            raise BadRedirect(f"the server sends on to {target[:80]!r}, which is not https")
        return super().http_error_302(req, fp, code, msg, headers)

    # 308 is not known to Python 3.10.
    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@functools.cache
def _context() -> ssl.SSLContext:
    """The system's certificates and certifi's: some Pythons find none of the system's."""
    context = ssl.create_default_context()
    certifi = importlib.util.find_spec("certifi")  # comes with huggingface_hub
    if certifi and certifi.origin:
        context.load_verify_locations(Path(certifi.origin).with_name("cacert.pem"))
    return context


class Client:
    """Opens addresses, by one idea of the proxies for all of them.

    Raises:
        ValueError: a proxy's address is of no known kind.
    """

    def __init__(self) -> None:
        self.proxies = Proxies.from_environment()
        self._opener = urllib.request.build_opener(_Redirects, *handlers(self.proxies, _context()))

    def open(self, url: str, headers: dict[str, str], watch: Watch) -> http.client.HTTPResponse:
        """The answer, its body not yet read.

        Raises:
            Transient: the network failed; another try may do better.
            BadRedirect: see there, or `url` is no address.
            urllib.error.HTTPError: the server refused in a way that another try will not change.
        """
        request = urllib.request.Request(url, headers=headers | {"Accept-Encoding": "identity"})
        return _ask(watch, lambda: self._opener.open(request, timeout=STALL))

    def json(self, url: str, headers: dict[str, str], watch: Watch) -> Any:
        """The JSON at an address. Raises as `open`, and WrongFile if it is none."""
        response = self.open(url, headers, watch)
        data = b""
        while chunk := _ask(watch, lambda: _take(response, watching.CHUNK)):
            data += chunk
            if len(data) > MAX_JSON:
                raise WrongFile(f"more than {MAX_JSON >> 20} MB where a listing was expected")
        response.close()
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise WrongFile("no JSON where a listing was expected") from None

    def receive(self, url: str, headers: dict[str, str], part: PartFile, watch: Watch) -> None:
        """One request, from where the part ends to the end of the file; `watch.done` goes up with it.

        Raises:
            WrongFile: it is not the file expected; else as `open`.
        """
        start, size = part.size, part.expected.size
        base = watch.done - start
        response = self.open(url, headers | ({"Range": f"bytes={start}-"} if start else {}), watch)
        span = re.fullmatch(
            r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", response.headers.get("Content-Range") or ""
        )
        length = int(span[2]) if span else response.length if response.status == 200 else None
        if length not in (None, size):
            raise WrongFile(f"{_short(url)} offers {length} bytes where {size} were expected")
        if response.status != 206:  # the server does not do ranges
            part.restart()
        elif not span or int(span[1]) != start:
            raise Transient("the server sent another range than asked for")
        while chunk := _ask(watch, lambda: _take(response, min(watching.CHUNK, size - part.size + 1))):
            part.write(chunk)
            watch.done = base + part.size
            if part.size > size:
                part.restart()
                raise WrongFile(f"{_short(url)} sends more than the {size} bytes expected")
        response.close()
        if part.size < size:
            raise Transient("the connection ended early")


def _short(url: str) -> str:
    """An address for a message: its host and its file."""
    parts = urlsplit(url)
    return f"{parts.netloc[:60]}…/{parts.path.rpartition('/')[2][:60]}"


class PartFile:
    """The bytes of a file so far, on disk, and their running hash. A restart unlinks, as the file may be a
    link to the cache's.
    """

    def __init__(self, path: Path, expected: Expected) -> None:
        self.path, self.expected, self.hasher, self.size = path, expected, expected.hasher(), 0
        self.file: BinaryIO | None = None

    def resume(self, watch: Watch) -> None:
        """Go on with what an earlier try left, if it can be the beginning of the file."""
        if not os.path.lexists(self.path):
            self.path.touch()
        elif self.path.is_symlink() or not (self.path.is_file() or self.path.is_dir()):
            self.restart()  # what it leads to is not ours to write to
        found = self.path.stat() if self.path.exists() else None
        if found is None or found.st_size > self.expected.size:
            self.restart()
        elif found.st_nlink > 1 and found.st_size < self.expected.size:
            self.restart()  # a cut file of the hub's cache
        elif not self.size:
            self.size = watch.hash_into(self.hasher, self.path)

    def write(self, chunk: bytes) -> None:
        self.file = self.file or open_append(self.path)
        self.file.write(chunk)
        self.file.flush()
        self.hasher.update(chunk)
        self.size += len(chunk)

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
            with open_regular(other, buffering=0) as file:
                while chunk := file.read(watching.CHUNK):
                    self.write(chunk)
                    watch.tick()

    def restart(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
        self.hasher, self.size = self.expected.hasher(), 0


def _ask(watch: Watch, call: Callable[[], Any]) -> Any:
    """The network's answer, its failures told apart."""
    value, error = watch.outcome(call)
    if error is None:
        return value
    if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429):
        raise error
    if isinstance(error, http.client.InvalidURL) or (
        isinstance(error, ValueError) and not isinstance(error, OSError)
    ):
        raise BadRedirect(f"no address: {str(error)[:100]}") from None
    if isinstance(error, OSError | http.client.HTTPException):
        raise Transient(f"{type(error).__name__}: {str(error)[:150]}")
    raise error


def _take(response: http.client.HTTPResponse, limit: int) -> bytes:
    """Up to `limit` bytes, fewer if POLL is over; b"" at the end. What came before a failure is not lost with
    it.
    """
    chunks: list[bytes] = []
    end = time.monotonic() + watching.POLL
    while limit > 0 and (not chunks or time.monotonic() < end):
        try:
            chunks.append(response.read1(limit))
        except (OSError, http.client.HTTPException):
            if chunks:
                break
            raise
        if not chunks[-1]:
            break
        limit -= len(chunks[-1])
    return b"".join(chunks)
