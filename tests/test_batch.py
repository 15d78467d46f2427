"""Batches: what is made, what is left alone, what is made again; a full disk; the next row's media."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from batching import (
    IMAGE,
    INPUTS,
    SMALL,
    VIDEO,
    arguments,
    files,
    finish,
    lines,
    prompts,
    run,
    start,
    write_rows,
)
from PIL import Image

from lance_core.errors import CheckpointError, LanceError, MediaError, RequestError
from lance_core.inputs import media
from lance_core.pipeline import load
from lance_core.scale import batch
from lance_core.scale.row_files import read_entries
from lance_core.scale.row_forms import Defaults, make_row
from lance_core.scale.rows import Row
from lance_core.scale.work import Ahead, Session, Settings

PHOTO, PORTRAIT, CLIP = (str(INPUTS / name) for name in ("photo.png", "portrait.png", "clip.mp4"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Eight prompts drawn in one go: what every other way to draw them must give."""
    folder = tmp_path_factory.mktemp("drawn")
    run(write_rows(folder / "a.jsonl", prompts(8)), folder / "out")
    return folder


# -- what is made --------------------------------------------------------------------------------------------


def test_a_row_of_every_task_gives_what_the_library_gives(tmp_path):
    rows = [
        {"id": "t2i", "task": "t2i", "prompt": "a fox", "seed": 3},
        {"id": "deep/t2v.mp4", "task": "t2v", "prompt": "it runs", "frames": 5},
        {"id": "i2v", "task": "i2v", "prompt": "go", "image": PHOTO, "frames": 5},
        {"id": "image_edit", "task": "image_edit", "prompt": "blue", "image": PHOTO},
        {"id": "video_edit", "task": "video_edit", "prompt": "snow", "video": CLIP},
        {"id": "subject_image", "task": "subject_image", "prompt": "both", "references": [PHOTO, PORTRAIT]},
        {"id": "subject_video", "task": "subject_video", "prompt": "it", "references": PHOTO, "frames": 5},
        {"id": "x2t_image", "task": "x2t_image", "prompt": "what?", "image": PHOTO, "max_new_tokens": 4},
        {"id": "x2t_video", "task": "x2t_video", "prompt": "what?", "video": CLIP, "max_new_tokens": 4},
    ]
    file = write_rows(tmp_path / "a.jsonl", rows)
    result = run(file, tmp_path / "out", task=None, checkpoint=VIDEO, resolution="video_192p")
    assert (result["rows"], result["made"], result["failed"]) == (9, 9, 0)
    found, lance = lines(tmp_path / "out"), load(VIDEO, dtype=torch.float32)
    for entry in read_entries(file):
        row = make_row(entry, Defaults(tmp_path, None, str(VIDEO), SMALL | {"resolution": "video_192p"}))
        assert isinstance(row, Row)
        line = found[row.id]
        path = tmp_path / "out" / line["file"]
        assert line["error"] is None and line["seconds"] > 0
        source = {row.kind.takes: row.media} if row.kind.takes else {}
        if row.kind.output == "text":
            answer = lance.understand(row.prompt, **source, **row.options)
            assert line["text"] == answer.text and json.loads(path.read_text())["text"] == answer.text
            continue
        made = lance.generate(row.task, row.prompt, **source, **row.options)
        about = media.read_metadata(path)
        assert about["prompt"] == row.prompt and about["id"] == row.id and about["seed"] == line["seed"]
        if row.kind.output == "image":
            wanted = tmp_path / "wanted.png"
            media.save_image(wanted, made.frames[0])
            assert np.array_equal(media.load_image(path), media.load_image(wanted))
        else:
            wanted = tmp_path / "wanted.mp4"
            media.save_video(wanted, made.frames, made.fps)
            assert np.array_equal(media.load_video(path)[0], media.load_video(wanted)[0])


