"""ComfyUI's HTTP interface, as far as a batch needs it. A server that does not answer is an OSError."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any

from ..errors import RequestError

TIMEOUT = 20.0  # seconds for an answer; a queue answers while it works
MAX_ANSWER = 8 << 30  # bytes


class ComfyError(RequestError):
    """The server refused a workflow, or a node of it failed: that row's fault."""


class Server:
    """One server. url: such as http://127.0.0.1:8188.

    Raises (in every call):
        OSError: it does not answer, or breaks off.
        ComfyError: it answers that something is wrong.
    """

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(f"{url[:100]!r} is no address of a ComfyUI; expected such as http://host:8188")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            self._ask("/system_stats")
        except (OSError, RequestError):
            return False
        return True

    def upload(self, name: str, data: bytes, folder: str) -> str:
        """Put a file among the server's inputs; returns what nodes call it."""
        border = uuid.uuid4().hex
        fields = {"subfolder": folder, "overwrite": "true", "type": "input"}
        head = "".join(
            f'--{border}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            for key, value in fields.items()
        )
        file = f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        file += "Content-Type: application/octet-stream\r\n\r\n"
        body = head.encode() + file.encode() + data + f"\r\n--{border}--\r\n".encode()
        reply = json.loads(
            self._ask("/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={border}"})
        )
        return "/".join(part for part in (reply.get("subfolder"), reply["name"]) if part)

    def queue(self, graph: dict[str, Any], prompt_id: str, about: dict[str, Any]) -> str:
        """Queue a workflow; returns the id it has. about: kept in the files it writes, by its own names."""
        asked = {"prompt": graph, "prompt_id": prompt_id, "extra_data": {"extra_pnginfo": about}}
        reply = json.loads(
            self._ask("/prompt", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        )
        return str(reply["prompt_id"])

    def known(self, prompt_id: str) -> bool:
        """Whether a workflow waits or runs there now."""
        queue = json.loads(self._ask("/queue"))
        rows = [*queue.get("queue_running", ()), *queue.get("queue_pending", ())]
        return any(len(row) > 1 and row[1] == prompt_id for row in rows)

    def ended(self, prompt_id: str) -> dict[str, Any] | None:
        """What is known of a workflow that has run; None while it has not."""
        history = json.loads(self._ask(f"/history/{urllib.parse.quote(prompt_id)}"))
        return history.get(prompt_id)

    def fetch(self, file: dict[str, str]) -> bytes:
        """A file that a node wrote, as the history names it."""
        names = {key: file.get(key, "") for key in ("filename", "subfolder", "type")}
        return self._ask(f"/view?{urllib.parse.urlencode(names)}")

    def _ask(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, body, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                return reply.read(MAX_ANSWER)
        except urllib.error.HTTPError as error:
            said = error.read(1 << 20).decode(errors="replace")
            if error.code >= 500:
                raise OSError(f"{self.url} answered {error.code}") from None
            raise ComfyError(f"{self.url} refused it: {_reason(said) or error.code}"[:500]) from None
        except http.client.HTTPException as error:
            raise OSError(f"{self.url} broke off ({type(error).__name__})") from None


def _reason(said: str) -> str:
    """What a refusal says, in a line: each node's complaint, else the general one."""
    try:
        reply = json.loads(said)
        errors = [
            f"{account.get('class_type')}: {one.get('message')} ({one.get('details')})"
            for account in (reply.get("node_errors") or {}).values()
            for one in account.get("errors", ())
        ]
        general = reply.get("error")
        general = general.get("message") if isinstance(general, dict) else general
        return "; ".join(errors) or str(general or "")
    except (ValueError, AttributeError, TypeError):
        return " ".join(said.split())[:200]


def failure(ended: dict[str, Any]) -> str | None:
    """Why a workflow that has ended gave nothing; None when it did what it should."""
    status = ended.get("status") or {}
    for kind, data in reversed(status.get("messages") or []):
        if kind == "execution_error":
            told = " ".join(str(data.get("exception_message", "")).split())
            return f"{data.get('node_type')}: {told}"[:480]
        if kind == "execution_interrupted":
            return "it was interrupted at the server"
    return None if status.get("status_str", "success") == "success" else "the server says that it failed"


def outputs_of(ended: dict[str, Any]) -> tuple[list[dict[str, str]], list[str]]:
    """The files and texts that a workflow's output nodes show; of files, saved ones if there are any."""
    files: list[dict[str, str]] = []
    texts: list[str] = []
    for shown in (ended.get("outputs") or {}).values():
        for name, items in shown.items():
            listed = items if isinstance(items, list | tuple) else []
            files += [one for one in listed if isinstance(one, dict) and "filename" in one]
            texts += [one for one in listed if name == "text" and isinstance(one, str)]
    saved = [file for file in files if file.get("type") == "output"]
    return saved or files, texts
