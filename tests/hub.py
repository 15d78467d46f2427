"""A local stand-in for the Hugging Face hub: what the downloader asks of it, with the ways a network fails,
on order.

with Hub(files) as hub: download(..., endpoint=hub.url). `hub.faults[path]` is a list, one entry used up by
each request for the file's bytes (None: none); its last entry may be ("always", fault). Faults: "stall",
"truncate", "corrupt", "disconnect", "no-range", "wrong-size", "too-long", or an HTTP status. `hub.requests`
notes (path, first byte asked for, Authorization header) of each.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "bytedance-research/Lance"
COMMIT = "c0ffee" + "0" * 34
LARGE = (".safetensors", ".pth")  # kept as LFS objects, and served from another host
VAE = "Wan2.2_VAE.pth"
CORE = Path(__file__).parent.parent / "lance_core"
PIECE = 4096  # bytes written at a time


def git_sha1(data: bytes) -> str:
    """The name git gives to a file of that content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def digest(path: str, data: bytes) -> str:
    """The hash by which the hub names a file."""
    return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else git_sha1(data)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder as a repository's."""
    return {
        f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


def released(model_bytes: int = 300_000) -> dict[str, bytes]:
    """A repository of the released layout, of bytes that mean nothing."""
    files = {"Wan2.2_VAE.pth": bytes(i * 7 % 251 for i in range(50_000)), "README.md": b"# Lance"}
    files |= {
        "Qwen2.5-VL-ViT/config.json": b"{}",
        "Qwen2.5-VL-ViT/vit.safetensors": bytes(i * 3 % 253 for i in range(20_000)),
    }
    for name in ("Lance_3B", "Lance_3B_Video"):
        texts = ("llm_config.json", "tokenizer.json", "vocab.json", "merges.txt", "generation_config.json")
        files |= {f"{name}/{text}": f"{name} {text}\n".encode() for text in texts}
        files[f"{name}/model.safetensors"] = bytes((i * i + len(name)) % 241 for i in range(model_bytes))
    return files


class Hub:
    """The server; a context manager. `rate` limits it to so many bytes a second."""

    def __init__(self, files: dict[str, bytes], rate: float | None = None) -> None:
        self.files, self.rate, self.commit = files, rate, COMMIT
        self.faults: dict[str, list[Any]] = {}
        self.api_faults: list[int] = []  # HTTP statuses
        self.requests: list[tuple[str, int, str | None]] = []
        self.api_requests: list[str] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, path: str) -> Any:
        """The next fault of a file, used up unless it is to stay."""
        with self._lock:
            due = self.faults.get(path) or [None]
            if isinstance(due[0], tuple):
                return due[0][1]
            return due.pop(0) if path in self.faults else None

    def listing(self) -> dict[str, Any]:
        """What the hub says of the repository."""
        siblings = []
        for path, data in self.files.items():
            one: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
            if path.endswith(LARGE):
                one["lfs"] = {"sha256": digest(path, data), "size": len(data), "pointerSize": 134}
            siblings.append(one)
        return {
            "id": REPO,
            "modelId": REPO,
            "sha": self.commit,
            "private": False,
            "tags": [],
            "siblings": siblings,
        }

    def cache(self, folder: Path, paths: list[str]) -> None:
        """Write files as huggingface_hub's cache in `folder` (HF_HOME/hub) would hold them."""
        base = folder / f"models--{REPO.replace('/', '--')}"
        (base / "refs").mkdir(parents=True)
        (base / "refs" / "main").write_text(self.commit)
        (base / "blobs").mkdir()
        for path in paths:
            blob, link = (
                base / "blobs" / digest(path, self.files[path]),
                base / "snapshots" / self.commit / path,
            )
            blob.write_bytes(self.files[path])
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Tests read `hub.requests` instead."""

    def do_GET(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        if match := re.fullmatch(rf"/api/models/{REPO}/revision/([^/]+)", path):
            return self._listing(match[1])
        if match := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path):
            if match[1] not in (hub.commit, "main") or match[2] not in hub.files:
                return self._plain(404, b"Entry not found")
            if match[2].endswith(LARGE):  # on another host, as seen by a client
                return self._plain(302, b"", {"Location": f"http://localhost:{hub.port}/storage/{match[2]}"})
            return self._file(match[2])
        if match := re.fullmatch(r"/storage/(.+)", path):
            return self._file(match[1])
        return self._plain(404, b"Not found")

    def _listing(self, revision: str) -> None:
        hub = self.server_hub
        hub.api_requests.append(revision)
        if hub.api_faults:
            return self._plain(hub.api_faults.pop(0), b"{}")
        if revision not in (hub.commit, "main"):
            return self._plain(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        return self._plain(200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"})

    def _plain(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def _file(self, path: str) -> None:
        hub, data = self.server_hub, self.server_hub.files[path]
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(span[1]) if span else 0
        hub.requests.append((path, start, self.headers.get("Authorization")))
        fault = hub.fault(path)
        if isinstance(fault, int):
            return self._plain(fault, b"no")
        if fault == "no-range":
            span, start = None, 0
        if fault == "wrong-size":
            data = b"<html>please log in</html>"
        body = data[start:]
        if fault == "corrupt":
            body = bytes(b ^ 1 for b in body[:1]) + body[1:]
        if fault == "too-long":
            body += b"more"
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{digest(path, hub.files[path])}"')
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if fault == "too-long":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._body(body[: (len(body) + 1) // 2] if fault in ("stall", "truncate", "disconnect") else body)
        self.close_connection = fault is not None
        if fault == "stall":
            hub.closing.wait(60)
        if fault == "disconnect":  # a reset, not an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self.connection.close()

    def _body(self, body: bytes) -> None:
        try:
            for at in range(0, len(body), PIECE):
                self.wfile.write(body[at : at + PIECE])
                if self.server_hub.rate:
                    time.sleep(PIECE / self.server_hub.rate)
        except OSError:  # the client has gone, as it is meant to
            self.close_connection = True


# -- for tests of the download -------------------------------------------------------------------------------


def needed(hub: Hub, name: str = "Lance_3B") -> set[str]:
    """The paths a checkpoint is made of."""
    return {p for p in hub.files if p.startswith((f"{name}/", "Qwen2.5-VL-ViT/")) or p == VAE}


def there(root: Path) -> dict[str, bytes]:
    """The files under their final names."""
    return {
        p: data
        for p, data in files_of(root).items()
        if not p.endswith(".part") and not Path(p).name.startswith(".lance-")
    }


def damage(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# lance_core.hub.download without the rest of the package, so that a process starts quickly.
CHILD = """
import os, signal, sys, types
package = types.ModuleType("lance_core"); package.__path__ = [sys.argv[1]]
sys.modules["lance_core"] = package
from lance_core.hub import download, http, job, watch
watch.CHUNK, watch.POLL, job.MARGIN = 16384, 0.05, 0
import huggingface_hub.hf_api
where, count = sys.argv[4], [0]
def dying(call, after):
    def wrapped(*args, **kwargs):
        count[0] += 1
        if after: call(*args, **kwargs)
        if count[0] == int(sys.argv[5]): os.kill(os.getpid(), signal.SIGKILL)
        if not after: return call(*args, **kwargs)
    return wrapped
if where == "write": http.PartFile.write = dying(http.PartFile.write, True)
if where.endswith("replace"): os.replace = dying(os.replace, where == "after replace")
print("ready", flush=True)
print(download.download("Lance_3B", sys.argv[2], endpoint=sys.argv[3])["fetched"], flush=True)
"""


def child(hub: Hub, root: Path, where: str = "", count: int = 0) -> subprocess.Popen:
    """A process that downloads, about to begin; `where` and `count` choose when it kills itself."""
    command = [sys.executable, "-c", CHILD, str(CORE), str(root), hub.url, where, str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process
