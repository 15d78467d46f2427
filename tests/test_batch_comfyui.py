"""Rows at ComfyUI's interface, spoken by a server of the test's own that can refuse, lose and break off.

tests/host/test_batch_server.py has the same with a real ComfyUI.
"""

from __future__ import annotations

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from batching import INPUTS, files, lines, prompts, run, write_rows
from PIL import Image

from lance_core.errors import RequestError
from lance_core.inputs import media
from lance_core.scale import pool
from lance_core.scale.comfy_api import Server
from lance_core.scale.rows import Row
from lance_core.scale.workflow import NAMES, filled, read_workflow

PHOTO = str(INPUTS / "photo.png")
SIZED = {"width": 64, "height": 48, "steps": 2}


class Comfy:
    """As much of a ComfyUI as a batch talks to. seconds: that a workflow takes; fails: says why one does."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.queued, self.done = seconds, {}, {}
        self.uploads, self.asked, self.dead = {}, [], False
        self.fails = lambda graph: None
        self.refuses = lambda graph: None
        comfy = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args) -> None:
                pass

            def do_GET(self) -> None:
                comfy.answer(self, None)

            def do_POST(self) -> None:
                comfy.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, request, body: bytes | None) -> None:
        path, _, query = request.path.partition("?")
        if self.dead:
            request.close_connection = True
            request.connection.close()
            return
        self._run()
        if path == "/prompt":
            asked = json.loads(body)
            refused = self.refuses(asked["prompt"])
            if refused:
                return self._send(request, 400, refused)
            self.asked.append(asked)
            self.queued[asked["prompt_id"]] = (time.monotonic(), asked)
            return self._send(request, 200, {"prompt_id": asked["prompt_id"]})
        if path == "/queue":
            rows = [[0, name, asked["prompt"]] for name, (_, asked) in self.queued.items()]
            return self._send(request, 200, {"queue_running": rows[:1], "queue_pending": rows[1:]})
        if path.startswith("/history/"):
            name = path.rpartition("/")[2]
            return self._send(request, 200, {name: self.done[name]} if name in self.done else {})
        if path == "/upload/image":
            name = body.split(b'filename="')[1].split(b'"')[0].decode()
            data = body.split(b"octet-stream\r\n\r\n")[1].rpartition(b"\r\n--")[0]
            self.uploads[f"lance_batch/{name}"] = data
            return self._send(request, 200, {"name": name, "subfolder": "lance_batch", "type": "input"})
        if path == "/view":
            return self._send(request, 200, self.picture(query.split("filename=")[1].split("&")[0]))
        return self._send(request, 200, {})

    def _run(self) -> None:
        """Finish what is first in the queue and old enough."""
        for name, (at, asked) in list(self.queued.items())[:1]:
            if time.monotonic() - at >= self.seconds:
                del self.queued[name]
                self.done[name] = self.result(asked)

    def result(self, asked) -> dict:
        why = self.fails(asked["prompt"])
        if why:
            data = {"node_type": "LanceSampler", "exception_message": why}
            return {"outputs": {}, "status": {"status_str": "error", "messages": [["execution_error", data]]}}
        seed = next(n["inputs"]["seed"] for n in asked["prompt"].values() if "seed" in n["inputs"])
        count = max(n["inputs"].get("batch_size", 1) for n in asked["prompt"].values())
        shown = [{"filename": f"{seed + i}.png", "subfolder": "", "type": "output"} for i in range(count)]
        saw = [{"filename": "seen.png", "subfolder": "", "type": "temp"}]
        return {
            "outputs": {"9": {"images": shown}, "8": {"images": saw}},
            "status": {"status_str": "success"},
        }

    def picture(self, name: str) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (int(name.removesuffix(".png")) % 256, 0, 0)).save(file, "PNG")
        return file.getvalue()

    @staticmethod
    def _send(request, code: int, content) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(code)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


@pytest.fixture
def comfy():
    made = []

    def make(seconds: float = 0.0) -> Comfy:
        made.append(Comfy(seconds))
        return made[-1]

    yield make
    for one in made:
        one.http.shutdown()
        one.http.server_close()


def at(servers, file: Path, output: Path, **options):
    urls = ",".join(one.url for one in servers)
    return run(file, output, checkpoint="Lance_3B", comfyui=urls, dtype=None, **SIZED | options)


# -- workflows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", NAMES)
def test_the_packs_own_workflow_of_each_task_takes_a_row(task):
    media_of = {"image": "a.png", "video": "a.mp4", "references": ["a.png"]}
    row = Row(0, "a", task, "what is wanted", checkpoint="some/Lance_3B_Video", options={"seed": 7})
    taken = media_of.get(row.kind.takes or "", [])
    taken = [taken] if isinstance(taken, str) else taken
    graph = filled(read_workflow(None, task), row, taken, "lance_batch/key")
    values = [v for node in graph.values() for v in node["inputs"].values() if not isinstance(v, list)]
    assert values.count("what is wanted") == 1 and values.count(7) >= 1 and "Lance_3B_Video" in values
    assert [v for v in values if v in ("a.png", "a.mp4")] == taken
    if row.kind.output != "text":
        assert "lance_batch/key" in values


def test_options_go_where_nodes_have_them():
    options = {"width": 64, "height": 48, "num_frames": 9, "steps": 3, "shift": 2.0, "cfg": 5.0}
    options |= {"cfg_interval": [0.3, 0.9], "renorm": "none", "batch_size": 2, "negative_prompt": "no"}
    graph = filled(read_workflow(None, "t2v"), Row(0, "a", "t2v", "x", options=options), [], "p")
    found = {name: value for node in graph.values() for name, value in node["inputs"].items()}
    wanted = {"size": "custom", "width": 64, "height": 48, "frames": 9, "steps": 3, "shift": 2.0, "cfg": 5.0}
    wanted |= {"cfg_start": 0.9, "cfg_end": 0.3, "renorm": "none", "batch_size": 2, "negative_prompt": "no"}
    assert wanted.items() <= found.items()


@pytest.mark.parametrize(
    ("options", "pictures", "said"),
    [
        ({"temperature": 1}, ["a.png"], "no input for temperature"),
        ({}, ["a.png", "b.png"], "1 LoadImage nodes"),
    ],
)
def test_what_the_workflow_has_no_place_for(options, pictures, said):
    row = Row(0, "a", "image_edit", "x", options=options)
    with pytest.raises(RequestError, match=said):
        filled(read_workflow(None, "image_edit"), row, pictures, "p")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"nodes": [], "links": []}', '{"1": {"class_type": "X"}}']
)
def test_what_is_no_workflow(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(RequestError):
        read_workflow(path, "t2i")


# -- servers -------------------------------------------------------------------------------------------------


def test_rows_are_filled_queued_followed_and_fetched(comfy, tmp_path):
    server, file = comfy(), write_rows(tmp_path / "a.jsonl", prompts(4))
    result = at([server], file, tmp_path / "out", batch_size=2)
    assert (result["made"], result["failed"]) == (4, 0)
    graph = server.asked[3]["prompt"]
    inputs = {key: value for node in graph.values() for key, value in node["inputs"].items()}
    assert (inputs["prompt"], inputs["seed"], inputs["width"]) == ("a fox, number 3", 3, 64)
    assert files(tmp_path / "out")["r03_1.png"] == server.picture("4.png")
    line = lines(tmp_path / "out")["r03"]
    assert (line["file"], line["seed"], line["error"]) == ("r03_0.png", 3, None)
    assert at([server], file, tmp_path / "out", batch_size=2)["done"] == 4 and len(server.asked) == 4
    assert at([server], file, tmp_path / "out", batch_size=2, steps=3)["made"] == 4, "another request"


def test_media_go_along(comfy, tmp_path):
    server = comfy()
    row = {"id": "a", "task": "image_edit", "prompt": "blue", "image": PHOTO}
    file = write_rows(tmp_path / "a.jsonl", [row])
    result = at([server], file, tmp_path / "out", task=None, width=None, height=None)
    assert result["made"] == 1
    ((name, data),) = server.uploads.items()
    assert data == Path(PHOTO).read_bytes()
    loaded = [
        n["inputs"]["image"] for n in server.asked[0]["prompt"].values() if n["class_type"] == "LoadImage"
    ]
    assert loaded == [name]


def test_a_row_the_server_refuses_or_fails_at_is_its_line(comfy, tmp_path):
    server = comfy()
    error = {"message": "Value not in list", "details": "checkpoint: 'x'"}
    server.refuses = lambda graph: (
        {"node_errors": {"2": {"class_type": "LanceLoader", "errors": [error]}}}
        if "number 1" in str(graph)
        else None
    )
    server.fails = lambda graph: "out of paint" if "number 2" in str(graph) else None
    file = write_rows(tmp_path / "a.jsonl", [*prompts(4), {"id": "g", "prompt": "x", "max_new_tokens": 3}])
    result = at([server], file, tmp_path / "out")
    found = lines(tmp_path / "out")
    assert (result["made"], result["failed"]) == (2, 3)
    assert "LanceLoader: Value not in list (checkpoint: 'x')" in found["r01"]["error"]
    assert "LanceSampler: out of paint" in found["r02"]["error"]
    server.fails = server.refuses = lambda graph: None
    assert at([server], file, tmp_path / "out")["skipped"] == 2
    assert at([server], file, tmp_path / "out", retry_errors=True)["made"] == 2


def test_a_picture_in_the_format_that_the_id_asks_for(comfy, tmp_path):
    rows = [{"id": "a.webp", "prompt": "x", "seed": 9}, {"id": "b.png", "prompt": "x"}]
    assert at([comfy()], write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out")["made"] == 2
    with Image.open(tmp_path / "out" / "a.webp") as picture:
        assert picture.format == "WEBP" and picture.size == (4, 4)
    assert media.read_metadata(tmp_path / "out" / "a.webp")["prompt"] == "x"


def test_a_layouts_grid(comfy, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"index": "7", "data": "x"}])
    assert at([comfy()], file, tmp_path / "out", layout="dpg", task=None)["made"] == 1
    sheet = media.load_image(tmp_path / "out" / "7.png")
    assert sheet.shape == (8, 8, 3) and [int(sheet[y, x, 0]) for y, x in ((0, 0), (0, 4), (4, 0))] == [
        42,
        43,
        44,
    ]


def test_two_servers_share_the_rows(comfy, tmp_path):
    both = [comfy(0.05), comfy(0.05)]
    assert at(both, write_rows(tmp_path / "a.jsonl", prompts(8)), tmp_path / "out")["made"] == 8
    asked = [len(one.asked) for one in both]
    assert sum(asked) == 8 and min(asked) >= 2


def test_a_server_that_dies_in_the_middle(comfy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pool, "REST", 0.1)
    first, second = comfy(0.05), comfy(0.05)

    def die(line) -> None:
        first.dead = True

    file = write_rows(tmp_path / "a.jsonl", prompts(8))
    result = at([first, second], file, tmp_path / "out", on_line=die)
    assert (result["made"], result["failed"]) == (8, 0)
    assert len(lines(tmp_path / "out")) == 8


def test_a_server_that_comes_back(comfy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pool, "REST", 0.1)
    server = comfy(0.02)

    def die(line) -> None:
        if line["id"] == "r02":
            server.dead = True
            server.queued.clear()
            threading.Timer(1, lambda: setattr(server, "dead", False)).start()

    file = write_rows(tmp_path / "a.jsonl", prompts(6))
    assert at([server], file, tmp_path / "out", on_line=die)["made"] == 6


def test_servers_that_stay_away(comfy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pool, "REST", 0.05)
    monkeypatch.setattr(pool, "PATIENCE", 0.5)
    server = comfy(0.02)
    file = write_rows(tmp_path / "a.jsonl", prompts(6))
    with pytest.raises(RequestError, match="nobody has been there to work"):
        at([server], file, tmp_path / "out", on_line=lambda line: setattr(server, "dead", True))
    server.dead = False
    result = at([server], file, tmp_path / "out")
    assert result["made"] + result["done"] == 6


def test_a_run_finds_again_what_an_earlier_one_queued(comfy, tmp_path, monkeypatch):
    """What a killed run left at the server, waiting or finished, is not asked for twice."""
    server, file = comfy(), write_rows(tmp_path / "a.jsonl", prompts(3))
    at([server], file, tmp_path / "first")
    assert len(server.asked) == 3
    result = at([server], file, tmp_path / "second")
    assert result["made"] == 3 and len(server.asked) == 3
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_a_result_whose_line_was_lost_is_known_by_what_is_in_it(comfy, tmp_path):
    """ComfyUI writes what a batch sends along into its pictures."""
    server, file = comfy(), write_rows(tmp_path / "a.jsonl", prompts(1))
    at([server], file, tmp_path / "out")
    sent = server.asked[0]["extra_data"]["extra_pnginfo"]["lance"]
    media.save_image(tmp_path / "out" / "r00.png", media.load_image(PHOTO), sent)
    (tmp_path / "out" / "results.jsonl").unlink()
    assert at([server], file, tmp_path / "out")["done"] == 1


def test_a_dry_run_asks_no_server(comfy, tmp_path):
    server = comfy()
    rows = [
        *prompts(1),
        {"id": "b", "task": "image_edit", "prompt": "x", "image": PHOTO, "width": 64, "height": 64},
    ]
    result = at([server], write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", dry_run=True)
    assert list(result["errors"]) == ["b"] and "no input for width" in result["errors"]["b"]
    assert not server.asked and not server.uploads


@pytest.mark.parametrize("url", ["ftp://a", "", "http://"])
def test_what_is_no_address(url):
    with pytest.raises(RequestError, match="no address"):
        Server(url)


def test_an_address_without_scheme():
    assert Server("host:8188/").url == "http://host:8188"
