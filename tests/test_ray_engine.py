"""Workers as Ray actors, on a Ray of this machine; without the package ray only what is said then."""

from __future__ import annotations

import builtins
import os
import signal
import time
from pathlib import Path

import pytest
from batching import files, lines, prompts, run, write_rows

from lance_core.errors import RequestError
from lance_core.scale import ray_engine


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    own = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "ray":
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    file = write_rows(tmp_path / "a.jsonl", prompts(1))
    with pytest.raises(RequestError, match=r"pip install 'comfyui-lance\[ray\]'"):
        run(file, tmp_path / "out", engine="ray", workers=2)


class Broken(ray_engine.Drawer):
    """An actor whose reading of media fails, as it does where a package is missing."""

    def __init__(self, settings) -> None:
        super().__init__(settings)

        def read(row):
            raise ImportError("nothing here")

        self._session.read = read


@pytest.fixture(scope="module")
def ray():
    """The package; these tests are left out, and say so, where it is not installed."""
    return pytest.importorskip("ray", reason="the package ray is not installed: pip install ray")


def test_two_actors_one_killed_in_the_middle(ray, tmp_path, monkeypatch, caplog):
    """Every row is made once, and as one process makes it."""
    file = write_rows(tmp_path / "a.jsonl", prompts(10))
    run(file, tmp_path / "alone")
    started = []
    make = ray_engine.RayWorker.__init__

    def remember(self, *args):
        make(self, *args)
        started.append(self)

    monkeypatch.setattr(ray_engine.RayWorker, "__init__", remember)
    killed = []

    def kill_one(line) -> None:
        if not killed:
            killed.append(ray.get(started[0]._actor.ready.remote()))
            os.kill(killed[0], signal.SIGKILL)

    result = run(file, tmp_path / "out", engine="ray", workers=2, on_line=kill_one)
    assert (result["made"], result["failed"]) == (10, 0)
    assert len(started) == 3 and "is lost" in caplog.text
    assert files(tmp_path / "out") == files(tmp_path / "alone")
    assert len(lines(tmp_path / "out")) == 10
    assert not ray.is_initialized()
    until = time.monotonic() + 10
    while time.monotonic() < until and Path(f"/proc/{killed[0]}").exists():
        time.sleep(0.1)
    assert run(file, tmp_path / "out", engine="ray", workers=2)["done"] == 10


def test_actors_that_cannot_work_end_the_run_with_a_sentence(ray, tmp_path, monkeypatch, caplog):
    """As on a cluster whose machines lack something: nobody waits for what never comes."""
    rows = [{"id": f"{i}", "task": "image_edit", "prompt": "x", "image": "in.png"} for i in range(9)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "in.png").write_bytes(b"a picture")
    monkeypatch.setattr(ray_engine, "Drawer", Broken)
    here = str(Path(__file__).parent)  # where actors find Broken
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
    with pytest.raises(RequestError, match="ended without a result.*ImportError: nothing here"):
        run(file, tmp_path / "out", engine="ray", workers=1, task=None)


def test_more_workers_than_the_cluster_has_room_for(ray, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", prompts(1))
    with pytest.raises(RequestError, match="9999 workers need a CPU each, and the cluster has"):
        run(file, tmp_path / "out", engine="ray", workers=9999)
    assert not ray.is_initialized()


def test_a_cluster_that_is_not_there(ray, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", prompts(1))
    with pytest.raises(RequestError, match="Ray cannot be used at 127.0.0.1:9"):
        run(file, tmp_path / "out", engine="ray", address="127.0.0.1:9")
