"""Saved files: the same bytes each time, and whole or not there, whatever happens meanwhile."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made_media import numbered

from lance_core.errors import MediaError
from lance_core.inputs import files, media, video_writer

ROOT = Path(__file__).parents[1]


def unsettle(rng: np.random.Generator) -> None:
    """Leave other numbers in memory that is free, as work between two saves does."""
    held = [np.full(int(n), n % 251, np.uint8) for n in rng.integers(64, 100_000, 60)]
    del held[::2]


def noisy(frames: int, height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 12, (frames, height, width, 3))
    return np.clip(numbered(frames, height, width) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("suffix", "height", "width"),
    [(".mp4", 64, 176), (".mp4", 65, 191), (".mp4", 96, 128), (".mov", 64, 96), (".mkv", 64, 144)],
)
def test_the_same_frames_are_the_same_file(tmp_path, suffix, height, width):
    """x264's macroblock tree read what lay behind its rows: widths of 8 macroblocks and more had one file."""
    clip, rng = noisy(5, height, width), np.random.default_rng(0)

    def frames():
        for frame in clip:
            unsettle(rng)
            yield frame

    found, until = set(), time.monotonic() + 1.5
    while time.monotonic() < until:
        path = media.save_video(tmp_path / f"x{suffix}", frames(), 12, {"seed": 1})
        found.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(found) == 1


def test_the_same_file_under_load_and_in_another_process(tmp_path):
    code = (
        "import sys; from test_media_saving import *\n"
        "clip = noisy(5, 64, 176)\n"
        "names = [media.save_video(sys.argv[1] + f'{i}.mp4', clip, 12).read_bytes() for i in range(25)]\n"
        "print(*{hashlib.sha256(n).hexdigest() for n in names})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / f"{i}-")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(3)
    ]
    found = {done.communicate()[0].strip() for done in running}
    assert len(found) == 1 and all(len(one) == 64 for one in found)


def test_how_x264_is_made_repeatable():
    """Without the macroblock tree, whose AVX-512 code is at fault, and with a fixed number of threads."""
    assert video_writer.H264_OPTIONS["x264-params"] == "mbtree=0"
    assert video_writer.H264_OPTIONS["threads"].isdigit()


def test_pictures_are_the_same_file(tmp_path):
    for suffix in media.IMAGE_FORMATS:
        saved = {
            media.save_image(tmp_path / f"{i}{suffix}", noisy(1, 33, 47)[0], {"a": 1}).read_bytes()
            for i in range(5)
        }
        assert len(saved) == 1


def test_a_temporary_name_is_unlike_any_other(tmp_path):
    """Two savers of one path never share a file: the last one wins, whole."""
    target = tmp_path / "x.png"
    with files.replacing(target) as one, files.replacing(target) as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
        assert one != other and one.parent == other.parent == tmp_path
        assert str(os.getpid()) in one.name and not target.exists()
    assert target.read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1


def test_what_a_kill_left_behind_is_cleaned_by_a_later_save(tmp_path):
    names = [f".{pid}-{'0f' * 16}.part" for pid in (1, 2)] + [".1-mine.part", "1.part"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / names[1])  # being written now
    media.save_image(tmp_path / "x.png", noisy(1, 8, 8)[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:], "x.png"])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("name", ["x.mp4", "x.png"])
def test_a_kill_leaves_nothing_under_the_final_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"what was there")
    code = (
        "import sys; from test_media_saving import *\n"
        "path = Path(sys.argv[1]); clip = noisy(20, 240, 320)\n"
        "print('started', flush=True)\n"
        "while True:\n"
        "    media.save_video(path, clip, 12) if path.suffix == '.mp4' else media.save_image(path, clip[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    for pause in (0.05, 0.2):
        running = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / name)], stdout=subprocess.PIPE, env=environment
        )
        assert running.stdout and running.stdout.readline().strip() == b"started"
        time.sleep(pause)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        if (tmp_path / name).read_bytes() != b"what was there":
            assert media.read_clip(tmp_path / name).total in (1, 20)


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "folder.png", tmp_path / "none" / "x.png", tmp_path / ("x" * 300 + ".png")):
        with pytest.raises(MediaError, match="cannot be written") as refused:
            media.save_image(path, noisy(1, 8, 8)[0])
        assert len(str(refused.value)) < 500
    with pytest.raises(MediaError, match="cannot be written"):
        media.save_video(tmp_path / "none" / "x.mp4", noisy(1, 8, 8), 12)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]
