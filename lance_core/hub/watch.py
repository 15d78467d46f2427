"""Progress and interrupts while something takes long: what may block runs in a thread, while the caller's
thread looks at `check` and tells `progress` four times a second.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..files import lock, open_append, open_regular

CHUNK = 1 << 20  # bytes read at a time
POLL = 0.25  # seconds between looks at `check`
LOG_EVERY = 30.0  # seconds
LOG = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what is going on, bytes done, bytes in all (0: unknown)


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
        """What `call` returned or raised. It runs in a thread, so `tick` goes on whatever blocks in
        it.
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
        with open_regular(path, buffering=0) as file:
            while chunk := file.read(CHUNK):
                hasher.update(chunk)
                self.done += len(chunk)
                self.tick()
        size = self.done
        self.stage(*outer)
        return size


@contextlib.contextmanager
def locked(path: Path, watch: Watch) -> Iterator[None]:
    """One download at a time in a folder. The system's lock on an open file: it goes when the process does,
    however it ends.
    """
    with open_append(path) as file:
        while (held := lock(file)) is False:
            watch.what = "waiting for another download into this folder"
            watch.sleep(POLL)
        if held is None:
            LOG.warning("this disk knows no locks; do not start two downloads into one folder")
        yield
