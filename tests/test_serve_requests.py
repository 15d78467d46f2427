"""What a server makes of OpenAI's requests, of its configuration and of forms; no Ray and no HTTP here."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from batching import INPUTS, VIDEO

from lance_core.cli.main import main
from lance_core.errors import RequestError
from lance_core.scale import openai_requests as requests
from lance_core.scale.http_forms import HttpError, form
from lance_core.scale.serve_config import Limits, config_of, read_config

PHOTO = (INPUTS / "photo.png").read_bytes()
DATA = f"data:image/png;base64,{base64.b64encode(PHOTO).decode()}"
LIMITS = Limits(pixels=65536, frames=25, steps=50, results=3, tokens=64, upload_bytes=100_000)


def test_pictures():
    asked = requests.image({"prompt": "a fox", "size": "256x128", "n": 2, "steps": 4, "seed": 7}, [], LIMITS)
    assert (asked.task, asked.prompt) == ("t2i", "a fox")
    assert asked.options == {"width": 256, "height": 128, "batch_size": 2, "steps": 4, "seed": 7}
    asked = requests.image({"prompt": "blue", "size": "auto", "n": "1", "steps": "4"}, [PHOTO], LIMITS)
    assert (asked.task, asked.media, asked.options) == ("image_edit", [PHOTO], {"batch_size": 1, "steps": 4})
    assert requests.image({"prompt": "both"}, [PHOTO, PHOTO], LIMITS).task == "subject_image"


def test_videos():
    asked = requests.video({"prompt": "go", "seconds": "1", "size": "64x48"}, [], LIMITS)
    assert (asked.task, asked.options) == ("t2v", {"num_frames": 13, "width": 64, "height": 48})
    asked = requests.video({"prompt": "go", "frames": 9}, [PHOTO], LIMITS)
    assert (asked.task, asked.options["num_frames"]) == ("i2v", 9)
    assert requests.video({"prompt": "go", "seconds": 2}, [], LIMITS).options["num_frames"] == 25


def question(*parts, system=None, **more) -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": list(parts)}]} | more


TEXT = {"type": "text", "text": "what?"}
PICTURE = {"type": "image_url", "image_url": {"url": DATA}}


def test_questions():
    asked = requests.chat(question(TEXT, PICTURE, system="Be short.", max_tokens=9), (), LIMITS)
    assert (asked.task, asked.prompt, asked.media) == ("x2t_image", "what?", [PHOTO])
    assert asked.options == {"system_prompt": "Be short.", "max_new_tokens": 9}
    clip = {"type": "video_url", "video_url": DATA}
    assert requests.chat(question(TEXT, clip, temperature=0.5), (), LIMITS).task == "x2t_video"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "prompt is NoneType"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "x" * 30_000}, "30000 characters"),
        ({"prompt": "x", "size": "9999x9999"}, "at most 65536 pixels"),
        ({"prompt": "x", "size": "big"}, "expected WIDTHxHEIGHT"),
        ({"prompt": "x", "size": "8x8"}, "at least 16 pixels"),
        ({"prompt": "x", "n": 4}, "n is 4"),
        ({"prompt": "x", "steps": 51}, "at most 50"),
        ({"prompt": "x", "steps": "many"}, "steps is 'many'"),
        ({"prompt": "x", "stepz": 3}, "'stepz' is not known"),
        ({"prompt": "x", "mask": "y"}, "mask is not known"),
        ({"prompt": "x", "batch_size": 60}, "'batch_size' is not known"),
        ({"prompt": "x", "width": 9999}, "'width' is not known"),
    ],
)
def test_pictures_that_are_refused(body, said):
    with pytest.raises(RequestError) as error:
        requests.image(body, [], LIMITS)
    assert said in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "x", "seconds": 3}, "seconds is 3"),
        ({"prompt": "x", "frames": 26}, "frames is 26"),
        ({"prompt": "x", "num_frames": 121}, "'num_frames' is not known"),
    ],
)
def test_videos_that_are_refused(body, said):
    with pytest.raises(RequestError, match=said):
        requests.video(body, [], LIMITS)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "messages: expected a list"),
        (question(TEXT), "0 pictures and clips"),
        (question(TEXT, PICTURE, PICTURE), "2 pictures and clips"),
        (question(PICTURE), "prompt is empty"),
        (question(TEXT, PICTURE, max_tokens=65), "max_tokens is 65"),
        (question(TEXT, PICTURE, temperature=-1), "temperature is -1"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "earlier turns"),
        (question(TEXT, {"type": "image_url", "image_url": {"url": "http://x/a.png"}}), "not fetched"),
        (question(TEXT, {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), "not fetched"),
        (question(TEXT, {"type": "image_url", "image_url": {"url": "data:image/png,xx"}}), "base64"),
        (question(TEXT, {"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}), "damaged"),
        (question(TEXT, {"type": "image_url", "image_url": 7}), "is no URL"),
    ],
)
def test_questions_that_are_refused(body, said):
    with pytest.raises(RequestError, match=said):
        requests.chat(body, (), LIMITS)


def test_an_address_of_an_allowed_host_is_fetched_and_no_other():
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "http://localhost:1/secret")
                self.end_headers()
                return
            data = PHOTO if self.path == "/a.png" else b"x" * 200_000
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert requests.source(f"{url}/a.png", ["127.0.0.1"], LIMITS) == PHOTO
        for path, hosts, said in (
            ("/a.png", ["elsewhere"], "not fetched"),
            ("/large", ["127.0.0.1"], "more than 100000 bytes"),
            ("/away", ["127.0.0.1", "localhost"], "gives nothing"),
        ):
            with pytest.raises(RequestError, match=said):
                requests.source(url + path, hosts, LIMITS)
    finally:
        server.shutdown()
        server.server_close()


def test_what_a_client_is_told_of_an_error():
    from lance_core.errors import CheckpointError, MediaError

    assert requests.as_error(RequestError("steps is 0")) == "steps is 0"
    assert requests.as_error(MediaError("damaged")) == "damaged"
    for error in (CheckpointError("/a/secret/path is damaged"), ValueError("a bug")):
        assert requests.as_error(error) == "the server failed; its log says how"


def test_forms():
    kind = 'multipart/form-data; boundary="xyz"'
    body = b'--xyz\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nblue\r\n'
    body += b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + PHOTO
    body += b"\r\n--xyz--\r\n"
    assert form(body, kind) == ({"prompt": "blue"}, {"image": [PHOTO]})
    for damaged in (b"", body[:-20], body.replace(b"; name=", b"; nome=")):
        with pytest.raises(HttpError):
            form(damaged, kind)
    with pytest.raises(HttpError):
        form(body, "multipart/form-data")


# -- configuration -------------------------------------------------------------------------------------------


def test_a_configuration(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"checkpoint": "here", "port": 9000, "limits": {"frames": 49}, "hosts": ["a"]})
    )
    config = read_config(path, port=9001, host=None)
    assert (config.checkpoint, config.port, config.host) == ("here", 9001, "127.0.0.1")
    assert (config.limits.frames, config.limits.tokens, config.hosts) == (49, 1024, ("a",))
    assert config.api_key is None and config_of(config.plain()) == config
    monkeypatch.setenv("LANCE_API_KEY", "secret")
    config = read_config(path)
    assert config.api_key == "secret" and "secret" not in repr(config)
    assert config_of({"checkpoint": "x", "replicas": 3}).most_replicas == 3


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "names no checkpoint"),
        ({"checkpoint": "x", "prt": 1}, "'prt'"),
        ({"checkpoint": "x", "port": 0}, "port is 0"),
        ({"checkpoint": "x", "limits": {"frame": 1}}, "'frame'"),
        ({"checkpoint": "x", "limits": {"frames": "many"}}, "limits.frames is 'many'"),
        ({"checkpoint": "x", "limits": 3}, "limits is 3"),
        ({"checkpoint": "x", "hosts": "a"}, "hosts is 'a'"),
        ({"checkpoint": 3}, "checkpoint is int"),
        ({"checkpoint": "x", "dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_a_configuration_that_is_refused(raw, said):
    with pytest.raises(RequestError, match=said):
        config_of(raw)


@pytest.mark.parametrize("content", ["", "[]", "nonsense"])
def test_a_file_that_is_no_configuration(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(RequestError):
        read_config(path)


def test_serve_without_ray_says_what_to_install(monkeypatch, capsys):
    import builtins

    own = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "ray" or name.startswith("ray."):
            raise ImportError(f"No module named {name!r}")
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["serve", "-m", str(VIDEO)]) == 2
    assert "pip install 'comfyui-lance[serve]'" in capsys.readouterr().err


def test_serve_with_a_checkpoint_that_is_none(tmp_path, capsys):
    assert main(["serve", "-m", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