def test_the_released_prompts_from_the_command_line(tmp_path, capsys):
    from lance_core.cli.main import main

    file = tmp_path / "p.json"
    file.write_text(json.dumps({"000000.png": "a fox", "000001.png": "a cat"}))
    small = ["--width", "32", "--height", "48", "--steps", "1", "--seed", "5", "-q"]
    words = ["batch", str(file), "--task", "t2i", "-m", str(IMAGE), "-o", str(tmp_path / "out"), *small]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["made"] == 2 and result["results"] == str(tmp_path / "out" / "results.jsonl")
    assert Image.open(tmp_path / "out" / "000001.png").size == (32, 48)
    assert [(line["file"], line["seed"]) for line in lines(tmp_path / "out").values()] == [
        ("000000.png", 5),
        ("000001.png", 5),
    ]
    assert main(words) == 0
    assert "0 made, 2 were there, 0 failed" in capsys.readouterr().out


def test_a_bad_row_is_one_line_and_not_the_end(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(PHOTO).read_bytes()[:200])
    rows = [
        {"id": "a", "prompt": "a fox"},
        {"id": "b", "prompt": ""},
        {"id": "c", "task": "image_edit", "prompt": "blue", "image": str(broken)},
        {"id": "d", "task": "t2v", "prompt": "a fox runs"},
        {"id": "e", "prompt": "a cat", "checkpoint": str(tmp_path / "nothing")},
        {"id": "f", "prompt": "a cat"},
    ]
    said = []
    result = run(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", on_line=said.append)
    found = lines(tmp_path / "out")
    assert (result["made"], result["failed"]) == (2, 4)
    assert {name for name, line in found.items() if line["error"] is None} == {"a", "f"}
    wanted = {"b": "prompt is empty", "c": "broken.png", "d": "video checkpoint", "e": "nothing"}
    assert all(text in found[name]["error"] for name, text in wanted.items())
    assert {line["id"] for line in said} == set(found)


def test_an_error_that_is_no_ones_fault_is_that_rows_line_too(tmp_path, monkeypatch, caplog):
    from lance_core.pipeline import Lance

    draw = Lance.generate

    def sometimes(self, task, prompt, **options):
        if "1" in prompt:
            raise ValueError("a bug")
        return draw(self, task, prompt, **options)

    monkeypatch.setattr(Lance, "generate", sometimes)
    result = run(write_rows(tmp_path / "a.jsonl", prompts(3)), tmp_path / "out")
    assert (result["made"], result["failed"]) == (2, 1)
    assert lines(tmp_path / "out")["r01"]["error"] == "ValueError: a bug"
    assert "Traceback" in caplog.text, "and the bug can be found"


# -- what is left alone, and what is made again --------------------------------------------------------------


def test_a_second_run_makes_nothing(drawn):
    before = files(drawn / "out")
    times = {p: p.stat().st_mtime_ns for p in (drawn / "out").glob("*.png")}
    result = run(drawn / "a.jsonl", drawn / "out")
    assert (result["done"], result["made"]) == (8, 0)
    assert files(drawn / "out") == before and len(before) == 8
    assert {p: p.stat().st_mtime_ns for p in (drawn / "out").glob("*.png")} == times


@pytest.fixture
def copy(drawn, tmp_path) -> Path:
    """The eight, drawn, to be changed."""
    import shutil

    shutil.copytree(drawn / "out", tmp_path / "out")
    shutil.copy(drawn / "a.jsonl", tmp_path)
    return tmp_path


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)


def replace(path: Path) -> None:
    path.write_bytes(path.with_name("r03.png").read_bytes())


@pytest.mark.parametrize("damage", [remove, cut, change, replace])
@pytest.mark.parametrize("line", ["kept", "lost"])
def test_what_is_missing_or_damaged_is_made_again(copy, drawn, damage, line):
    results = copy / "out" / "results.jsonl"
    damage(copy / "out" / "r05.png")
    if line == "lost":
        results.write_text("".join(x for x in results.read_text().splitlines(True) if "r05" not in x))
    result = run(copy / "a.jsonl", copy / "out")
    assert (result["done"], result["made"]) == (7, 1)
    assert files(copy / "out") == files(drawn / "out")
    assert len(lines(copy / "out")) == 8


