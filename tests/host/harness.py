"""A ComfyUI server of our own to test against, and comfy-cli as a stranger's client to it.

Nothing here touches the checkout: the server runs out of a --base-directory with its own models, input,
output and user folders, into whose custom_nodes the pack is linked.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfyui as comfyui_script  # scripts/comfyui.py, by pytest's pythonpath

# What ComfyUI logs when it leaves out a node file or a whole pack.
LOAD_FAILURES = (
    "IMPORT FAILED",
    "PRESTARTUP FAILED",
    "Error while calling comfy_entrypoint",
    "Cannot import ",
    "due to the lack of",
)


class ServerDiedError(RuntimeError):
    """The server exited or never answered. Carries the end of its log."""


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """A real ComfyUI process.

    base: an empty or earlier --base-directory; everything the server writes goes below it.
    models: folder name below models/ -> directory to link there, e.g. {"lance": tiny_checkpoint}.
    pack: directory to link into custom_nodes, None for a bare ComfyUI.
    extra: further arguments, e.g. ("--preview-method", "latent2rgb").
    front_end_root: static folder of another frontend (host.frontend_root()).
    """

    def __init__(
        self,
        host: comfyui_script.Host,
        base: Path,
        *,
        models: Mapping[str, Path] | None = None,
        pack: Path | None = comfyui_script.PACK,
        extra: Sequence[str] = (),
        front_end_root: Path | None = None,
        cpu: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.host = host
        self.base = comfyui_script.lay_out(Path(base), pack=pack, models=dict(models or {}))
        self.log_path = self.base / "server.log"
        self.extra = [*extra, *(("--front-end-root", str(front_end_root)) if front_end_root else ())]
        self.cpu = cpu
        self.env = dict(env or {})
        self.port = 0
        self.seconds_to_start = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> Path:
        return self.base / "output"

    @property
    def input(self) -> Path:
        return self.base / "input"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerDiedError("the server has not been started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 180) -> ComfyServer:
        """Start and wait until /system_stats answers. Raises ServerDiedError with the end of the log."""
        if self.running:
            raise RuntimeError("already running")
        self.port = free_port()
        command = [
            str(self.host.python),
            str(self.host.path / "main.py"),
            *comfyui_script.arguments(self.base, cpu=self.cpu),
        ]
        command += ["--port", str(self.port), *self.extra]
        environment = {
            **os.environ,
            "DO_NOT_TRACK": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            **self.env,
        }
        environment.pop("PYTHONPATH", None)
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        began = time.monotonic()
        with open(self.log_path, "ab") as log:
            # A session of its own: one signal ends it and whatever it started, and nothing else.
            self._process = subprocess.Popen(
                command,
                cwd=self.base,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            while not self._answers():
                if self._process.poll() is not None:
                    raise ServerDiedError(
                        f"ComfyUI exited with {self._process.returncode}:\n{self.log_tail()}"
                    )
                if time.monotonic() - began > timeout:
                    raise ServerDiedError(
                        f"ComfyUI did not answer within {timeout:.0f} s:\n{self.log_tail()}"
                    )
                time.sleep(0.1)
        except BaseException:
            self.stop()
            raise
        self.seconds_to_start = time.monotonic() - began
        return self

    def stop(self, timeout: float = 15) -> None:
        """End the server's process group, politely first. Harmless when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        for politeness in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(process.pid, politeness)
            except ProcessLookupError:
                break
            try:
                process.wait(timeout)
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()

    def restart(self) -> ComfyServer:
        """Stop and start again on the same base directory (the port changes)."""
        self.stop()
        return self.start()

    def log(self) -> str:
        """What the server has logged since its last start."""
        with open(self.log_path, "rb") as handle:
            handle.seek(self._log_start)
            return handle.read().decode("utf-8", "replace")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def assert_clean_start(self) -> None:
        """Fail if ComfyUI left out the pack or any of its own nodes."""
        lines = self.log().splitlines()
        bad = [index for index, line in enumerate(lines) if any(mark in line for mark in LOAD_FAILURES)]
        assert not bad, "ComfyUI left something out:\n" + "\n".join(lines[max(0, bad[0] - 25) : bad[-1] + 3])

    def held(self) -> dict[str, int]:
        """What the server process holds (Linux): `resident` memory in bytes, `descriptors`, `threads`."""
        place = Path(f"/proc/{self.pid}")
        for line in (place / "status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return {
                    "resident": int(line.split()[1]) * 1024,
                    "descriptors": len(os.listdir(place / "fd")),
                    "threads": len(os.listdir(place / "task")),
                }
        raise ServerDiedError("no VmRSS: the server has exited")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False


class CliError(RuntimeError):
    """comfy-cli failed. `code` is its error.code where it gave one."""

    def __init__(self, returncode: int, events: list[dict[str, Any]], output: str) -> None:
        errors = [event["error"] for event in events if isinstance(event.get("error"), dict)]
        self.code = errors[-1].get("code") if errors else None
        self.events = events
        super().__init__(f"comfy-cli exited with {returncode}: {errors[-1] if errors else output[-2000:]}")


class ComfyCli:
    """comfy-cli as its users run it, with a home of its own so that it neither asks, tracks nor remembers."""

    def __init__(self, program: Path, home: Path, server: ComfyServer) -> None:
        self.program = program
        self.home = home
        self.server = server

    def __call__(self, *arguments: str, timeout: float = 300) -> list[dict[str, Any]]:
        """Run `comfy --skip-prompt --json ...` and return the JSON objects it printed. Raises CliError."""
        environment = {
            **os.environ, "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / "config"), "DO_NOT_TRACK": "1",
            "COMFY_NO_WATCH": "1", "NO_COLOR": "1",
        }  # fmt: skip
        command = [str(self.program), "--skip-prompt", "--json", *arguments]
        done = subprocess.run(
            command,
            env=environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        events = _json_objects(done.stdout)
        if done.returncode:
            raise CliError(done.returncode, events, done.stdout + done.stderr)
        return events

    def run(self, workflow: Path, timeout: float = 300) -> list[dict[str, Any]]:
        """Run a workflow file, in API or UI format, and wait for its end."""
        return self("run", "--workflow", str(workflow), *self._where(), "--wait", timeout=timeout)

    def _where(self) -> tuple[str, ...]:
        return ("--host", "127.0.0.1", "--port", str(self.server.port))


def _json_objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in `text`: one per line, or one spread over lines."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            at += 1
            continue
        found.append(value)
    return found
