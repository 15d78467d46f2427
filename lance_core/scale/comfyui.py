"""Rows drawn by ComfyUI servers: each fills a workflow, is queued, followed and fetched.

The id under which a row is queued follows from the row, so a batch that was killed finds again what a server
has queued, runs or has finished for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LanceError, MediaError, RequestError
from ..files import read_bytes, written
from .comfy_api import ComfyError, Server, failure, outputs_of
from .pool import Start
from .results import Line, StorageFullError, key_of, line_of, made_line, place, storage_error
from .rows import Row
from .workflow import Workflow, filled, read_workflow, seed_of

POLL = 0.1, 1.0  # seconds between two questions, growing while nothing comes
FOLDER = "lance_batch"  # among the server's inputs and outputs
MAX_MEDIA = 4 << 30  # bytes
NAMESPACE = uuid.UUID("6f4b6f2e-8f0a-4c3e-9a55-2f1c0f6f7d11")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Where and with what: servers, output folder, workflows by task."""

    servers: Sequence[Server]
    folder: Path
    workflows: dict[str, Workflow]

    @property
    def made_by(self) -> str:
        """A digest of the workflows: a row's result depends on them."""
        return hashlib.sha256(json.dumps(self.workflows, sort_keys=True).encode()).hexdigest()[:32]


def plan(urls: str, folder: Path, rows: Sequence[Row], workflow: str | os.PathLike | None) -> Plan:
    """Servers from a list of addresses with commas between, and each task's workflow.

    Raises:
        RequestError: an address or a workflow is none.
    """
    servers = [Server(url.strip()) for url in urls.split(",") if url.strip()]
    if not servers:
        raise RequestError("no address of a ComfyUI was given; expected such as http://127.0.0.1:8188")
    path = None if workflow is None else Path(workflow)
    return Plan(servers, folder, {task: read_workflow(path, task) for task in {row.task for row in rows}})


def starter(plan: Plan) -> Start:
    """A worker a server.

    Raises:
        RequestError: none of the servers answers.
    """
    silent = [server.url for server in plan.servers if not server.answers()]
    if len(silent) == len(plan.servers):
        raise RequestError(f"no ComfyUI answers at {', '.join(silent)}"[:480])
    for url in silent:
        _log.warning("No ComfyUI answers at %s; the others begin without it.", url)
    return lambda at, post: ServerWorker(plan, plan.servers[at], post)


@dataclass
class _Job:
    """A row at a server; or one that never got there, and why."""

    row: Row
    key: str
    error: str | None = None
    graph: Workflow = field(default_factory=dict)
    prompt_id: str = ""
    began: float = field(default_factory=time.perf_counter)


