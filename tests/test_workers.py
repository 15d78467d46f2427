"""Several workers: every row once, whoever is lost; no worker outlives its batch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from batching import arguments, files, finish, lines, prompts, run, start, write_rows

from lance_core.errors import RequestError
from lance_core.scale import processes
from lance_core.scale.pool import MAX_ATTEMPTS, Pending, Pool
from lance_core.scale.rows import Row


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    run(write_rows(folder / "a.jsonl", prompts(8)), folder / "out")
    return folder


def rows(count: int, sizes: int = 1) -> list[Row]:
    return [Row(i, str(i), "t2i", "x", options={"width": i % sizes}, checkpoint="m") for i in range(count)]


# -- processes -----------------------------------------------------------------------------------------------


def test_two_workers_one_killed_in_the_middle(drawn, tmp_path, monkeypatch, caplog):
    started = []
    make = processes.ProcessWorker.__init__

    def remember(self, *args):
        make(self, *args)
        started.append(self)

    monkeypatch.setattr(processes.ProcessWorker, "__init__", remember)

    def kill_one(line) -> None:
        if len(started) == 2:
            started[0]._child.kill()

    result = run(drawn / "a.jsonl", tmp_path / "out", workers=2, on_line=kill_one)
    assert (result["made"], result["failed"]) == (8, 0)
    assert len(started) == 3 and "is lost (it was ended by SIGKILL" in caplog.text
    assert all(worker._child.poll() is not None for worker in started)
    assert files(tmp_path / "out") == files(drawn / "out")
    assert set(lines(tmp_path / "out")) == set(lines(drawn / "out"))


def children(parent: int) -> list[int]:
    """Processes started by one, by /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_a_batch_that_is_killed_leaves_no_worker(drawn, tmp_path):
    out = tmp_path / "out"
    process = start(*arguments(drawn / "a.jsonl", out, "--workers", "2"))
    until = time.monotonic() + 60
    while time.monotonic() < until and not list(out.glob("*.png")):
        time.sleep(0.005)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    until = time.monotonic() + 10
    while time.monotonic() < until and any(Path(f"/proc/{one}").exists() for one in workers):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{one}").exists() for one in workers)
    run(drawn / "a.jsonl", out)
    assert files(out) == files(drawn / "out")


def test_workers_that_cannot_begin_end_the_run_with_a_sentence(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    with pytest.raises(RequestError, match="ended without a result.*exit code 1"):
        run(drawn / "a.jsonl", tmp_path / "out", workers=2)


def test_a_full_disk_in_a_worker(drawn, tmp_path):
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    out = tmp_path / "out"
    code, _, err = finish(start(*arguments(drawn / "a.jsonl", out, "--workers", "1"), before=limit))
    assert code == 2 and "takes nothing more" in err
    assert not list(out.glob("*.png"))


def test_how_many_all_are(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(processes, "_memory", lambda: 100)
    assert processes.worker_count("all", 30) == 3
    assert processes.worker_count("all", 1000) == 1
    assert processes.worker_count("all", 0) == 64
    assert processes.worker_count("7", 30) == processes.worker_count(7, 30) == 7
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes.worker_count("all", 30) == 4
    assert [processes.device_for(i, "cuda") for i in (0, 3, 4)] == ["cuda:0", "cuda:3", "cuda:0"]
    assert processes.device_for(1, "cuda:2") == "cuda:2" and processes.device_for(1, "cpu") == "cpu"


# -- the pool, with workers that need no model ---------------------------------------------------------------


class Fake:
    """A worker that answers at once, and is lost at rows it is told."""

    made: list[tuple[int, str]]

    def __init__(self, place, post, dies) -> None:
        self.place, self.post, self.dies, self.gone = place, post, dies, False

    def give(self, row: Row) -> None:
        if self.gone:
            return
        if self.dies(row):
            self.gone = True
            self.post({"lost": "it fell over"})
        else:
            self.post({"line": {"id": row.id, "place": self.place, "error": None}})

    def stop(self) -> None:
        self.gone = True


def drawn_by(pool_rows, count, dies=lambda row: False) -> list[dict]:
    return list(Pool(pool_rows, lambda place, post: Fake(place, post, dies), count).lines())


def test_every_row_once():
    found = drawn_by(rows(20), 3)
    assert sorted(int(line["id"]) for line in found) == list(range(20))


def test_no_rows():
    assert drawn_by([], 3) == []


def test_a_row_that_ends_every_worker_becomes_an_error_and_the_others_are_made(caplog):
    tries = []

    def dies(row) -> bool:
        if row.id == "5":
            tries.append(row.id)
            return True
        return False

    found = drawn_by(rows(12), 2, dies)
    assert sorted(int(line["id"]) for line in found) == list(range(12))
    bad = [line for line in found if line["error"]]
    assert [line["id"] for line in bad] == ["5"] and len(tries) == MAX_ATTEMPTS
    assert bad[0]["error"] == "3 workers ended while they made this row, the last one so: it fell over"


def test_a_worker_lost_once_costs_nothing(caplog):
    lost = []

    def dies(row) -> bool:
        if row.id in "369" and row.id not in lost:
            lost.append(row.id)
            return True
        return False

    found = drawn_by(rows(12), 2, dies)
    assert sorted(int(line["id"]) for line in found) == list(range(12)) and len(lost) == 3
    assert not [line for line in found if line["error"]]


def test_workers_that_are_all_lost(caplog):
    with pytest.raises(RequestError, match="workers in sequence ended without a result.*it fell over"):
        drawn_by(rows(12), 2, lambda row: True)


def test_a_worker_keeps_its_checkpoint_and_size():
    pending = Pending(
        [Row(i, str(i), "t2i", "x", options={"width": i % 2}, checkpoint="ab"[i % 3 == 0]) for i in range(6)]
    )
    taken, last = [], None
    while len(pending):
        row = pending.take(last)
        last = row.group
        taken.append((row.checkpoint, row.options["width"]))
    assert taken == sorted(taken, key=lambda one: (one[0], taken.index(one)))
    assert len({*taken}) == sum(a != b for a, b in zip(taken, [None, *taken], strict=False))


def test_two_workers_take_a_checkpoint_each():
    two = [Row(i, str(i), "t2i", "x", checkpoint="ab"[i % 2]) for i in range(8)]
    pending = Pending(two)
    first, second = pending.take(), pending.take()
    assert first.checkpoint == "a" and second.checkpoint == "b"


def test_the_last_rows_wait_for_whoever_is_free_first():
    """A worker is given a second row only while there are enough for all."""
    held: dict[int, list] = {}

    class Holding(Fake):
        def give(self, row):
            held.setdefault(self.place, []).append(row)
            if sum(map(len, held.values())) == 2:
                for place, given in held.items():
                    assert len(given) == 1, place
                self.post({"line": {"id": row.id, "error": None}})

    pool = Pool(rows(2), lambda place, post: Holding(place, post, None), 2)
    assert next(pool.lines())["error"] is None
