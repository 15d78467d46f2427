"""`bench overhead` as far as it goes without ComfyUI: its checkpoint, its sums and what it says of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from benching import options

from lance_core.bench import overhead, report
from lance_core.bench.run import run
from lance_core.checkpoint import tiny
from lance_core.checkpoint.checkpoint import Checkpoint
from lance_core.errors import RequestError


def test_its_checkpoint_opens(tmp_path):
    checkpoint = Checkpoint(overhead.write_checkpoint(tmp_path / "made", 5, small=True))
    assert (checkpoint.config.llm.num_layers, checkpoint.config.llm.hidden_size) == (5, tiny.LLM.hidden_size)
    assert set(checkpoint.parts["gen"].dtypes.values()) == {torch.bfloat16}


def test_the_largest_differences_come_first_whatever_their_sign():
    host = {"same": (4, 0.5), "slower": (2, 0.9), "only here": (1, 0.25)}
    core = {"same": (4, 0.5), "slower": (2, 0.8), "only there": (3, 0.3)}
    rows = overhead.difference(host, core, top=3)
    assert [row["name"] for row in rows] == ["only there", "only here", "slower"]
    assert rows[0] == {
        "name": "only there",
        "calls": 0.0,
        "core_calls": 3,
        "seconds": 0.0,
        "core_seconds": 0.3,
    }


@pytest.mark.parametrize(
    ("device", "threads", "says"),
    [
        ("cpu", 2, "+5.0%; the goal is at most 3%: MISSED"),
        ("cpu", 1, "+2.0%; the goal is at most 3%: met"),
        ("cuda:0", 1, "+5.0%"),
    ],
)
def test_the_verdict_is_on_the_slower_path(device, threads, says):
    """By the clock, unless the processor's own time is known to be this process's alone."""

    def path(clock: float, processor: float) -> dict[str, float]:
        return {
            "step": 1.0,
            "step_overhead": clock,
            "processor": 1.0,
            "processor_overhead": processor,
            "run": 2.0,
            "run_beside_steps": 0.1,
        }

    paths = {"Lance Sampler": path(0.05, 0.02), "KSampler": path(0.01, -0.01), "lance_core": path(0.0, 0.0)}
    told = {
        "model": "m",
        "size": "s",
        "dtype": "d",
        "device": device,
        "threads": threads,
        "torch": "t",
        "attention": "a",
    }
    profiles = {
        "operations": {
            "KSampler": [
                {"name": "aten::mm", "calls": 1, "core_calls": 2, "seconds": 0.1, "core_seconds": 0.2}
            ]
        }
    }
    told |= {"rounds": 1, "steps": 2, "paths": paths, "profiles": profiles}
    text = report.text(overhead.document(told))
    assert (
        f"A step's overhead is {says}" in text
        and "aten::mm" in text
        and ("processor" in text) == (device == "cpu")
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--size", "768"], "size '768'"),
        (["--size", "axb"], "size 'axb'"),
        (["--steps", "1"], "steps is 1"),
        (["--rounds", "0"], "rounds is 0"),
        (["--layers", "0"], "layers is 0"),
        (["--comfyui", "."], "not ComfyUI's folder.*scripts/comfyui.py prepare"),
        ([], "--comfyui or COMFYUI_PATH.*scripts/comfyui.py prepare"),
    ],
)
def test_wrong_options_are_refused(words, says, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(RequestError, match=says):
        run(options("overhead", *words))


def test_comfyuis_python_is_the_one_named_or_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    for name in ("main.py", "nodes.py", "comfy", "venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert overhead.find_comfyui(None) == tmp_path
    if os.name != "nt":
        assert overhead.find_python(None, tmp_path) == tmp_path / "venv" / "bin" / "python"
    assert overhead.find_python(sys.executable, tmp_path) == Path(sys.executable)
    monkeypatch.setenv("COMFYUI_PYTHON", "no-such-program")
    with pytest.raises(RequestError, match="no-such-program is not a program"):
        overhead.find_python(None, tmp_path)