def test_a_result_whose_line_was_not_written_is_kept(copy, drawn):
    results = copy / "out" / "results.jsonl"
    text = results.read_text().splitlines(True)
    results.write_text("".join(text[:-2]) + text[-2][:40])
    result = run(copy / "a.jsonl", copy / "out")
    assert (result["done"], result["made"]) == (8, 0)
    found = lines(copy / "out")
    assert len(found) == 8 and all(line["file"] and line["seed"] is not None for line in found.values())


@pytest.mark.parametrize(
    "changed", [{"prompt": "a crow"}, {"seed": 99}, {"steps": 2}, {"checkpoint": str(VIDEO)}]
)
def test_a_row_that_changed_is_made_again(copy, drawn, changed):
    rows = prompts(8)
    rows[2] |= changed
    result = run(write_rows(copy / "a.jsonl", rows), copy / "out")
    assert (result["done"], result["made"]) == (7, 1)
    assert files(copy / "out")["r02.png"] != files(drawn / "out")["r02.png"]


def test_a_picture_that_changed_makes_its_row_again(tmp_path):
    Image.open(PHOTO).save(tmp_path / "in.png")
    row = {"id": "a", "task": "image_edit", "prompt": "blue", "image": "in.png"}
    file = write_rows(tmp_path / "a.jsonl", [row])
    options = {"task": None, "resolution": "image_256res"}
    assert run(file, tmp_path / "out", **options)["made"] == 1
    assert run(file, tmp_path / "out", **options)["done"] == 1
    Image.open(PORTRAIT).save(tmp_path / "in.png")
    assert run(file, tmp_path / "out", **options)["made"] == 1


def test_errors_are_tried_again_when_asked_or_when_the_row_can_be_read(tmp_path, monkeypatch):
    file = write_rows(
        tmp_path / "a.jsonl",
        [
            {"id": "a", "task": "image_edit", "prompt": "blue", "image": "later.png"},
            {"id": "b", "prompt": "a fox"},
        ],
    )
    options = {"resolution": "image_256res"}
    failing = []

    def fail(self, *args, **kwargs):
        failing.append(args)
        raise LanceError("not today")

    with monkeypatch.context() as patch:
        patch.setattr("lance_core.pipeline.Lance.generate", fail)
        assert run(file, tmp_path / "out", **options)["failed"] == 2
        assert run(file, tmp_path / "out", **options)["skipped"] == 2
        assert len(failing) == 1, "the other one's picture is missing"
    assert run(file, tmp_path / "out", **options)["skipped"] == 2
    Image.open(PHOTO).save(tmp_path / "later.png")
    result = run(file, tmp_path / "out", **options)
    assert (result["made"], result["skipped"]) == (1, 1)
    result = run(file, tmp_path / "out", retry_errors=True, **options)
    assert (result["made"], result["done"]) == (1, 1)
    assert all(line["error"] is None for line in lines(tmp_path / "out").values())


# -- which rows ----------------------------------------------------------------------------------------------


