"""`python -m lance_core serve` on the tiny model, asked by OpenAI's client. Needs ray[serve] and openai."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import statistics
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from batching import INPUTS, VIDEO, start
from PIL import Image

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'ray[serve]'")
openai = pytest.importorskip("openai", reason="the client is not installed: pip install openai")

PHOTO = INPUTS / "photo.png"
DATA = f"data:image/png;base64,{base64.b64encode(PHOTO.read_bytes()).decode()}"
KEY = "a secret"
QUEUE = 8
LIMITS = {"pixels": 65536, "frames": 9, "tokens": 8, "steps": 1_000_000, "upload_bytes": 300_000}
SMALL = {"steps": 1, "resolution": "video_192p"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server: its address and its process."""
    folder = tmp_path_factory.mktemp("serve")
    config = {"checkpoint": str(VIDEO), "api_key": KEY, "queue": QUEUE, "limits": LIMITS, "dtype": "float32"}
    (folder / "serve.json").write_text(json.dumps(config | {"videos": 3}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start("serve", "--config", folder / "serve.json", "--port", str(port))
    errors: list[str] = []
    threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True).start()
    line = process.stdout.readline()
    if not line.startswith("serving"):
        process.wait(60)
        time.sleep(1)
    assert line == f"serving Lance_3B_Video at http://127.0.0.1:{port}/v1\n", "".join(errors)
    yield f"http://127.0.0.1:{port}", process
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "Traceback" not in "".join(errors)


@pytest.fixture
def url(server) -> str:
    return server[0]


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)


def get(url: str, key: str | None = KEY) -> str:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
        return reply.read().decode()


def draw(client, prompt: str = "a fox", **more):
    extra = SMALL | more.pop("extra", {})
    return client.images.generate(model="lance", prompt=prompt, size="32x48", extra_body=extra, **more)


def ask(client, url: str = DATA, **more):
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
    more = {"max_tokens": 4, "extra_body": {"resolution": "video_192p"}} | more
    return client.chat.completions.create(
        model="lance", messages=[{"role": "user", "content": parts}], **more
    )


def test_pictures(client):
    made = draw(client, n=2, extra={"seed": 5})
    first, second = (Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in made.data)
    assert first.size == (32, 48) and first.tobytes() != second.tobytes()
    again = draw(client, extra={"seed": 5})
    assert again.data[0].b64_json == made.data[0].b64_json, "a seed gives the same picture"
    webp = draw(client, output_format="webp", response_format="url")
    assert webp.data[0].url.startswith("data:image/webp;base64,UklGR")


def test_edits(client):
    with open(PHOTO, "rb") as one:
        made = client.images.edit(model="lance", image=one, prompt="blue", extra_body=SMALL)
    assert Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))).size[0] > 32
    with open(PHOTO, "rb") as one, open(INPUTS / "portrait.png", "rb") as two:
        made = client.images.edit(model="lance", image=[one, two], prompt="x", size="32x32", extra_body=SMALL)
    assert Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))).size == (32, 32)


def test_questions(client):
    whole = ask(client)
    text = whole.choices[0].message.content
    assert isinstance(text, str) and whole.choices[0].finish_reason in ("stop", "length")
    assert 1 <= whole.usage.completion_tokens <= 4
    chunks = list(ask(client, stream=True))
    assert len(chunks) >= 3, "piece by piece"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_videos(client):
    five = {"frames": 5, **SMALL}
    video = client.videos.create(model="lance", prompt="go", size="32x32", seconds="4", extra_body=five)
    assert video.id.startswith("video_") and video.status in ("queued", "in_progress")
    video = client.videos.poll(video.id, poll_interval_ms=100)
    assert (video.status, video.progress, video.size) == ("completed", 100, "32x32")
    data = client.videos.download_content(video.id).read()
    assert data[4:8] == b"ftyp"
    assert video.id in [one.id for one in client.videos.list().data]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    with open(PHOTO, "rb") as picture:
        video = client.videos.create(model="lance", prompt="go", input_reference=picture, extra_body=five)
    assert client.videos.poll(video.id, poll_interval_ms=100).status == "completed"


def test_only_so_many_videos_are_kept(client):
    made = [
        client.videos.create(model="lance", prompt="go", size="32x32", extra_body={"frames": 1, **SMALL}).id
        for _ in range(5)
    ]
    for name in made[-3:]:
        client.videos.poll(name, poll_interval_ms=50)
    client.videos.create(model="lance", prompt="go", size="32x32", extra_body={"frames": 1, **SMALL})
    kept = [one.id for one in client.videos.list().data]
    assert made[0] not in kept and len(kept) <= 4


