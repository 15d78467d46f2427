"""A plain client of ComfyUI's HTTP and websocket interface: queue an API-format workflow, see everything the
server says, get the results.

Single-threaded: messages are read while something is waited for, and kept in order.
"""

from __future__ import annotations

import json
import struct
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import websocket

Workflow = dict[str, dict[str, Any]]

# server protocol.py, BinaryEventTypes
_PREVIEW, _TEXT, _PREVIEW_WITH_METADATA = 1, 3, 4
_ENDS = ("execution_success", "execution_error", "execution_interrupted")


class PromptRejectedError(RuntimeError):
    """The server did not accept a workflow. `node_errors` is its own account, by node id."""

    def __init__(self, reply: dict[str, Any]) -> None:
        self.node_errors: dict[str, Any] = reply.get("node_errors") or {}
        error = reply.get("error") or {}
        lines = [
            f"{error.get('message', '')}: {error.get('details', '')}"
            if isinstance(error, dict)
            else str(error)
        ]
        for node, account in self.node_errors.items():
            lines += [
                f"node {node} ({account.get('class_type')}): {e['message']}: {e['details']}"
                for e in account.get("errors", [])
            ]
        super().__init__("\n".join(lines))


class ExecutionFailedError(RuntimeError):
    """A node raised. `data` is the server's execution_error message; `message` what the node said."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.node_id = str(data.get("node_id"))
        self.type = str(data.get("exception_type"))
        self.message = str(data.get("exception_message")).strip()
        trace = "".join(data.get("traceback") or [])
        super().__init__(
            f"node {self.node_id} ({data.get('node_type')}): {self.type}: {self.message}\n{trace}"
        )


class InterruptedRunError(RuntimeError):
    """The run was interrupted."""


class NoAnswerError(TimeoutError):
    """Nothing (or not the awaited thing) came within the time allowed."""


@dataclass(frozen=True)
class Message:
    """What the server said. Binary previews have type "preview", the image's bytes in data["image"]."""

    type: str
    data: dict[str, Any]
    at: float = field(default_factory=time.monotonic)


@dataclass
class Run:
    """One queued workflow: its messages so far and, when it has ended, its history entry."""

    prompt_id: str
    client: Client
    queued_at: float
    history: dict[str, Any] | None = None
    _first: int = 0

    @property
    def messages(self) -> list[Message]:
        """Messages of this run. Those that name no prompt (old previews, progress texts) count when they came
        during it.
        """
        said = self.client.messages[self._first :]
        return [
            message for message in said if message.data.get("prompt_id", self.prompt_id) == self.prompt_id
        ]

    def of(self, kind: str, node: str | None = None) -> list[dict[str, Any]]:
        """The data of all messages of a type, of one node if given."""
        found = [message.data for message in self.messages if message.type == kind]
        return [data for data in found if node is None or str(data.get("node", data.get("node_id"))) == node]

    def progress(self, node: str) -> list[tuple[float, float]]:
        """(value, max) as reported for a node, in order."""
        return [(data["value"], data["max"]) for data in self.of("progress", node)]

    def texts(self, node: str | None = None) -> list[str]:
        """What send_progress_text streamed, in order."""
        return [data["text"] for data in self.of("progress_text", node)]

    @property
    def previews(self) -> list[bytes]:
        """Preview images as encoded by the server (JPEG or PNG)."""
        return [data["image"] for data in self.of("preview")]

    @property
    def cached(self) -> set[str]:
        """Nodes that did not need to run."""
        return {str(node) for data in self.of("execution_cached") for node in data["nodes"]}

    @property
    def executed(self) -> set[str]:
        """Nodes that ran."""
        return {str(data["node"]) for data in self.of("executing") if data.get("node") is not None}

    @property
    def seconds(self) -> float:
        """From queueing to the end."""
        ends = [message.at for message in self.messages if message.type in _ENDS]
        return (ends[-1] if ends else time.monotonic()) - self.queued_at

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        """What the output nodes show, by node id: {"9": {"images": [...]}}."""
        return self.wait().history["outputs"]  # type: ignore[index]

    def files(self, node: str | None = None) -> list[dict[str, str]]:
        """Files among the outputs, each {"filename", "subfolder", "type"}."""
        shown = [ui for key, ui in self.outputs.items() if node in (None, key)]
        return [
            item
            for ui in shown
            for items in ui.values()
            for item in items
            if isinstance(item, dict) and "filename" in item
        ]

    def wait_for(self, wanted: Callable[[Message], bool] | str, timeout: float = 120) -> Message:
        """Until a message of this run is of a type or satisfies a predicate. An end by error raises as `wait`
        does.
        """
        matches = wanted if callable(wanted) else lambda message: message.type == wanted
        deadline = time.monotonic() + timeout
        while True:
            for message in self.messages:
                if matches(message):
                    return message
            self._raise_if_failed()
            self.client.receive(deadline, f"{wanted} of run {self.prompt_id}")

    def wait(self, timeout: float = 300) -> Run:
        """Until the end. Raises ExecutionFailedError, InterruptedRunError or NoAnswerError."""
        if self.history is None:
            self.wait_for(lambda message: message.type in _ENDS, timeout)
            deadline = time.monotonic() + 15
            while self.history is None:  # written a moment after the message is sent
                self.history = self.client.get(f"/history/{self.prompt_id}").get(self.prompt_id)
                if self.history is None and time.monotonic() > deadline:
                    raise NoAnswerError(f"run {self.prompt_id} ended but never came into the history")
        self._raise_if_failed()
        return self

    def _raise_if_failed(self) -> None:
        for message in self.messages:
            if message.type == "execution_error":
                raise ExecutionFailedError(message.data)
            if message.type == "execution_interrupted":
                raise InterruptedRunError(
                    f"run {self.prompt_id} was interrupted at node {message.data.get('node_id')}"
                )