def test_limit_and_shards(drawn, tmp_path):
    assert run(drawn / "a.jsonl", tmp_path / "limit", limit=3)["made"] == 3
    assert sorted(files(tmp_path / "limit")) == ["r00.png", "r01.png", "r02.png"]
    counts = [run(drawn / "a.jsonl", tmp_path / "out", shard=f"{i}/3")["made"] for i in (1, 2, 3)]
    assert counts == [3, 3, 2]
    assert files(tmp_path / "out") == files(drawn / "out")
    assert len(lines(tmp_path / "out")) == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard": "0/3"}, "shard is '0/3'"),
        ({"shard": "4/3"}, "shard is '4/3'"),
        ({"shard": "x"}, "shard is 'x'"),
        ({"limit": 0}, "limit is 0"),
        ({"layout": "x"}, "layout is 'x'"),
        ({"task": "x"}, "unknown task 'x'"),
        ({"temperature": 0.5}, "'temperature' is no option that t2i has"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"workers": "two"}, "workers is 'two'"),
        ({"workers": 0}, "workers is 0"),
        ({"workflow": "x.json"}, "workflow= belongs to comfyui="),
        ({"comfyui": "ftp://x"}, "no address of a ComfyUI"),
        ({"comfyui": ","}, "no address of a ComfyUI"),
        ({"comfyui": "127.0.0.1:9"}, "no ComfyUI answers at http://127.0.0.1:9"),
    ],
)
def test_what_is_wrong_for_all_rows_is_the_end(drawn, tmp_path, options, said):
    with pytest.raises(RequestError) as error:
        run(drawn / "a.jsonl", tmp_path / "out", **options)
    assert said in str(error.value) and len(str(error.value)) < 500
    assert not list(tmp_path.rglob("*.png"))


def test_a_checkpoint_for_all_rows_that_is_none(drawn, tmp_path):
    with pytest.raises(CheckpointError):
        run(drawn / "a.jsonl", tmp_path / "out", checkpoint=tmp_path)


