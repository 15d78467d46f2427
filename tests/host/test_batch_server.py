"""`batch --comfyui` at real servers: rows of several tasks, a server killed, a batch killed and run again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("batching")
from batching import INPUTS, files, finish, lines, prompts, run, start, write_rows

from lance_core.inputs import media

CHECKPOINT = Path(__file__).parents[1] / "golden" / "checkpoint"
SMALL = {"width": 64, "height": 64, "steps": 2, "dtype": None, "checkpoint": "Lance_3B"}
PHOTO = str(INPUTS / "photo.png")


@pytest.fixture(scope="module")
def server(make_server):
    return make_server(models={"lance": CHECKPOINT})


def test_rows_of_several_tasks(server, tmp_path):
    video = {"checkpoint": "Lance_3B_Video", "resolution": "video_192p"}
    rows = [
        {"id": "fox", "task": "t2i", "prompt": "a fox", "seed": 5, "batch": 2, "width": 64, "height": 64},
        {"id": "edit", "task": "image_edit", "prompt": "blue", "image": PHOTO, "resolution": "image_256res"},
        {"id": "clip", "task": "t2v", "prompt": "it runs", "frames": 5, "width": 64, "height": 64}
        | {"checkpoint": "Lance_3B_Video"},
        {"id": "snow", "task": "video_edit", "prompt": "snow", "video": str(INPUTS / "clip.mp4")} | video,
        {"id": "both", "task": "subject_image", "prompt": "it", "references": [PHOTO], "width": 64}
        | {"height": 64, "resolution": "image_256res"},
        {"id": "what", "task": "x2t_image", "prompt": "what?", "image": PHOTO, "max_new_tokens": 4}
        | {"resolution": "image_256res"},
        {"id": "bad", "task": "t2i", "prompt": "a fox", "checkpoint": "nowhere"},
    ]
    options = {"task": None, "width": None, "height": None, "dtype": None, "checkpoint": "Lance_3B"}
    for row in rows[:-2]:
        row["steps"] = 2
    file = write_rows(tmp_path / "a.jsonl", rows)
    result = run(file, tmp_path / "out", comfyui=server.url, steps=None, **options)
    found = lines(tmp_path / "out")
    assert {name for name, line in found.items() if line["error"]} == {"bad"}, found
    assert (result["made"], result["failed"]) == (6, 1) and "checkpoint" in found["bad"]["error"]
    out = tmp_path / "out"
    assert media.load_image(out / "fox_0.png").shape == (64, 64, 3)
    assert (out / "fox_0.png").read_bytes() != (out / "fox_1.png").read_bytes()
    assert len(media.load_video(out / "clip.mp4")[0]) == 5
    assert json.loads((out / "what.json").read_text())["text"] == found["what"]["text"]
    assert found["fox"]["seed"] == 5 and found["fox"]["files"] == ["fox_0.png", "fox_1.png"]
    assert media.read_metadata(out / "edit.png")["id"] == "edit", "what a batch sends along is in the picture"
    again = run(file, tmp_path / "out", comfyui=server.url, steps=None, **options)
    assert (again["done"], again["skipped"], again["made"]) == (6, 1, 0)


def test_it_draws_what_the_library_draws(server, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", prompts(2))
    assert run(file, tmp_path / "there", comfyui=server.url, **SMALL)["made"] == 2
    assert run(file, tmp_path / "here", width=64, height=64, steps=2, dtype="bfloat16")["made"] == 2
    for name in ("r00.png", "r01.png"):
        there, here = (media.load_image(tmp_path / at / name).astype(int) for at in ("there", "here"))
        assert abs(there - here).mean() < 8, "the same picture, in another dtype perhaps"


def test_two_servers_one_killed_and_the_batch_killed_too(server, make_server, tmp_path):
    """The rows that the killed server had are drawn by the other; a killed batch goes on where it was."""
    second = make_server(models={"lance": CHECKPOINT})
    file = write_rows(tmp_path / "a.jsonl", prompts(10))
    killed = []

    def kill(line) -> None:
        if line.get("server") == second.url and not killed:
            os.killpg(second.pid, signal.SIGKILL)
            killed.append(line["id"])

    urls = f"{server.url},{second.url}"
    result = run(file, tmp_path / "out", comfyui=urls, on_line=kill, **SMALL)
    assert killed and (result["made"], result["failed"]) == (10, 0)
    assert len(lines(tmp_path / "out")) == 10

    small = ["--width", "64", "--height", "64", "--steps", "3", "--seed", "9", "-q"]
    more = ["-m", "Lance_3B", "--comfyui", server.url, "-o", tmp_path / "two", *small]
    file = write_rows(tmp_path / "b.jsonl", [{"id": f"{i}", "prompt": f"boat {i}"} for i in range(8)])
    process = start("batch", file, "--task", "t2i", *more)
    until = time.monotonic() + 120
    while time.monotonic() < until and not list((tmp_path / "two").glob("*.png")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, out, err = finish(start("batch", file, "--task", "t2i", *more, "--json"))
    assert code == 0, err
    found = json.loads(out)
    assert found["made"] + found["done"] == 8 and found["done"] >= 1
    assert len(files(tmp_path / "two")) == 8
    shutil.rmtree(tmp_path / "two")