def test_who_may_ask(url, client):
    assert json.loads(get(f"{url}/health", None))["status"] == "ok"
    with pytest.raises(openai.AuthenticationError):
        draw(client.with_options(api_key="wrong"))
    assert [one.id for one in client.models.list().data] == ["Lance_3B_Video"]


def test_what_is_too_much(url, client):
    with pytest.raises(openai.BadRequestError, match="at most 65536 pixels"):
        client.images.generate(model="lance", prompt="x", size="1024x1024")
    with pytest.raises(openai.BadRequestError, match="not fetched"):
        ask(client, url=f"{url}/health")
    with pytest.raises(openai.APIStatusError) as error:
        client.images.edit(model="lance", image=b"x" * 400_000, prompt="x")
    assert error.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="cannot be read"):
        client.images.edit(model="lance", image=b"no picture", prompt="x", extra_body=SMALL)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="lance", input="x")


def working(url: str) -> int:
    return json.loads(get(f"{url}/health"))["working"]


def until_idle(url: str, seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if working(url) == 0:
            return True
        time.sleep(0.1)
    return False


def test_work_ends_when_nobody_waits_for_it(url, client):
    """A request for very many steps is given up by its client; the model is free soon after."""
    with pytest.raises(openai.APITimeoutError):
        draw(client.with_options(timeout=3), extra={"steps": 900_000})
    assert until_idle(url), "the work goes on"
    began = time.monotonic()
    draw(client)
    assert time.monotonic() - began < 30


def test_a_full_server_says_when_to_come_again(url, client):
    """One works, QUEUE wait, and the rest are told so; those that are let in are answered."""

    def one(i: int) -> int:
        try:
            draw(client, extra={"steps": 200})
            return 200
        except openai.RateLimitError as error:
            assert int(error.response.headers["retry-after"]) >= 1
            return 429

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(one, range(24)))
    assert found.count(200) >= QUEUE and found.count(429) >= 1 and len(found) == 24
    assert until_idle(url)


def parents(process: int) -> set[int]:
    """A process's parent, its parent's, and so on."""
    found: set[int] = set()
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        found.add(process)
    return found


def models(server) -> dict[int, int]:
    """Resident memory, in bytes, of the server's processes that hold a model or speak HTTP, by their id."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            ours = b"ray::ServeReplica:lance" in (entry / "cmdline").read_bytes()
            if ours and server[1].pid in parents(int(entry.name)):
                pages = int((entry / "statm").read_text().split()[1])
                found[int(entry.name)] = pages * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_two_hundred_mixed_requests(server, url, client):
    """No error and no growth; latencies are printed, not judged."""

    def one(i: int) -> tuple[str, float]:
        began, kind = time.monotonic(), ("picture", "question", "stream", "edit")[i % 4]
        if kind == "picture":
            assert draw(client, f"a fox, number {i}", extra={"seed": i}).data[0].b64_json
        elif kind == "edit":
            with open(PHOTO, "rb") as picture:
                edited = client.images.edit(model="lance", image=picture, prompt=f"{i}", extra_body=SMALL)
            assert edited.data[0].b64_json
        else:
            answer = ask(client, stream=kind == "stream")
            assert list(answer) if kind == "stream" else answer.choices
        return kind, time.monotonic() - began

    with ThreadPoolExecutor(QUEUE) as pool:
        list(pool.map(one, range(40)))  # what is allocated once
        before = models(server)
        took = list(pool.map(one, range(40, 240)))
    after = models(server)
    assert before.keys() == after.keys() and len(before) == 2, "nobody was lost"
    growth = sum(after.values()) - sum(before.values())
    for kind in ("picture", "question", "stream", "edit"):
        seconds = sorted(s for k, s in took if k == kind)
        p50, p95 = statistics.median(seconds), seconds[int(len(seconds) * 0.95)]
        print(f"{kind}: {len(seconds)}, median {p50:.2f} s, 95 % {p95:.2f} s, most {seconds[-1]:.2f} s")
    print(f"memory grew by {growth / 1e6:.1f} MB")
    assert growth < 60e6
    counted = get(f"{url}/metrics")
    assert 'lance_requests_total{route="/v1/images/edits",status="200"}' in counted
    assert "lance_working 0" in counted


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_a_model_that_is_lost_is_replaced(server, client):
    """Its request fails with a sentence, and a little later the server answers again."""
    for process in models(server):
        if b"Model" in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)
    until, made = time.monotonic() + 90, None
    while time.monotonic() < until and made is None:
        try:
            made = draw(client)
        except openai.APIStatusError as error:
            assert error.status_code in (500, 503), error
            time.sleep(0.5)
    assert made is not None and made.data[0].b64_json
