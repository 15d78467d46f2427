"""Many mixed jobs in one process leave nothing behind: memory, descriptors and threads stay flat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).resolve().parents[1]
JOBS = 500


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_five_hundred_mixed_jobs_leave_nothing_behind():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "soak.py"), str(JOBS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    points = found["points"]
    assert found["jobs"] == JOBS and len(points) == 10
    assert JOBS // 5 < found["refused"] < JOBS // 3, "two kinds of eight are refused"
    for what in ("descriptors", "threads", "python_threads"):
        assert points[-1][what] <= points[1][what], [point[what] for point in points]
    grown = mean(point["resident"] for point in points[-3:]) - points[1]["resident"]
    assert grown < 24 << 20, [point["resident"] >> 20 for point in points]
