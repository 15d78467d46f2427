"""The benchmark's subcommands: which options mean which, what is written where, and a quick --help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benching import QUICK, options

from lance_core.bench import memory, run
from lance_core.errors import RequestError

OTHERS = ("memory", "loading", "quality", "overhead")


def test_without_a_command_the_options_are_those_of_speed():
    words = ("--size", "64x48", "--frames", "5", "9", "--skip", "vit")
    assert vars(options(*words)) == vars(options("speed", *words))
    assert options().bench == "speed" and options("--json").bench == "speed" and options("--json").json
    for name in OTHERS:
        assert options(name, "-q").quiet and options(name).bench == name


def test_a_suite_is_asked_for_in_two_ways():
    for words in ([], ["small"], ["full"]):
        one, two = vars(options("suite", *words, *QUICK)), vars(options("--suite", *words, *QUICK))
        assert one | {"bench": "speed"} == two
    assert options("suite").suite == "auto" and options().suite is None


@pytest.mark.parametrize("words", [["suite", "tiny"], ["memory", "--size", "64x64"], ["nothing"]])
def test_what_a_command_does_not_know_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        options(*words)
    assert ended.value.code == 2 and words[-1] in capsys.readouterr().err


def test_help_needs_no_torch():
    code = """
import argparse, sys
from lance_core.bench import run
parser = argparse.ArgumentParser()
run.add_arguments(parser)
parser.format_help(), parser.parse_args(["suite", "small"])
assert not {"torch", "numpy", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_results_are_told_as_text_markdown_and_json(tmp_path, monkeypatch):
    request = memory.REQUESTS[0]
    monkeypatch.setattr(
        memory, "measure", lambda *asked: memory.Stages(memory.RELEASED, "meta", peaks={"token": 10**9})
    )
    files = {name: tmp_path / f"memory.{name}" for name in ("json", "md")}
    words = ("memory", "--only", request.name, "--output", str(files["json"]), "--markdown", str(files["md"]))
    seen = []
    result = run.run(options(*words), lambda what, done, total: seen.append((done, total)))
    assert result == json.loads(files["json"].read_text()) and result["bench"] == "memory"
    assert len(result["results"]) == len(memory.WEIGHTS) * len(memory.PLACES) == len(seen)
    assert f"| {request.name} | 1.0 (4 GB) |" in files["md"].read_text() and "1.0 (4 GB)" in run.report(
        result
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["memory", "--only", "no such"], "no request's name contains 'no such'.*t2i 768x768"),
        (["loading", "--cases", "fp9"], "no case 'fp9'.*fp8"),
        (["loading", "--layers", "37"], "layers is 37"),
        (["loading", "--folder", "no/such"], "no/such"),
        (["quality", "--steps", "0"], "steps is 0"),
        (["quality", "--output", "no/such/file.json"], "its folder does not exist"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_measured(words, says, monkeypatch):
    with pytest.raises(RequestError, match=says):
        run.run(options(*words))
