"""The README's headless commands, copied from it and run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def started(make_server):
    """A server of its own, for what is queued here is full-sized and is interrupted."""
    return make_server(models={"lance": ROOT / "tests" / "golden" / "checkpoint"})


def block(starting: str) -> str:
    (found,) = (b for b in BLOCKS if b.startswith(starting))
    return found


def test_plain_http(started):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    queue, _, history = re.split(r"\n(?=curl|#)", block("curl").strip())
    done = subprocess.run(
        ["bash", "-c", at(queue, started)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    answer = json.loads(done.stdout)
    assert answer["node_errors"] == {}, done.stdout
    asked = at(history, started).replace("PROMPT_ID", answer["prompt_id"])
    assert subprocess.run(
        ["bash", "-c", asked], capture_output=True, text=True, timeout=60
    ).stdout.startswith("{")
    stop = f"curl -s -X POST {started.url}/interrupt"
    assert subprocess.run(["bash", "-c", stop], timeout=60).returncode == 0


def at(command: str, server) -> str:
    """The command for this server instead of the one on ComfyUI's usual port."""
    assert "http://127.0.0.1:8188" in command
    return command.replace("http://127.0.0.1:8188", server.url)


def test_files_named_in_the_commands_are_there():
    named = {path for b in BLOCKS for path in re.findall(r"workflows/api/\w+\.json", b)}
    assert named
    assert all((ROOT / path).is_file() for path in named)


def test_workflows_and_pictures_named_in_it_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for picture in re.findall(r"\]\((docs/[^)]+)\)", text):
        assert (ROOT / picture).is_file(), picture
    workflows = set(re.findall(r"`(lance_[a-z_]+)`", text)) - {"lance_core"}
    assert workflows == {path.stem for path in (ROOT / "workflows").glob("*.json")}


def test_it_is_short_and_begins_with_what_to_try():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert {"make demo", "make test"} <= {line[:9] for line in lines[:24]}


def test_links_of_the_pages_lead_to_files():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"
