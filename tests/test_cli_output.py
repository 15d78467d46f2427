"""The end of a command: what is written gets out, what cannot be written is refused first, signals leave
nothing.

Real processes throughout: encodings, pipes and signals are the system's.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden_cases import GOLDEN

from lance_core.cli.main import main
from lance_core.inputs import media

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = str(GOLDEN / "checkpoint" / "Lance_3B")
PHOTO = str(GOLDEN / "cases" / "inputs" / "photo.png")
DRAW = ("t2i", "a fox", "-m", CHECKPOINT, "--width", "32", "--height", "32", "--steps", "1", "-q")
ASK = ("x2t_image", "What is this?", PHOTO, "-m", CHECKPOINT, "--max-new-tokens", "8", "-q")
ASK += ("--resolution", "image_256res")


def reset_signals() -> None:
    """A test run in the background has SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(*args: str, cwd: Path, **options) -> subprocess.Popen:
    """`python -m lance_core` with signals as a shell leaves them to it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-m", "lance_core", *args]
    return subprocess.Popen(command, cwd=cwd, env=environment, preexec_fn=reset_signals, **options)


def run(*args: str, cwd: Path, **options) -> tuple[int, bytes, bytes]:
    process = start(*args, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


# -- help
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["t2i", "--help"], ["convert", "--help"], ["bench", "--help"]])
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys\nfrom lance_core.cli.main import main\n"
        f"try: main({args!r})\nexcept SystemExit: pass\n"
        "print(sorted(sys.modules.keys() & {'torch', 'numpy', 'av', 'PIL', 'tokenizers', 'safetensors'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "usage: python -m lance_core" in done.stdout


# -- what is written gets out
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "as_json"), [("cp1252", True), ("gbk", False), ("ascii", False), ("utf-8", True)]
)
def test_any_encoding_takes_any_answer(tmp_path, encoding, as_json):
    name = "灯塔 🗼.png"
    environment = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    args = (*DRAW, "-o", name, *(["--json"] if as_json else []))
    code, out, err = run(*args, cwd=tmp_path, env=environment)
    assert code == 0, err
    assert (tmp_path / name).is_file()
    text = out.decode(encoding)
    if as_json:
        assert json.loads(text)["files"][0]["file"] == name
    else:
        assert "32x32, seed 42" in text and (name in text or "\\u" in text.lower())


def test_answers_in_ascii(tmp_path):
    """The tiny model's answers are full of bytes that are no text."""
    code, out, err = run(*ASK, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert code == 0, err
    out.decode("ascii")


def test_nobody_reads(tmp_path):
    process = start(*DRAW, "-o", "a.png", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert b"Traceback" not in err and b"Exception ignored" not in err
    assert media.load_image(tmp_path / "a.png").shape == (32, 32, 3), "the work itself is done and kept"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_output(tmp_path):
    with open("/dev/full", "wb") as full:
        process = start(*ASK, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert b"error: the output cannot be written (No space left" in err and b"Traceback" not in err


# -- what cannot be written is refused before the work -------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    """Anything that loads a model fails the test."""

    def fail(*args, **kwargs):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("lance_core.pipeline.load", fail)
    monkeypatch.setattr("lance_core.checkpoint.convert.convert", fail)


def made(kind: str, name: str) -> str:
    """A target that cannot be written, of a kind."""
    if kind == "folder":
        Path(name).mkdir()
        return name
    if kind == "missing folder":
        return f"nowhere/{name}"
    if kind == "a file as folder":
        Path("file").write_text("x")
        return f"file/{name}"
    if kind == "too long":
        return "x" * 300 + name
    if kind == "fifo":
        os.mkfifo(name)
        return name
    if kind == "device":
        os.symlink("/dev/null", name)
        return name
    if kind == "nul":
        return f"a\0{name}"
    return f"/proc/{name}"


KINDS = ["folder", "missing folder", "a file as folder", "too long", "fifo", "device", "nul", "proc"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["t2i", "convert"])
def test_targets_are_checked_first(tmp_path, monkeypatch, capsys, no_work, kind, command):
    monkeypatch.chdir(tmp_path)
    if command == "t2i":
        args = [*DRAW, "-o", made(kind, "a.png")]
    else:
        args = ["convert", CHECKPOINT, made(kind, "a.safetensors")]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said) < 500
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_every_name_of_a_batch_and_of_turns_is_checked(tmp_path, monkeypatch, capsys, no_work):
    monkeypatch.chdir(tmp_path)
    Path("b_2.png").mkdir()
    assert main([*DRAW, "-o", "b.png", "--batch", "3"]) == 2
    assert "b_2.png is a folder" in capsys.readouterr().err
    Path("e_1.png").mkdir()
    edit = ["image_edit", "blue", PHOTO, "-m", CHECKPOINT, "-o", "e.png", "--then", "red"]
    assert main(edit) == 2
    assert "e_1.png is a folder" in capsys.readouterr().err


def test_an_existing_file_may_be_replaced(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    assert main([*DRAW, "-o", str(tmp_path / "a.png")]) == 0
    assert media.load_image(tmp_path / "a.png").shape == (32, 32, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


# -- signals
# --------------------------------------------------------------------------------------------------

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)
@pytest.mark.parametrize("turn", range(3))
def test_a_signal_at_any_moment_leaves_nothing_half_written(tmp_path, number, turn):
    args = ("t2i", "a fox", "-m", CHECKPOINT, "--width", "256", "--height", "256", "--steps", "30", "-q")
    process = start(*args, "-o", "a.png", cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(0.3 + random.Random(f"{number}/{turn}").random() * 4)
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    # Before the first line of ours has run, Python itself ends by the signal; and the work may have been
    # done.
    assert process.returncode in (CODES[number], -number, 0), err
    if process.returncode == CODES[number]:
        assert b"Traceback" not in err
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left in ([], ["a.png"])
    if left:
        assert media.load_image(tmp_path / "a.png").shape == (256, 256, 3)


def test_a_killed_turn_of_several_loses_nothing_and_can_be_done_again(tmp_path):
    """Each turn edits what the one before saved. One that is killed at any moment leaves the earlier files as
    they were and nothing half written under its own name; done again, it writes the same bytes as ever.
    """
    edit = ("image_edit", "bluer", "a.png", "-m", CHECKPOINT, "--resolution", "image_256res")
    edit += ("--steps", "4", "-q", "-o", "b.png")
    assert run(*DRAW, "-o", "a.png", cwd=tmp_path)[0] == 0
    began = time.monotonic()
    assert run(*edit, cwd=tmp_path)[0] == 0
    took = time.monotonic() - began
    whole = {name: (tmp_path / name).read_bytes() for name in ("a.png", "b.png")}
    killed = 0
    for turn in range(4):
        (tmp_path / "b.png").write_bytes(b"what was there")
        process = start(*edit, cwd=tmp_path, stderr=subprocess.DEVNULL)
        time.sleep(took * (0.25 + 0.25 * turn) * random.Random(turn).uniform(0.7, 1))
        process.kill()
        killed += process.wait(60) == -signal.SIGKILL
        assert (tmp_path / "a.png").read_bytes() == whole["a.png"]
        assert (tmp_path / "b.png").read_bytes() in (b"what was there", whole["b.png"])
    assert killed > 0
    assert run(*edit, cwd=tmp_path)[0] == 0
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole


@pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)
def test_a_signal_while_a_file_is_written(tmp_path, number):
    """Caught in the act: the writer stands still with its temporary file open."""
    code = (
        "import sys, time\n"
        "from lance_core.cli import main as cli\n"
        "from lance_core.inputs import media\n"
        "def slow(frames):\n"
        "    for i, frame in enumerate(frames):\n"
        "        yield frame\n"
        "        print('written', flush=True)\n"
        "        time.sleep(0.5)\n"
        "import numpy as np\n"
        "def run(args, bars):\n"
        "    media.save_video('a.mp4', slow(np.zeros((60, 32, 32, 3), np.uint8)), 12)\n"
        "    return {}\n"
        "cli.generate.run = run\n"
        "cli.stop_on_signals()\n"
        "sys.exit(cli.main(['t2v', 'x']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=reset_signals,
    )
    assert process.stdout.readline() == b"written\n"
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == CODES[number], err
    assert b"cancelled" in err and b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []
