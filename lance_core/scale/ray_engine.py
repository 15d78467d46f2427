"""Workers as Ray actors: placed on a cluster, one a GPU, and placed anew when they are lost.

What is done and what is not stays results.jsonl's. FILE's media, the weights and the output folder must be
where every machine of the cluster sees them, under one path.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from typing import Any

from ..checks import whole
from ..errors import RequestError
from .pool import Pool
from .ray_start import connected
from .results import Line, StorageFullError
from .rows import Row
from .work import Session, Settings

MAX_WORKERS = 10_000
START_SECONDS = 180.0  # for an actor to be placed and to import torch; then its rows go to others


class Drawer:
    """What runs in an actor. Of its two groups of calls, `media` reads ahead while `draw` draws."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._session = Session(Settings(**settings))
        self._read: queue.Queue[Any] = queue.Queue()

    def ready(self) -> int:
        """That it is there: its process's id."""
        return os.getpid()

    def read(self, row: dict[str, Any]) -> None:
        """Read a row's media, for `draw` to take in the same order; also if this fails."""
        try:
            self._read.put(self._session.read(Row(**row)))
        except Exception as error:
            self._read.put(error)

    def draw(self) -> dict[str, Any]:
        """Draw the row that was read first: {"line": ...}, or {"stop": why}."""
        read = self._read.get()
        if isinstance(read, Exception):
            raise read
        try:
            return {"line": self._session.draw(read)}
        except StorageFullError as error:
            return {"stop": str(error)}


def lines(
    rows: Sequence[Row], settings: Settings, workers: int | str | None, address: str | None
) -> Generator[Line, None, None]:
    """The line of every row, drawn by actors. workers: how many; None or "all" is one a GPU of the cluster,
    or without any one a CPU.

    Raises (while iterated):
        RequestError: Ray is not installed, the cluster does not answer or is too small; or as `Pool`.
    """
    ray = connected(address, "engine ray", "ray")
    try:
        gpu = settings.device.startswith("cuda")
        count = _count(ray, workers, gpu)
        yield from Pool(rows, _starter(ray, settings, gpu), count).lines()
    finally:
        ray.shutdown()


def _count(ray: Any, workers: int | str | None, gpu: bool) -> int:
    """How many actors.

    Raises:
        RequestError: no number, or more than the cluster has room for.
    """
    kind = "GPU" if gpu else "CPU"
    room = int(ray.cluster_resources().get(kind, 0))
    if workers in (None, "all"):
        asked: Any = max(room, 1)
    else:
        asked = int(workers) if isinstance(workers, str) and workers.isdecimal() else workers
    count = whole("workers", asked, 1, MAX_WORKERS, f"a number from 1 to {MAX_WORKERS}, or all")
    if count > room:
        raise RequestError(f"{count} workers need a {kind} each, and the cluster has {room}; ask for fewer")
    return count


def _starter(ray: Any, settings: Settings, gpu: bool) -> Any:
    groups = {"concurrency_groups": {"media": 1, "draw": 1}}
    kind = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0, max_restarts=0, **groups)(Drawer)
    own = asdict(settings)
    return lambda place, post: RayWorker(ray, kind.remote(own), post)


class RayWorker:
    """One actor."""

    def __init__(self, ray: Any, actor: Any, post: Callable[[dict[str, Any]], None]) -> None:
        self._ray, self._actor, self._post = ray, actor, post
        self._coming: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def give(self, row: Row) -> None:
        """One more row."""
        self._actor.read.options(concurrency_group="media").remote(asdict(row))
        self._coming.put(self._actor.draw.options(concurrency_group="draw").remote())

    def stop(self) -> None:
        """End the actor now."""
        self._coming.put(None)
        with contextlib.suppress(Exception):  # it may be gone already
            self._ray.kill(self._actor)

    def _listen(self) -> None:
        errors = self._ray.exceptions
        try:
            self._ray.get(self._actor.ready.remote(), timeout=START_SECONDS)
        except errors.GetTimeoutError:
            self._post({"away": f"Ray has not started a worker in {START_SECONDS:.0f} seconds"})
            return
        except errors.RayError as error:
            self._post({"away": f"its actor did not start ({_told(error)})"})
            return
        while (coming := self._coming.get()) is not None:
            try:
                self._post(self._ray.get(coming))
            except errors.RayError as error:
                self._post({"lost": _told(error)})
                return


def _told(error: BaseException) -> str:
    cause = getattr(error, "cause", None)  # of what the actor itself raised
    if cause is not None:
        return f"{type(cause).__name__}: {cause}"[:200]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
