"""What needs a ComfyUI, and a browser, to be made: the node descriptions, the thumbnails and the pictures of
the README.

Run by workflows.py in a Python that has playwright; the ComfyUI comes from comfyui.py, the tiny checkpoint
from tests/golden.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfyui
from workflow_graphs import TITLES

if TYPE_CHECKING:
    from harness import ComfyServer

ROOT = Path(__file__).absolute().parents[1]
README_PICTURES = {
    "lance_text_to_image": "text_to_image",
    "lance_image_edit": "image_edit",
    "lance_text_to_video": "text_to_video",
    "lance_best_of_n": "best_of_n",
    "lance_chat_then_edit": "chat_then_edit",
    "lance_enhance_to_video": "enhance_to_video",
    "lance_first_and_last_frame": "first_and_last_frame",
    "lance_minute_of_video": "minute_of_video",
    "lance_storyboard": "storyboard",
}
WINDOW = (3600, 1500)  # large, so that every text is drawn when the whole graph is in view
THUMBNAIL, PICTURE = 640, 1400  # pixels wide
ACCENTS = {"SaveVideo": "#7b3f8f", "SaveImage": "#2f6690", "PreviewAny": "#2e7d52"}  # by what comes out
MARGIN = 16

# Where the groups lie in the window, after bringing all of them into view without the panels around the
# canvas.
_FRAME = """async margin => {
  const {canvas, graph} = app, boxes = graph._groups.map(group => group._bounding);
  const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
  const width = Math.max(...boxes.map(b => b[0] + b[2])) - left;
  const height = Math.max(...boxes.map(b => b[1] + b[3])) - top;
  const area = canvas.canvas.getBoundingClientRect(), bar = 120;
  const scale = Math.min((area.width - 200) / width, (area.height - bar - 100) / height, 1.25);
  canvas.ds.scale = scale;
  canvas.ds.offset = [(150 + margin) / scale - left, (bar + margin) / scale - top];
  canvas.setDirty(true, true);
  return {x: area.left + 150, y: area.top + bar,
    width: width * scale + 2 * margin, height: height * scale + 2 * margin};
}"""
# Both draw on a canvas in the page, which has fonts and filters; `png` is the screenshot in base64.
_SHRINK = """async ([png, width]) => {
  const image = new Image();
  image.src = 'data:image/png;base64,' + png;
  await image.decode();
  const canvas = document.createElement('canvas'), context = canvas.getContext('2d');
  [canvas.width, canvas.height] = [width, Math.round(image.height * width / image.width)];
  context.imageSmoothingQuality = 'high';
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/png').split(',')[1];
}"""
_CARD = """async ([png, side, title, accent]) => {
  const image = new Image();
  image.src = 'data:image/png;base64,' + png;
  await image.decode();
  const canvas = document.createElement('canvas'), context = canvas.getContext('2d');
  canvas.width = canvas.height = side;
  context.imageSmoothingQuality = 'high';
  context.fillStyle = '#1b1d21';
  context.fillRect(0, 0, side, side);
  context.fillStyle = accent;
  context.fillRect(0, 0, side, side * 0.32);
  context.fillStyle = '#fff';
  context.textAlign = 'center';
  context.font = '500 30px Inter, sans-serif';
  context.fillText('Lance', side / 2, side * 0.11);
  context.font = '600 56px Inter, sans-serif';
  context.fillText(title, side / 2, side * 0.23, side * 0.94);
  const height = image.height * side / image.width, room = side * 0.68;
  context.drawImage(image, 0, side - room + Math.max(0, (room - height) / 2), side, height);
  return canvas.toDataURL('image/jpeg', 0.85).split(',')[1];
}"""


def _test_tool(name: str) -> Any:
    """A module of tests/host, by its file: scripts are no package that could import it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "host" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"tests/host/{name}.py is not there")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def server(newest: bool = False) -> Iterator[ComfyServer]:
    """A ComfyUI with the pack, the tiny checkpoint and ComfyUI's own example picture, gone afterwards."""
    ComfyServer = _test_tool("harness").ComfyServer
    with tempfile.TemporaryDirectory() as base:
        found = comfyui.prepare()
        root = comfyui.frontend_root() if newest else None
        with ComfyServer(
            found, Path(base), models={"lance": ROOT / "tests" / "golden" / "checkpoint"}, front_end_root=root
        ) as started:
            shutil.copy(found.path / "input" / "example.png", started.input)
            yield started


def object_info() -> dict[str, Any]:
    """/object_info of a ComfyUI with the pack."""
    with server() as started, urllib.request.urlopen(f"{started.url}/object_info") as reply:
        return json.load(reply)


def draw(names: list[str]) -> None:
    """workflows/NAME.jpg of each, and docs/images/*.png of some."""
    Browser = _test_tool("browser").Browser
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    with server(newest=True) as started:
        browser = Browser()
        try:
            page = browser.open(started, size=WINDOW)
            page.set_setting("Comfy.Minimap.Visible", False)
            page.set_setting("Comfy.Graph.CanvasInfo", False)
            for name in names:
                page.load_graph(ROOT / "workflows" / f"{name}.json", name)
                frame = page.page.evaluate(_FRAME, MARGIN)
                page.page.wait_for_timeout(1500)  # pictures in the nodes
                png = base64.b64encode(page.page.screenshot(clip=frame)).decode()
                accent = next(ACCENTS[node["type"]] for node in page.nodes() if node["type"] in ACCENTS)
                card = page.page.evaluate(_CARD, [png, THUMBNAIL, TITLES[name], accent])
                (ROOT / "workflows" / f"{name}.jpg").write_bytes(base64.b64decode(card))
                if name in README_PICTURES:
                    picture = base64.b64decode(page.page.evaluate(_SHRINK, [png, PICTURE]))
                    (images / f"{README_PICTURES[name]}.png").write_bytes(picture)
        finally:
            browser.close()
