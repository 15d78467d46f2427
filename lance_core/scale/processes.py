"""Workers as processes of this machine, by the standard library: one a GPU, or several on a CPU.

Rows go in and lines come out as JSON, a line each, through the child's stdin and stdout. The child ends when
its stdin does, so a batch that is killed leaves no worker behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .pool import Start
from .rows import Row
from .work import Settings

MAX_WORKERS = 512


def worker_count(asked: int | str, weights: int) -> int:
    """How many workers "all" are: the GPUs, or without any the cores whose share of memory holds the weights.

    weights: bytes of a checkpoint.

    Raises:
        RequestError: neither a number from 1 nor "all".
    """
    if asked != "all":
        from .. import checks

        given = int(asked) if isinstance(asked, str) and asked.isdecimal() and len(asked) < 9 else asked
        return checks.whole("workers", given, 1, MAX_WORKERS, f"a number from 1 to {MAX_WORKERS}, or all")
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return max(1, min(os.cpu_count() or 1, _memory() // max(weights, 1)))


def _memory() -> int:
    """Bytes of memory of this machine; where it does not say, enough for one worker only."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def device_for(place: int, device: str) -> str:
    """The device of a worker: for plain "cuda" a GPU of its own, as far as there are enough."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{place % max(torch.cuda.device_count(), 1)}"


def starter(settings: Settings, count: int) -> Start:
    """Starts worker processes. count: how many there will be, to divide the cores among them."""

    def start(place: int, post: Callable[[dict[str, Any]], None]) -> ProcessWorker:
        own = replace(settings, device=device_for(place, settings.device))
        return ProcessWorker(own, post, max((os.cpu_count() or 1) // count, 1))

    return start


class ProcessWorker:
    """One child. threads: of its torch, unless the environment already says."""

    def __init__(self, settings: Settings, post: Callable[[dict[str, Any]], None], threads: int) -> None:
        root = str(Path(__file__).resolve().parents[2])
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "lance_core.scale.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        except OSError as error:
            raise RequestError(f"no worker process can be started ({error.strerror or error})") from None
        self._post = post
        self._send(asdict(settings))
        threading.Thread(target=self._listen, daemon=True).start()

    def give(self, row: Row) -> None:
        """One more row."""
        self._send(asdict(row))

    def stop(self) -> None:
        """End it now; a file it was writing has not its name yet."""
        self._child.kill()
        with contextlib.suppress(OSError, ValueError):
            self._child.stdin.close()  # type: ignore[union-attr]
        self._child.wait()

    def _send(self, content: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is gone: its listener says so
            self._child.stdin.write(json.dumps(content).encode() + b"\n")  # type: ignore[union-attr]
            self._child.stdin.flush()  # type: ignore[union-attr]

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self._child.stdout:  # type: ignore[union-attr]
                self._post(json.loads(line))
        self._post({"lost": ending(self._child.wait())})


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"it was ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