class Client:
    """A connection to one server.

    preview_metadata: announce the feature by which previews name their node (the browser's frontend does).
    """

    def __init__(self, url: str, *, preview_metadata: bool = True) -> None:
        self.url = url
        self.id = uuid.uuid4().hex
        self.messages: list[Message] = []
        self._http = requests.Session()
        self._http.trust_env = False  # no proxies on the way to localhost
        address = f"{url.replace('http', 'ws', 1)}/ws?clientId={self.id}"
        self._socket = websocket.create_connection(address, timeout=30, suppress_origin=True)
        if preview_metadata:
            self._socket.send(
                json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            )
            deadline = time.monotonic() + 10
            while not any(message.type == "feature_flags" for message in self.messages):
                self.receive(deadline, "feature flags")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._http.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """GET a JSON document."""
        reply = self._http.get(self.url + path, params=parameters, timeout=60)
        reply.raise_for_status()
        return reply.json()

    def post(self, path: str, body: Any = None) -> Any:
        """POST JSON; returns the reply's JSON, None where it has none."""
        reply = self._http.post(self.url + path, json=body if body is not None else {}, timeout=60)
        reply.raise_for_status()
        return reply.json() if reply.content and "json" in reply.headers.get("content-type", "") else None

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """Descriptions of all nodes, or of one ({} if the server lacks it)."""
        info = self.get(f"/object_info/{node}" if node else "/object_info")
        return info.get(node, {}) if node else info

    def queue(self, workflow: Workflow, *, allow_node_errors: bool = False, **extra: Any) -> Run:
        """Queue and return at once. Raises PromptRejectedError, also when only some outputs are invalid."""
        first, queued_at = len(self.messages), time.monotonic()
        body = {"prompt": workflow, "client_id": self.id, **extra}
        reply = self._http.post(self.url + "/prompt", json=body, timeout=60)
        if "json" not in reply.headers.get("content-type", ""):
            raise PromptRejectedError({"error": f"HTTP {reply.status_code}: {reply.text[:500]}"})
        answer = reply.json()
        if not reply.ok or (answer.get("node_errors") and not allow_node_errors):
            raise PromptRejectedError(answer)
        return Run(answer["prompt_id"], self, queued_at, _first=first)

    def run(self, workflow: Workflow, timeout: float = 300, **extra: Any) -> Run:
        """Queue and wait for the end."""
        return self.queue(workflow, **extra).wait(timeout)

    def interrupt(self) -> None:
        """Stop what is running."""
        self.post("/interrupt")

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """What the browser's "unload models" button does; the worker acts on it between runs."""
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def upload_image(self, image: Path | bytes, name: str | None = None) -> str:
        """Put a file into the server's input folder; returns the name to give LoadImage (it serves videos as
        well).
        """
        content = image if isinstance(image, bytes) else image.read_bytes()
        name = name or (f"{uuid.uuid4().hex}.png" if isinstance(image, bytes) else image.name)
        reply = self._http.post(
            self.url + "/upload/image",
            files={"image": (name, content)},
            data={"overwrite": "true"},
            timeout=60,
        )
        reply.raise_for_status()
        stored = reply.json()
        return f"{stored['subfolder']}/{stored['name']}".lstrip("/")

    def fetch(self, file: dict[str, str]) -> bytes:
        """The contents of an output file as named by Run.files()."""
        wanted = {key: file.get(key, "") for key in ("filename", "subfolder", "type")}
        reply = self._http.get(self.url + "/view", params=wanted, timeout=60)
        reply.raise_for_status()
        return reply.content

    def receive(self, deadline: float, awaited: str = "a message") -> Message:
        """The next message, appended to `messages`. Raises NoAnswerError at the deadline (time.monotonic)."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise NoAnswerError(
                f"no {awaited} in time; last seen: {[message.type for message in self.messages[-8:]]}"
            )
        self._socket.settimeout(left)
        try:
            frame = self._socket.recv()
        except websocket.WebSocketTimeoutException:
            return self.receive(0, awaited)
        except (websocket.WebSocketException, OSError) as error:
            raise NoAnswerError(
                f"the server closed the connection while {awaited} was awaited: {error}"
            ) from error
        message = _parse(frame)
        self.messages.append(message)
        return message


def _parse(frame: str | bytes) -> Message:
    if isinstance(frame, str):
        if not frame:
            raise NoAnswerError("the server closed the connection")
        said = json.loads(frame)
        return Message(said["type"], said.get("data") or {})
    (kind,) = struct.unpack_from(">I", frame)
    if kind == _PREVIEW:
        return Message("preview", {"image": frame[8:], "format": frame[4:8]})
    if kind not in (_TEXT, _PREVIEW_WITH_METADATA):
        return Message(f"binary {kind}", {"bytes": frame[4:]})
    (length,) = struct.unpack_from(">I", frame, 4)
    head, rest = frame[8 : 8 + length].decode("utf-8"), frame[8 + length :]
    if kind == _TEXT:
        return Message("progress_text", {"node": head, "text": rest.decode("utf-8", "replace")})
    return Message("preview", {**json.loads(head), "image": rest})