class ServerWorker:
    """Keeps a server busy with the rows it is given, and fetches what comes of them, in their order."""

    def __init__(self, plan: Plan, server: Server, post: Callable[[dict[str, Any]], None]) -> None:
        self._plan, self._server, self._post = plan, server, post
        self._given: queue.Queue[Row] = queue.Queue()
        self._jobs: deque[_Job] = deque()
        self._ended = threading.Event()
        self._made_by = plan.made_by
        threading.Thread(target=self._work, daemon=True).start()

    def give(self, row: Row) -> None:
        """One more row."""
        self._given.put(row)

    def stop(self) -> None:
        """Ask the server for nothing more. What it has queued it finishes; the next run fetches it."""
        self._ended.set()

    def _work(self) -> None:
        began = False
        try:
            while not self._ended.is_set():
                self._queue_given()
                if not self._jobs:
                    continue
                began = True
                if self._jobs[0].error is not None:
                    self._post({"line": _failed(self._jobs.popleft())})
                    continue
                ended = self._followed(self._jobs[0])
                if ended is not None:
                    self._post({"line": self._fetched(self._jobs.popleft(), ended)})
        except StorageFullError as error:
            self._post({"stop": str(error)})
        except OSError as error:
            why = f"{self._server.url} does not answer ({_told(error)})"
            self._post({"lost" if began else "away": why})
        except Exception as error:
            _log.warning("the worker of %s ended", self._server.url, exc_info=error)
            self._post({"lost": f"{type(error).__name__}: {error}"[:300]})

    def _queue_given(self) -> None:
        """Queue what has been given, waiting for it when there is nothing else to do."""
        wait = not self._jobs
        while True:
            try:
                row = self._given.get(timeout=POLL[1]) if wait else self._given.get_nowait()
            except queue.Empty:
                return
            wait = False
            job = _Job(row, key_of(row, made_by=self._made_by))
            try:
                self._queue(job)
            except LanceError as error:
                job.error = str(error)[:500]
            self._jobs.append(job)

    def _queue(self, job: _Job) -> None:
        """Upload a row's media and queue its workflow, unless the server has it from an earlier run."""
        media = [self._uploaded(path) for path in job.row.paths]
        workflow = self._plan.workflows[job.row.task]
        job.graph = filled(workflow, job.row, media, f"{FOLDER}/{job.key}")
        job.prompt_id = str(uuid.uuid5(NAMESPACE, job.key))
        ended = self._server.ended(job.prompt_id)
        if (ended is not None and failure(ended) is None) or self._server.known(job.prompt_id):
            return
        if ended is not None:  # it failed: under its own id the history would still say so
            job.prompt_id = str(uuid.uuid4())
        about = {"lance": {"id": job.row.id, "row": job.key, "prompt": job.row.prompt, "task": job.row.task}}
        job.prompt_id = self._server.queue(job.graph, job.prompt_id, about)

    def _uploaded(self, path: str) -> str:
        try:
            data = read_bytes(path, MAX_MEDIA)
        except OSError as error:
            raise MediaError(f"{path[-200:]} cannot be read ({_told(error)})") from None
        name = hashlib.sha256(data).hexdigest()[:32] + Path(path).suffix.lower()
        return self._server.upload(name, data, FOLDER)

    def _followed(self, job: _Job) -> dict[str, Any] | None:
        """Wait a while for a row's end; None when there is something else to do first.

        Raises:
            OSError: the server is gone, or no longer knows of the row.
        """
        pause = POLL[0]
        while not self._ended.is_set():
            ended = self._server.ended(job.prompt_id)
            if ended is not None:
                return ended
            if not self._server.known(job.prompt_id) and self._server.ended(job.prompt_id) is None:
                raise OSError("it has lost its queue")
            if not self._given.empty():
                return None
            self._ended.wait(pause)
            pause = min(pause * 1.5, POLL[1])
        return None

    def _fetched(self, job: _Job, ended: dict[str, Any]) -> Line:
        """A row's line, its files in place.

        Raises:
            OSError: the server is gone.
            StorageFullError: the output takes nothing more.
        """
        row, folder = job.row, self._plan.folder
        seconds = round(time.perf_counter() - job.began, 3)
        try:
            why = failure(ended)
            if why is not None:
                raise ComfyError(why)
            files, texts = outputs_of(ended)
            about = {"id": row.id, "row": job.key, "task": row.task, "prompt": row.prompt}
            if row.kind.output == "text":
                about["text"] = "\n".join(texts)
                _save(place(folder, row.files[0]), json.dumps(about).encode() + b"\n")
            else:
                self._keep(row, [(f["filename"], self._server.fetch(f)) for f in files], about)
        except (LanceError, OSError) as error:
            told = storage_error(error)
            if told is not None:
                raise StorageFullError.of(folder, told) from error
            if isinstance(error, OSError):
                raise
            job.error = str(error)[:500]
            return _failed(job) | {"seconds": seconds}
        line = made_line(row, job.key, folder, about, seconds)
        return line | {"seed": row.options.get("seed", seed_of(job.graph)), "server": self._server.url}

    def _keep(self, row: Row, fetched: list[tuple[str, bytes]], about: dict[str, Any]) -> None:
        wanted = int(row.options.get("batch_size", 1))
        if len(fetched) != wanted:
            raise ComfyError(f"the workflow gave {len(fetched)} files and the row is of {wanted}")
        folder = self._plan.folder
        for name, text in row.beside.items():
            _save(place(folder, name), text.encode())
        for name, (own, data) in zip(row.files, fetched, strict=False):
            _keep_one(place(folder, name), own, data, about)
        if row.grid:
            import torch

            from ..inputs import media
            from .work import grid

            pictures = [torch.from_numpy(media.load_image(data)) for _, data in fetched]
            media.save_image(place(folder, row.grid), grid(torch.stack(pictures)).numpy(), about)


def _failed(job: _Job) -> Line:
    return line_of(job.row.id, job.row.task, job.key, error=job.error)


def _keep_one(path: Path, own: str, data: bytes, about: dict[str, Any]) -> None:
    """Write a fetched file under the row's name; a picture of another format is written anew in that one."""
    from ..inputs import media

    if Path(own).suffix.lower() == path.suffix.lower():
        _save(path, data)
    elif path.suffix.lower() in media.IMAGE_FORMATS:
        media.save_image(path, media.load_image(data), about)
    else:
        raise ComfyError(f"the workflow gave {own[-100:]}, and the row's id asks for {path.suffix}")


def _save(path: Path, data: bytes) -> None:
    with written(path) as file:
        file.write(data)


def _told(error: BaseException) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)[:200]
