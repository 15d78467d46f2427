"""`make demo`: a picture from text and an edit of a real photo, on random weights; in ComfyUI where one can
be had.

Where there is no ComfyUI (no network, LANCE_HOST=off), the same two through the command line.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import comfyui
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo"
WORKFLOWS = ROOT / "workflows" / "api"
SMALLER = {
    "steps": 12,
    "size": "custom",
    "width": 512,
    "height": 512,
    "resolution": "image_512res",
}  # quick on a CPU
SECONDS = 300


def lance(*args: str) -> None:
    """Run one command of the command line, showing it."""
    print("$ python -m lance_core", *(f'"{a}"' if " " in a else a for a in args), flush=True)
    subprocess.run([sys.executable, "-m", "lance_core", *args], cwd=ROOT, check=True)


def photo(path: Path) -> None:
    """A real photo: the astronaut that comes with scikit-image."""
    from skimage import data

    Image.fromarray(data.astronaut()).save(path)


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """JSON from the server, by GET or by POST."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait(what: str, get: Any, process: subprocess.Popen) -> Any:
    """Poll until `get` gives something."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended while waiting for {what}; its log is {OUT / 'comfyui.log'}")
        try:
            found = get()
        except (urllib.error.URLError, ConnectionError):
            found = None
        if found:
            return found
        time.sleep(0.3)
    raise RuntimeError(f"{what} took more than {SECONDS} s; ComfyUI's log is {OUT / 'comfyui.log'}")


def queue(url: str, name: str, process: subprocess.Popen) -> Path:
    """Queue one of the pack's workflows over plain HTTP, made smaller, and return the picture it saved."""
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        node["inputs"] |= {key: value for key, value in SMALLER.items() if key in node["inputs"]}
    print(f"queueing workflows/api/{name}.json", flush=True)
    job = ask(f"{url}/prompt", {"prompt": graph})["prompt_id"]
    done = wait(name, lambda: ask(f"{url}/history/{job}").get(job), process)
    if done["status"]["status_str"] != "success":
        raise RuntimeError(f"{name} failed in ComfyUI: {json.dumps(done['status']['messages'][-1])[:1000]}")
    saved = [image for output in done["outputs"].values() for image in output.get("images", [])]
    return OUT / "comfyui" / "output" / saved[0]["subfolder"] / saved[0]["filename"]


def in_comfyui(found: comfyui.Host) -> list[Path]:
    """Start ComfyUI headless with the pack in it, run two workflows, stop it."""
    base = comfyui.lay_out(OUT / "comfyui", models={"lance": OUT / "models"})
    shutil.copy(OUT / "photo.png", base / "input" / "example.png")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [found.python, found.path / "main.py", *comfyui.arguments(base), "--port", port]
    print(f"starting ComfyUI {found.version} ({found.path}) on {url}", flush=True)
    with (
        open(OUT / "comfyui.log", "wb") as log,
        subprocess.Popen(list(map(str, command)), cwd=base, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            wait("ComfyUI's start", lambda: ask(f"{url}/system_stats"), process)
            return [queue(url, name, process) for name in ("lance_text_to_image", "lance_image_edit")]
        finally:
            process.terminate()


def on_the_command_line() -> list[Path]:
    """The same two pictures without ComfyUI."""
    model = ("-m", str(OUT / "models" / "Lance_3B"))
    pictures = [OUT / "t2i.png", OUT / "edit.png"]
    size = ("--width", "512", "--height", "512", "--steps", "12")
    lance("t2i", "a lighthouse in a storm, oil on canvas", "-o", str(pictures[0]), *size, *model)
    edit = ("--resolution", "image_512res", "--steps", "12")
    lance(
        "image_edit", "make it a watercolour", str(OUT / "photo.png"), "-o", str(pictures[1]), *edit, *model
    )
    return pictures


def main() -> None:
    """Write the tiny checkpoint, make two pictures, say where they are, how they were made and what they are
    worth.
    """
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    photo(OUT / "photo.png")
    lance("tiny", str(OUT / "models"))
    mode = os.environ.get("LANCE_HOST", "auto")
    try:
        found = comfyui.prepare_newest(may_build=mode == "auto") if mode != "off" else None
        reason = "LANCE_HOST=off"
    except comfyui.HostUnavailableError as error:
        found, reason = None, str(error)
    pictures = in_comfyui(found) if found else on_the_command_line()
    how = (
        f"through the API of ComfyUI {found.version}"
        if found
        else f"on the command line, because there is no ComfyUI ({reason})"
    )
    print(
        f"\nTwo pictures were made {how}:\n  {pictures[0]}\n  {pictures[1]}  (an edit of {OUT / 'photo.png'})"
    )
    print(
        "They show noise: this checkpoint's weights are random, made here so that everything can be tried "
        "without 25 GB.\n"
        "The real weights are on Hugging Face, bytedance-research/Lance; README.md says where to put them."
    )


if __name__ == "__main__":
    main()
