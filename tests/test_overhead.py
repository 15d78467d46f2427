"""scripts/measure_overhead.py, as far as it goes without ComfyUI: its checkpoint, its sums and what it says
of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lance_core.checkpoint import tiny
from lance_core.checkpoint.checkpoint import Checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import measure_overhead


def test_its_checkpoint_opens(tmp_path):
    checkpoint = Checkpoint(measure_overhead.write_checkpoint(tmp_path / "made", 5, small=True))
    assert (checkpoint.config.llm.num_layers, checkpoint.config.llm.hidden_size) == (5, tiny.LLM.hidden_size)
    assert set(checkpoint.parts["gen"].dtypes.values()) == {torch.bfloat16}


def test_the_largest_differences_come_first_whatever_their_sign():
    host = {"same": (4, 0.5), "slower": (2, 0.9), "only here": (1, 0.25)}
    core = {"same": (4, 0.5), "slower": (2, 0.8), "only there": (3, 0.3)}
    rows = measure_overhead.difference(host, core, top=3)
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
    text = measure_overhead.report(told | {"rounds": 1, "steps": 2, "paths": paths, "profiles": profiles})
    assert (
        f"A step's overhead is {says}" in text
        and "aten::mm" in text
        and ("processor" in text) == (device == "cpu")
    )


@pytest.mark.parametrize(
    "words", [["--size", "768"], ["--size", "axb"], ["--steps", "1"], ["--rounds", "0"], ["--layers", "0"]]
)
def test_wrong_options_are_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["measure_overhead.py", *words])
    with pytest.raises(SystemExit) as ended:
        measure_overhead.arguments()
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err
