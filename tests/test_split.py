"""One request over several processes: the result of one process, and a sentence when one of them dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import split_ranks
import torch
from batching import IMAGE, ROOT, finish, start

from lance_core.cli.main import main
from lance_core.errors import RequestError
from lance_core.inputs import media
from lance_core.scale import launch
from lance_core.scale.groups import check_count

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def alone() -> dict:
    """Every case by one process."""
    return split_ranks.draw(split_ranks.opened())


@pytest.fixture
def ranks(monkeypatch):
    """Start tests/split_ranks.py as several processes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(ROOT)]))

    def run(mode: str, count: int, file: Path) -> dict:
        assert launch.run([mode, str(file)], count, "split_ranks") == 0
        return torch.load(file, weights_only=True)

    return run


# Of "odd" (15 tokens, two guided steps and one that is not): tokens of the generation expert by process
WORK = {
    ("guidance", 2): [15 * 3, 15 * 3],
    ("sequence", 2): [7 * 5, 8 * 5],
    ("sequence", 3): [5 * 5] * 3,
    ("sequence", 4): [3 * 5, 4 * 5, 4 * 5, 4 * 5],
    ("both", 4): [7 * 2 + 3, 8 * 2 + 4, 7 * 2 + 4, 8 * 2 + 4],
}


def work_of(file: Path, count: int) -> list[int]:
    """What each process computed of the case "odd"."""
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(count)]


@pytest.mark.parametrize(("mode", "count"), WORK)
def test_several_processes_draw_what_one_draws(ranks, alone, tmp_path, mode, count):
    found = ranks(mode, count, tmp_path / "found.pt")
    assert set(found) == set(alone)
    for name, parts in alone.items():
        for what, wanted, got in zip(("latent", "frames"), parts, found[name], strict=True):
            assert got.shape == wanted.shape, name
            error = float((got - wanted).abs().max() / wanted.abs().max())
            assert error <= 1e-5, f"{name}: {what} differs by {error:.1e}"
    assert work_of(tmp_path / "found.pt", count) == WORK[mode, count]
    kept = found["first"][0][0] - alone["first"][0][0]
    assert float(kept.abs().max()) == 0, "the first frame is kept, bit for bit"


def test_shares():
    """Stretches that cover everything once, as even as may be."""
    from lance_core.scale import groups

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(3):
            patch.setattr(groups.dist, "get_world_size", lambda group: 3)
            patch.setattr(groups.dist, "get_rank", lambda group, rank=rank: rank)
            own, lengths = groups.share(10, "a group")
            assert lengths == [3, 3, 4]
            seen += range(10)[own]
    assert seen == list(range(10))
    assert groups.share(10, None) == (slice(0, 10), [10])


DRAW = ["t2i", "a fox", "-m", IMAGE, "--width", "48", "--height", "48", "--dtype", "fp32", "-q"]


def test_from_the_command_line(tmp_path):
    one, three = tmp_path / "one.png", tmp_path / "three.png"
    assert finish(start(*DRAW, "--steps", "2", "-o", one))[0] == 0
    code, out, err = finish(
        start(*DRAW, "--steps", "2", "-o", three, "--split", "sequence", "--workers", "3", "--json")
    )
    assert code == 0, err
    (line,) = out.splitlines()
    assert json.loads(line)["files"][0]["file"] == str(three)
    difference = media.load_image(one).astype(int) - media.load_image(three).astype(int)
    assert abs(difference).max() <= 1
    assert media.read_metadata(three) == media.read_metadata(one)
    assert sorted(os.listdir(tmp_path)) == ["one.png", "three.png"]


def test_torchrun_starts_it_too(tmp_path):
    """RANK and WORLD_SIZE from outside: no processes of our own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in (0, 1):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own |= {"LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lance_core", *map(str, DRAW), "--steps", "2", "--split", "guidance"]
        command += ["-o", str(tmp_path / "a.png")]
        processes.append(
            subprocess.Popen(
                command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    ended = [finish(process) for process in processes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "a.png" in ended[0][1] and ended[1][1] == "", "only the first prints"
    assert media.load_image(tmp_path / "a.png").shape == (48, 48, 3)


def ranks_of(parent: int) -> dict[int, int]:
    """The processes of a split by their rank, from /proc."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, NotADirectoryError):
            continue
        found |= {int(line[5:]): int(entry.name) for line in environment if line.startswith(b"RANK=")}
    return found


def gone(processes, seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(Path(f"/proc/{one}").exists() for one in processes):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def drawing(tmp_path):
    """A split of three processes in the middle of a result that takes long; and its processes by rank."""
    long = ["--steps", "100000", "-o", tmp_path / "a.png", "--split", "sequence", "--workers", "3"]
    process = start(*DRAW[:-1], *long, stdin=subprocess.DEVNULL)
    os.set_blocking(process.stderr.fileno(), False)
    shown, until = b"", time.monotonic() + 60
    while time.monotonic() < until and b"denoising" not in shown:
        time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            shown += os.read(process.stderr.fileno(), 1 << 16)
    os.set_blocking(process.stderr.fileno(), True)
    found = ranks_of(process.pid)
    assert sorted(found) == [0, 1, 2], shown
    yield process, found
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
@pytest.mark.parametrize("rank", [0, 2])
def test_one_that_dies_ends_the_others_with_a_sentence(drawing, tmp_path, rank):
    process, found = drawing
    os.kill(found[rank], signal.SIGKILL)
    began = time.monotonic()
    code, _, err = finish(process, 15)
    assert time.monotonic() - began < 10
    assert code == 2 and f"error: process {rank + 1} of 3: it was ended by SIGKILL" in err
    assert "Traceback" not in err and "start it again" in err
    assert gone(found.values()) and not (tmp_path / "a.png").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_they_end_with_whoever_started_them(drawing, number):
    process, found = drawing
    os.kill(process.pid, number)
    code, _, err = finish(process, 15)
    assert code == (-9 if number is signal.SIGKILL else 130) and "Traceback" not in err
    assert gone(found.values())


def test_an_error_that_all_have_is_said_once(tmp_path, capfd):
    words = [
        "t2i",
        "a fox",
        "-m",
        str(IMAGE),
        "--width",
        "4096",
        "--height",
        "48",
        "-o",
        str(tmp_path / "a.png"),
    ]
    assert main([*words, "--split", "sequence", "--workers", "2"]) == 2
    assert capfd.readouterr().err.count("error:") == 1


@pytest.mark.parametrize(
    ("mode", "count", "said"),
    [("guidance", 3, "takes 2 processes"), ("both", 3, "even number"), ("x", 2, "split is 'x'")],
)
def test_numbers_that_do_not_fit(mode, count, said):
    with pytest.raises(RequestError, match=said):
        check_count(mode, count)


def test_workers_without_split(tmp_path, capsys):
    words = ["t2i", "a fox", "-m", str(IMAGE), "-o", str(tmp_path / "a.png")]
    assert main([*words, "--workers", "2"]) == 2
    assert "--workers is for --split" in capsys.readouterr().err


def test_how_many_processes_without_a_number(monkeypatch):
    assert launch.count_for("sequence", None) == max(torch.cuda.device_count(), 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [launch.count_for(mode, None) for mode in ("guidance", "sequence", "both")] == [2, 4, 4]
    assert launch.count_for("both", "6") == 6
