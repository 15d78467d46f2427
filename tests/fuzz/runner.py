"""Runs a campaign's cases in worker processes and counts what comes of them.

A case is a number; `campaign.prepare(folder)` makes what all cases share, `campaign.case(n, seed, shared)`
runs one and raises whatever it raises. Counted are: done, typed (a LanceError of under 500 characters), long
(a longer one), untyped (any other exception), hang (over `SECONDS`), large (over `MEMORY` bytes more than the
worker began with), dead (the worker ended).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

SECONDS = 20.0
MEMORY = 2 << 30
MESSAGE = 500
CASES_A_WORKER = 400  # then a fresh one: what leaks shows, and does not add up
BAD = ("long", "untyped", "hang", "large", "dead")
HERE = Path(__file__).resolve().parent


def run(campaign: str, count: int, seed: int = 0, jobs: int = 1, say: Any = None) -> dict[str, Any]:
    """All cases of a campaign. Returns {"counts": {...}, "seconds": s, "bad": [{"case", "outcome", "what"},
    ...]}.
    """
    began = time.monotonic()
    counts: Counter[str] = Counter()
    bad: list[dict[str, Any]] = []
    todo = list(range(count))[::-1]
    lock = threading.Lock()

    def take() -> list[int]:
        with lock:
            return [todo.pop() for _ in range(min(len(todo), CASES_A_WORKER))]

    def note(case: int, outcome: str, what: str = "") -> None:
        with lock:
            counts[outcome] += 1
            if outcome in BAD:
                bad.append({"case": case, "outcome": outcome, "what": what})
            if say is not None and sum(counts.values()) % 100 == 0:
                say(f"{campaign}: {sum(counts.values())} of {count}, {dict(counts)}")

    with tempfile.TemporaryDirectory() as folder:
        import_module(f"campaign_{campaign}").prepare(Path(folder))

        def work() -> None:
            cases = take()
            while cases:
                cases = _worker(campaign, seed, Path(folder), cases, note) or take()

        threads = [threading.Thread(target=work) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {"counts": dict(counts), "seconds": round(time.monotonic() - began, 1), "bad": bad}


def _worker(campaign: str, seed: int, folder: Path, cases: list[int], note: Any) -> list[int]:
    """One worker over some cases; returns those it did not come to."""
    command = [sys.executable, str(HERE / "runner.py"), campaign, str(seed), str(folder), *map(str, cases)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_collect, args=(process.stdout, lines), daemon=True).start()
    left = list(cases)
    try:
        starting = True
        while left:
            try:
                line = lines.get(timeout=SECONDS + (60 if starting else 0))
            except queue.Empty:
                note(left.pop(0), "hang", f"over {SECONDS:g} s")
                return left
            if not line:
                note(left.pop(0), "dead", f"exit {process.wait()}")
                return left
            starting = False
            if line.startswith("{"):
                found = json.loads(line)
                note(left.pop(0), found["outcome"], found["what"])
    finally:
        process.kill()
        process.wait()
    return left


def _collect(stream: Any, lines: queue.Queue[str]) -> None:
    """Put each line of a worker's output as it comes, and an empty one at its end."""
    for line in stream:
        lines.put(line)
    lines.put("")


def _resident() -> int:
    """Peak bytes of this process since it was last reset, or 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _main(campaign: str, seed: int, folder: Path, cases: list[int]) -> None:
    """A worker: one line of JSON a case."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no result
    module = import_module(f"campaign_{campaign}")
    from lance_core.errors import LanceError

    shared = module.load(folder)
    out.write("ready\n")
    for case in cases:
        _reset_peak()
        before, outcome, what = _resident(), "done", ""
        try:
            module.case(case, seed, shared)
        except LanceError as error:
            outcome, what = (
                ("typed" if len(str(error)) < MESSAGE else "long"),
                f"{type(error).__name__}: {error}"[:300],
            )
        except BaseException as error:  # panics of extension modules are no Exceptions
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome, what = (
                "untyped",
                f"{type(error).__name__}: {str(error)[:200]} at {where.filename}:{where.lineno}",
            )
        if _resident() - before > MEMORY:
            outcome, what = "large", f"{(_resident() - before) / 1e9:.1f} GB; {outcome} {what}"
        out.write(json.dumps({"outcome": outcome, "what": what}) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), [int(word) for word in sys.argv[4:]])
