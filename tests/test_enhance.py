"""Prompts written out: by the model through what it is sent, by a service through a stand-in that
misbehaves.
"""

from __future__ import annotations

import http.server
import json
import logging
import threading
import time

import numpy as np
import pytest

from lance_core import RequestError
from lance_core.cli.main import main
from lance_core.dialogue import understanding
from lance_core.inputs import media
from lance_core.inputs.tasks import TASKS
from lance_core.prompting import endpoint, enhance
from lance_core.prompting.endpoint import Endpoint
from lance_core.prompting.instructions import instruction

KEY = "sk-secret-0123456789"
PHOTO = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
DRAWN = [t for t in TASKS.values() if t.output != "text"]


class Service(http.server.BaseHTTPRequestHandler):
    """A stand-in for an OpenAI-compatible service; `server.does` says how it behaves."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, dict(self.headers), json.loads(body)))
        self.server.does(self)

    do_GET = do_POST

    def log_message(self, *args):
        pass


def send(handler, content: bytes, status: int = 200, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def completion(text) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def drip(handler):
    """A byte now and then, so that no single wait is long."""
    try:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while True:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        return


BAD = {
    "stalls": lambda h: time.sleep(3),
    "drips": drip,
    "refuses": lambda h: send(h, f"bad key {KEY}".encode(), 401),
    "fails": lambda h: send(h, b"", 500),
    "hangs up": lambda h: h.connection.close(),
    "redirects": lambda h: send(h, b"", 302, Location="/elsewhere"),
    "redirects for good": lambda h: send(h, b"", 308, Location="/elsewhere"),
    "no JSON": lambda h: send(h, b"<html>" + KEY.encode()),
    "deep JSON": lambda h: send(h, b"[" * 100_000),
    "another JSON": lambda h: send(h, b'{"choices": []}'),
    "a number": lambda h: send(h, completion(7)),
    "nothing": lambda h: send(h, completion("  ")),
    "control characters": lambda h: send(h, completion("a\x00b")),
    "half a character": lambda h: send(h, b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
    "a book": lambda h: send(h, completion("word " * 5000)),
    "too much": lambda h: send(h, completion("x" * (endpoint.MAX_REPLY + 10))),
}


@pytest.fixture
def service(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.daemon_threads, server.asked = True, []
    server.does = lambda h: send(h, completion("A red fox in deep snow."))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANCE_REWRITE_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("LANCE_REWRITE_MODEL_NAME", "writer")
    monkeypatch.setenv("LANCE_REWRITE_API_KEY", KEY)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _nothing_set_up(monkeypatch):
    for name in (endpoint.URL, endpoint.MODEL, endpoint.KEY):
        monkeypatch.delenv(name, raising=False)


# -- by the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", DRAWN, ids=lambda t: t.name)
def test_the_model_is_told_the_task_and_sees_the_picture(video_lance, monkeypatch, task):
    """What goes into the sequence: the instruction, what is shown, and the wish."""
    asked = []
    written = understanding.written

    def note(components, sequence, *args):
        asked.append(sequence)
        return written(components, sequence, 2, *args[1:])

    monkeypatch.setattr(understanding, "written", note)
    shown = {None: None, "image": PHOTO, "video": np.stack([PHOTO] * 5), "references": [PHOTO, PHOTO]}[
        task.takes
    ]
    video_lance.enhance(" a fox ", task.name, shown)
    (sequence,) = asked
    tokenizer = video_lance.checkpoint.tokenizer
    texts = [tokenizer.decode(s.ids) for s in sequence.context if hasattr(s, "ids")]
    seen = [s.grid[0] for s in sequence.context if not hasattr(s, "ids")]
    assert instruction(task) in texts[0] and texts[-2] == "The wish: a fox"
    assert seen == {None: [], "image": [1], "video": [3], "references": [1, 1]}[task.takes]


def test_every_task_is_told_apart():
    told = {t.name: instruction(t) for t in DRAWN}
    assert len(set(told.values())) == len(told)
    for name, text in told.items():
        assert (
            "language of the wish" in text and ("video" if TASKS[name].output == "video" else "image") in text
        )
    with pytest.raises(RequestError, match="not enhanced"):
        instruction(TASKS["x2t_image"])


def test_the_seed_decides(video_lance, monkeypatch):
    monkeypatch.setattr(enhance, "NEW_TOKENS", 12)
    monkeypatch.setattr(enhance, "cleaned", lambda text: text)
    one, two, again = (video_lance.enhance("a fox", "t2i", seed=s, temperature=2.0) for s in (1, 2, 1))
    assert one == again != two


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A fox.", "A fox."),
        ('  "A fox."\n', "A fox."),
        ("“A fox.”", "A fox."),
        ("A fox.\n\nIt  runs.", "A fox. It runs."),
        ('"A" and "B"', '"A" and "B"'),
        ("A fox<|im_end|>", "A fox"),
        ("雪の中の狐", "雪の中の狐"),
    ],
)
def test_answers_are_made_prompts(text, expected):
    assert enhance.cleaned(text) == expected


def test_an_answer_that_is_no_prompt_falls_back_with_a_warning(video_lance, monkeypatch, caplog):
    for bad in ("", " \n", "<|im_start|>", "broken \ufffd", "x" * 9000):
        caplog.clear()
        monkeypatch.setattr(enhance, "written", lambda *args, bad=bad: bad)
        assert video_lance.enhance("a fox", "t2i") == "a fox"
        assert "not enhanced" in caplog.text and caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        (("", "t2i"), {}, "prompt is empty"),
        (("a", "x2t_image"), {}, "understand"),
        (("a", "t2x"), {}, "unknown task"),
        (("a", "t2i"), {"by": "me"}, "by is 'me'"),
        (("a", "t2i"), {"seed": -1}, "seed is -1"),
        (("a", "t2i"), {"temperature": -1}, "temperature is -1"),
    ],
)
def test_wrong_requests(video_lance, args, options, words):
    with pytest.raises(RequestError, match=words):
        video_lance.enhance(*args, **options)


# -- by a service --------------------------------------------------------------------------------------------


def test_a_service_is_asked_where_one_is_set_up(video_lance, service):
    assert video_lance.enhance("a fox", "i2v", PHOTO, seed=3, temperature=0.5) == "A red fox in deep snow."
    ((path, headers, body),) = service.asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["seed"], body["temperature"], body["stream"]) == ("writer", 3, 0.5, False)
    assert body["messages"][0] == {"role": "system", "content": instruction(TASKS["i2v"])}
    shown, text = body["messages"][1]["content"]
    assert shown["image_url"]["url"].startswith("data:image/jpeg;base64,") and "a fox" in text["text"]


def test_nothing_is_sent_unless_it_is_set_up(video_lance, service, monkeypatch):
    monkeypatch.setattr(enhance, "written", lambda *args: "mine")
    assert video_lance.enhance("a fox", "t2i", by="model") == "mine" and not service.asked
    monkeypatch.delenv(endpoint.URL)
    monkeypatch.delenv(endpoint.MODEL)
    assert video_lance.enhance("a fox", "t2i") == "mine" and not service.asked
    assert video_lance.enhance("a fox", "t2i", by="endpoint") == "a fox"


def test_text_alone_is_sent_as_text_and_no_key_is_needed(video_lance, service, monkeypatch):
    monkeypatch.delenv(endpoint.KEY)
    video_lance.enhance("a fox", "t2i")
    _, headers, body = service.asked[0]
    assert "Authorization" not in headers and body["messages"][1]["content"] == "The wish: a fox"


@pytest.mark.parametrize("does", BAD.values(), ids=list(BAD))
def test_a_service_that_misbehaves_falls_back_with_a_warning(video_lance, service, caplog, does):
    service.does = does
    began = time.monotonic()
    assert video_lance.enhance("a fox", "t2i", timeout=0.5) == "a fox"
    assert time.monotonic() - began < 2.5  # a bound on hanging, the stand-in sleeps longer
    assert "not enhanced" in caplog.text and KEY not in caplog.text
    assert len(service.asked) == 1, "a redirect was followed"


def test_waiting_for_a_service_can_be_stopped(service):
    def stop():
        raise KeyboardInterrupt

    service.does = BAD["stalls"]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Endpoint.from_environment().ask("", "a fox", temperature=0.0, seed=0, waiting=stop)
    assert time.monotonic() - began < 2  # a bound on hanging, the stand-in sleeps longer


def test_a_service_that_is_not_there(video_lance, service, caplog, monkeypatch):
    monkeypatch.setenv(endpoint.URL, "http://127.0.0.1:1/v1")
    assert video_lance.enhance("a fox", "t2i", timeout=5) == "a fox" and "cannot be reached" in caplog.text


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({endpoint.URL: "https://x/v1"}, "MODEL_NAME is not"),
        ({endpoint.MODEL: "m"}, "BASE_URL is not"),
        ({endpoint.URL: "file:///etc/passwd", endpoint.MODEL: "m"}, "no address"),
        ({endpoint.URL: "x", endpoint.MODEL: "m"}, "no address"),
    ],
)
def test_a_service_set_up_wrongly(variables, words):
    with pytest.raises(RequestError, match=words):
        Endpoint.from_environment(variables)


def test_the_key_is_never_shown():
    found = Endpoint.from_environment(
        {endpoint.URL: f"https://u:{KEY}@h/v1", endpoint.MODEL: "m", endpoint.KEY: KEY}
    )
    assert found.host == "h" and KEY not in repr(found)


# -- the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def draw(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    where = str(golden / "checkpoint" / "Lance_3B_Video")

    def draw_(*more):
        size = ("--width", "32", "--height", "32", "--steps", "1", "--dtype", "fp32", "-q", "-m", where)
        assert main(["t2i", "a fox", "-o", "x.png", *size, *more]) == 0
        said = capsys.readouterr()
        return media.read_metadata("x.png"), said.out + said.err

    return draw_


def test_enhance_on_the_command_line(draw, service, tmp_path, caplog):
    saved, said = draw("--enhance")
    assert (saved["prompt"], saved["enhanced_from"]) == ("A red fox in deep snow.", "a fox")
    assert KEY not in said + caplog.text and KEY.encode() not in (tmp_path / "x.png").read_bytes()
    service.does = BAD["refuses"]
    saved, said = draw("--enhance", "--enhance-by", "endpoint")
    assert saved["prompt"] == "a fox" and "enhanced_from" not in saved
    assert KEY not in said + caplog.text and "status 401" in said + caplog.text


def test_it_is_off_unless_asked(draw, service):
    assert draw()[0]["prompt"] == "a fox" and not service.asked
