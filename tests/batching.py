"""What tests of batches share: small rows, runs in this process, and batches as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from golden_cases import GOLDEN

from lance_core.scale import batch

ROOT = Path(__file__).resolve().parents[1]
IMAGE, VIDEO = (GOLDEN / "checkpoint" / name for name in ("Lance_3B", "Lance_3B_Video"))
INPUTS = GOLDEN / "cases" / "inputs"
SMALL = {"width": 32, "height": 32, "steps": 1}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A JSONL file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(count: int) -> list[dict[str, Any]]:
    """Rows of t2i, each with a seed of its own."""
    return [{"id": f"r{i:02d}", "prompt": f"a fox, number {i}", "seed": i} for i in range(count)]


def run(file: Path, output: Path, **options: Any) -> dict[str, Any]:
    """`batch.run` of small pictures on the tiny checkpoint, in float32."""
    given = {"task": "t2i", "checkpoint": IMAGE, "dtype": "float32", **SMALL, **options}
    return batch.run(file, output, **{key: value for key, value in given.items() if value is not None})


def lines(output: Path) -> dict[str, dict[str, Any]]:
    """results.jsonl by id; every id once."""
    found = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in found}) == len(found)
    return {line["id"]: line for line in found}


def files(output: Path) -> dict[str, bytes]:
    """Every result, by name."""
    return {
        str(p.relative_to(output)): p.read_bytes()
        for p in output.rglob("*")
        if p.is_file() and p.name != "results.jsonl" and p.suffix != ".lock"
    }


def _as_in_a_shell() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(*args: str | Path, **options: Any) -> subprocess.Popen:
    """`python -m lance_core ...` in a process group of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "lance_core", *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=options.pop("before", _as_in_a_shell),
        start_new_session=True,
        **options,
    )


def arguments(file: Path, output: Path, *more: str | Path) -> list[str | Path]:
    """The command line of `run`."""
    small = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    known = ["batch", file, "-o", output, "--task", "t2i", "-m", IMAGE, "--dtype", "fp32", "-q"]
    return [*known, *small, *more]


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err