def test_an_output_that_is_no_folder(drawn, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(RequestError, match="cannot be written"):
        run(drawn / "a.jsonl", tmp_path / "out")


def test_two_batches_do_not_share_a_folder(drawn, tmp_path):
    seen = []

    def second(line) -> None:
        with pytest.raises(RequestError, match="another batch is writing"):
            run(drawn / "a.jsonl", tmp_path / "out")
        seen.append(line)

    run(drawn / "a.jsonl", tmp_path / "out", limit=1, on_line=second)
    assert seen


def test_a_dry_run_checks_every_row_and_its_media(tmp_path, capsys):
    from lance_core.cli.main import main

    rows = [
        {"id": "a", "prompt": "a fox"},
        {"id": "b", "prompt": "a fox", "steps": -1},
        {"id": "c", "task": "image_edit", "prompt": "blue", "image": "missing.png"},
        {"id": "d", "task": "t2v", "prompt": "a fox"},
    ]
    file = write_rows(tmp_path / "a.jsonl", rows)
    result = run(file, tmp_path / "out", dry_run=True)
    assert (result["rows"], sorted(result["errors"])) == (4, ["b", "c", "d"])
    assert main([*map(str, arguments(file, tmp_path / "out", "--dry-run"))]) == 2
    err = capsys.readouterr().err
    assert "missing.png" in err and "3 of 4 rows are wrong" in err
    assert not (tmp_path / "out").exists()
    assert main([*map(str, arguments(file, tmp_path / "out", "--dry-run", "--limit", "1"))]) == 0


def test_rows_of_one_size_follow_each_other_and_the_model_is_loaded_once(tmp_path, monkeypatch):
    from lance_core.scale import work

    opened, order = [], []
    monkeypatch.setattr(
        work.Session.__init__,
        "__defaults__",
        (lambda checkpoint, settings: opened.append(checkpoint) or work.open_lance(checkpoint, settings),),
    )
    rows = [
        {"id": f"{i}", "prompt": "a fox", "width": 32 + 16 * (i % 2), "height": 32}
        | ({"checkpoint": str(VIDEO)} if i % 3 == 0 else {})
        for i in range(6)
    ]
    run(
        write_rows(tmp_path / "a.jsonl", rows),
        tmp_path / "out",
        on_line=lambda line: order.append(line["id"]),
    )
    assert opened == [str(IMAGE), str(VIDEO)]
    assert order == ["1", "5", "2", "4", "0", "3"]


# -- time ----------------------------------------------------------------------------------------------------


def test_the_next_rows_media_are_read_while_one_is_drawn():
    reading, let_go = threading.Event(), threading.Event()

    class Slow(Session):
        def read(self, row):
            if row.id == "second":
                reading.set()
            return row

        def draw(self, row):
            if row.id == "first":
                assert reading.wait(10), "nobody reads"
                let_go.set()
            return {"id": row.id}

    ahead = Ahead(Slow(Settings("")))
    for number, name in enumerate(("first", "second")):
        ahead.give(Row(number, name, "t2i", "x"))
    ahead.end()
    assert [line["id"] for line in ahead.lines()] == ["first", "second"] and let_go.is_set()


def test_progress_counts_the_rows_that_are_to_be_made(copy):
    (copy / "out" / "r05.png").unlink()
    said = []
    run(copy / "a.jsonl", copy / "out", progress=lambda *what: said.append(what))
    assert said == [("rows", 0, 1), ("rows", 1, 1)]


# -- ends ----------------------------------------------------------------------------------------------------


def test_killed_at_any_time_and_run_again(drawn, tmp_path):
    """kill -9 at several moments; the runs together make what one run makes, and each row has one line."""
    out = tmp_path / "out"
    for wanted in (1, 3, 6):
        process = start(*arguments(drawn / "a.jsonl", out))
        until = time.monotonic() + 60
        while time.monotonic() < until and process.poll() is None:
            if len(list(out.glob("*.png"))) >= wanted:
                break
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
    left = out / f".{process.pid}-{'0' * 32}.part"
    left.write_bytes(b"half a picture")
    result = run(drawn / "a.jsonl", out)
    assert result["made"] + result["done"] == 8 and result["done"] >= 1
    assert not left.exists()
    assert files(out) == files(drawn / "out")
    assert set(lines(out)) == set(lines(drawn / "out"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_the_next_run_goes_on(drawn, tmp_path, number):
    out = tmp_path / "out"
    process = start(*arguments(drawn / "a.jsonl", out))
    until = time.monotonic() + 60
    while time.monotonic() < until and not list(out.glob("*.png")):
        time.sleep(0.002)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number and "cancelled" in err and "Traceback" not in err
    assert not [name for name in os.listdir(out) if name.endswith(".part")]
    run(drawn / "a.jsonl", out)
    assert files(out) == files(drawn / "out")


def test_a_disk_that_takes_nothing_more(drawn, tmp_path):
    """A limit on file sizes stands for a full disk: the system refuses the write itself."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    out = tmp_path / "out"
    code, _, err = finish(start(*arguments(drawn / "a.jsonl", out), before=limit))
    assert code == 2 and "takes nothing more" in err and "Traceback" not in err
    assert not list(out.glob("*.png")) and not (out / "results.jsonl").exists()
    assert run(drawn / "a.jsonl", out)["made"] == 8
    assert files(out) == files(drawn / "out")


def test_a_full_disk_is_no_rows_fault(drawn, tmp_path, monkeypatch):
    save, count = media.save_image, []

    def full(path, *args):
        count.append(path)
        if len(count) == 3:
            raise MediaError("it cannot be written") from OSError(28, "No space left on device")
        return save(path, *args)

    monkeypatch.setattr(media, "save_image", full)
    with pytest.raises(RequestError, match="No space left"):
        run(drawn / "a.jsonl", tmp_path / "out")
    assert len(lines(tmp_path / "out")) == 2
    assert run(drawn / "a.jsonl", tmp_path / "out")["done"] == 2


@pytest.mark.parametrize("words", [["--help"], ["batch", "--help"], ["serve", "--help"], ["t2i", "--help"]])
def test_help_imports_no_torch_and_nothing_of_this(words):
    import subprocess
    import sys

    code = (
        "import sys\nfrom lance_core.cli.main import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "print(sorted(n for n in sys.modules if n in ('torch', 'numpy', 'av') or 'lance_core.scale' in n))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_python_call_has_the_documented_names():
    import inspect

    names = set(inspect.signature(batch.run).parameters)
    assert {"file", "output", "task", "checkpoint", "workers", "limit", "shard", "retry_errors"} <= names
