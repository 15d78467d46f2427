"""What is predicted of several GPUs: shares, bytes that cross, and the sum of both."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lance_core.bench.case import RELEASED
from lance_core.bench.count import Passes
from lance_core.bench.split_count import PLANS, Shares, predict
from lance_core.cli.main import main

LAYERS = 2
TOKENS = 30 * 53 * 31  # of 848x480, 121 frames


@pytest.fixture(scope="module")
def passes() -> Passes:
    return Passes(replace(RELEASED, llm=replace(RELEASED.llm, num_layers=LAYERS)))


@pytest.fixture(scope="module")
def shares(passes) -> Shares:
    return Shares(passes)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_a_share_computes_its_part_and_receives_the_others(shares, processes):
    whole, part = shares.step(2, 1), shares.step(2, processes)
    assert whole.crossing.bytes == whole.crossing.times == 0
    assert part.count.flops == pytest.approx(whole.count.flops / processes, rel=3e-3), "and the markers"
    others = TOKENS - -(-TOKENS // processes)
    heads = RELEASED.llm.num_kv_heads * RELEASED.llm.head_dim
    keys_and_values = 2 * 2 * others * heads * 2  # of both branches, in bfloat16
    assert part.crossing.bytes == LAYERS * keys_and_values + 2 * others * 48 * 4
    assert part.crossing.times == LAYERS + 1


def test_guidance_sends_the_velocity_alone(shares):
    guided, one = shares.split("guidance", 2)
    assert guided.crossing.bytes == TOKENS * 48 * 4 and guided.crossing.times == 1
    assert one.crossing.times == 0 and guided.count.flops == one.count.flops
    both, quarter = shares.split("both", 4)
    assert both.count.flops == shares.step(1, 2).count.flops
    assert quarter.count.flops == shares.step(1, 4).count.flops
    assert shares.split("both", 2)[1].count.flops == shares.step(1, 2).count.flops


def test_more_processes_gain_more_and_never_more_than_their_number(passes):
    found = {(row["card"], row["split"], row["processes"]): row for row in predict(passes)}
    assert len(found) == len(PLANS)
    for (card, mode, processes), row in found.items():
        assert 1 < row["gain"] < processes, (card, mode, processes)
        assert row["step"] > row["crossing"] > 0
    for mode in ("sequence", "both"):
        gains = [found["H200", mode, processes]["gain"] for processes in (2, 4, 8)]
        assert gains == sorted(gains)
    assert found["RTX 4090", "sequence", 2]["crossing"] > 10 * found["H200", "sequence", 2]["crossing"]


def test_from_the_command_line(capsys):
    assert main(["bench", "count", "--split", "--layers", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(PLANS)
    assert main(["bench", "count", "--split", "--layers", "1"]) == 0
    assert "8 x H200, NVLink" in capsys.readouterr().out
