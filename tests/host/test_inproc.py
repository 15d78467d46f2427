"""Runs tests/host/inproc in ComfyUI's own Python, once, and reports each of its files as a test here."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

INPROC = Path(__file__).parent / "inproc"
FILES = sorted(path.name for path in INPROC.glob("test_*.py"))
SECONDS = 1800


@dataclass
class Report:
    """What the subprocess printed, and its cases by file: (name, "passed" | "failed" | "skipped", why)."""

    output: str
    cases: dict[str, list[tuple[str, str, str]]]


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest, host, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One run of all files that are selected in this session."""
    probe = (
        "import importlib.util as u, sys; sys.exit(' and '.join(m for m in ('pytest', 'torch') if not "
        "u.find_spec(m)) or 0)"
    )
    lacking = subprocess.run([host.python, "-c", probe], capture_output=True, text=True)
    if lacking.returncode:
        pytest.skip(f"{host.python} lacks {lacking.stderr.strip()[-300:]}")
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_inproc"]
    files = sorted({item.callspec.params["file"] for item in items})
    folder = tmp_path_factory.mktemp("inproc")
    # Not from the repository root: its nodes/ package must not hide ComfyUI's nodes.py.
    command = [
        host.python,
        "-m",
        "pytest",
        "-c",
        INPROC / "pytest.ini",
        "--rootdir",
        INPROC,
        "--confcutdir",
        INPROC,
    ]
    command += [
        "-o",
        "junit_logging=system-out",
        "--basetemp",
        folder / "tmp",
        "--junitxml",
        folder / "report.xml",
        *(INPROC / file for file in files),
    ]
    environment = {
        **os.environ,
        "LANCE_INPROC_COMFYUI": str(host.path),
        "DO_NOT_TRACK": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for variable in ("PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST"):
        environment.pop(variable, None)
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    return Report(done.stdout, _cases(folder / "report.xml"))


def _cases(path: Path) -> dict[str, list[tuple[str, str, str]]]:
    cases: dict[str, list[tuple[str, str, str]]] = {}
    if not path.exists():
        return cases
    for case in ElementTree.parse(path).iter("testcase"):
        told = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if told is None else "skipped" if told.tag == "skipped" else "failed"
        why = (
            _printed(case)
            if told is None
            else f"{told.get('message')}\n{told.text or ''}"
            if outcome == "failed"
            else str(told.get("message"))
        )
        # "test_x" or "test_x.TestClass"; a file that cannot be collected has no class name but is the case's
        # name.
        module = (case.get("classname") or case.get("name", "")).split(".")[0]
        cases.setdefault(f"{module}.py", []).append((case.get("name", "?"), outcome, why))
    return cases


def _printed(case: ElementTree.Element) -> str:
    """What a case that passed has printed, in one line."""
    lines = (case.findtext("system-out") or "").splitlines()
    return "; ".join(line for line in lines if line and not line.startswith("---"))[:300]


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("file", FILES)
def test_inproc(file: str, report: Report) -> None:
    cases = report.cases.get(file)
    assert cases, f"{file} did not run:\n{report.output[-6000:]}"
    for name, outcome, why in cases:
        print(f"{outcome:8} {name} {why if outcome != 'failed' else ''}")
    failed = [f"{name}: {why}" for name, outcome, why in cases if outcome == "failed"]
    assert not failed, f"{len(failed)} of {len(cases)} failed in ComfyUI's Python\n\n" + "\n\n".join(failed)
    skipped = {why for _, outcome, why in cases if outcome == "skipped"}
    if all(outcome == "skipped" for _, outcome, _ in cases):
        pytest.skip("; ".join(sorted(skipped)))
