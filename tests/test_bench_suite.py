"""The benchmark's suite: every row measured or with a reason why not, what is made of the numbers, and what
is written.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from benching import CHECKPOINT
from benching import suite as run_suite

from lance_core.bench import plot, speed, suite
from lance_core.bench import run as bench_run
from lance_core.bench.case import case_of
from lance_core.bench.growth import fit, steadiness
from lance_core.bench.measure import Bench
from lance_core.checkpoint.checkpoint import Checkpoint
from lance_core.errors import RequestError

pytestmark = pytest.mark.usefixtures("small_rates")
CONFIG = Checkpoint(CHECKPOINT).config
ROWS = (
    "t2i",
    "t2i_batch4",
    "t2v",
    "prefill_edit",
    "token",
    "decode_image",
    "encode_image",
    "decode_video",
    "encode_video",
)


@pytest.fixture
def unmeasured(monkeypatch):
    """Fails if anything is measured."""
    monkeypatch.setattr(Bench, "rates", lambda self: pytest.fail("measured before the request was checked"))


def test_goals_are_those_of_the_full_suite():
    full, small = suite.SUITES["full"], suite.SUITES["small"]
    assert tuple(row.name for row in full.rows) == tuple(row.name for row in small.rows) == ROWS
    assert set(suite.GOALS) == set(ROWS) and (*suite.GOALS, "growth") == suite.NAMES
    assert full.layers is None and full.latent_frames[0] == 1 and full.latent_frames[-1] == 31
    for one in (full, small):
        for row in one.rows:
            case = case_of(CONFIG, f"{row.width}x{row.height}", row.frames)
            assert (case.width, case.height, case.frames) == (row.width, row.height, row.frames), (
                "a size the model lowers"
            )


def test_the_suite(smaller, tmp_path):
    pytest.importorskip("matplotlib")
    seen, files = [], {name: tmp_path / f"bench.{name}" for name in ("json", "md", "png")}
    words = ("--output", str(files["json"]), "--markdown", str(files["md"]), "--plot", str(files["png"]))
    result = bench_run.run(
        run_suite("auto", "--dtype", "float32", *words), lambda what, done, total: seen.append(what)
    )
    assert result == json.loads(files["json"].read_text()) and result["suite"] == "small"
    assert (result["model"]["layers_measured"], result["model"]["cut"]) == (2, "as the small suite has it")
    assert tuple(row["name"] for row in result["rows"]) == ROWS
    for row in result["rows"]:
        assert (
            row["skipped"] is None
            and row["seconds"] > 0
            and row["flops"] > 0
            and row["baseline"]["ratio"] > 0
        ), row["name"]
        assert row["share_of_limit"] == pytest.approx(row["limit_seconds"] / row["seconds"])
        assert row["baseline"]["ratio"] == pytest.approx(row["baseline"]["seconds"] / row["seconds"])
        assert row["goals"] == {"compared": False, "why": "not a GPU"} and row["stands_for"]
        assert ("extrapolated" in row) == (row["kind"] not in ("encode", "decode"))
        if row["kind"] == "denoise":
            check_denoising(row)
    assert result["rows"][4]["tokens_per_second"] == pytest.approx(1 / result["rows"][4]["seconds"])
    growth = result["growth"]
    assert [p["tokens"] for p in growth["points"]] == [4, 8, 12, 20] and growth["skipped"] == []
    assert len(growth["fit"]["residuals"]) == 4 and all(
        growth[f][k] >= 0 for f in ("fit", "baseline_fit") for k in "abc"
    )
    assert files["png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert any("30 steps" in what for what in seen)
    check_texts(bench_run.report(result), files["md"].read_text())


def check_denoising(row: dict) -> None:
    step, without, whole = row["measures"]["step"], row["measures"]["step_unguided"], row["whole"]
    assert row["seconds"] == pytest.approx(26 * step["seconds"] + 4 * without["seconds"])
    assert row["baseline"]["seconds"] == pytest.approx(
        26 * step["baseline"]["seconds"] + 4 * without["baseline"]["seconds"]
    )
    assert (
        len(whole["steps"]) == len(whole["memory_bytes"]) == 30
        and whole["guided"] == [True] * 26 + [False] * 4
    )
    assert whole["seconds"] == pytest.approx(sum(whole["steps"])) and {
        "first",
        "last",
        "drift",
        "spread",
    } <= set(whole)


def check_texts(text: str, markdown: str) -> None:
    assert text.count("not a GPU") == len(ROWS) and "768x768" in text and "2 of 3 layers" in text
    assert text.count("in one run") == 3 and "R²" in text
    tables = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    assert [len(t) for t in tables] == [2 + len(ROWS), 2 + 4]
    assert all(len({line.count("|") for line in t}) == 1 for t in tables)


def test_rows_and_the_baseline_can_be_skipped(smaller):
    result = bench_run.run(
        run_suite("small", "--layers", "3", "--skip", "baseline", "growth", *ROWS[1:5], *ROWS[6:])
    )
    assert [row["name"] for row in result["rows"]] == ["t2i", "decode_image"] and result["growth"] is None
    assert (
        not any("baseline" in row or "extrapolated" in row for row in result["rows"])
        and result["model"]["cut"] is None
    )
    assert "ratio" not in bench_run.report(result)
    only = bench_run.run(run_suite("small", "--skip", *ROWS))
    assert (
        only["rows"] == []
        and len(only["growth"]["points"]) == 4
        and "A guided step" in bench_run.report(only)
    )


def test_rows_that_would_take_too_long_say_so(smaller, tmp_path):
    pytest.importorskip("matplotlib")
    result = bench_run.run(run_suite("small", "--patience", "1e-12", "--plot", str(tmp_path / "none.png")))
    assert all("would take at least" in row["skipped"] for row in result["rows"])
    assert result["growth"]["points"] == [] and len(result["growth"]["skipped"]) == 4
    assert (
        bench_run.report(result).count("would take at least") == len(ROWS) + 4
        and (tmp_path / "none.png").stat().st_size
    )


def test_rows_that_do_not_fit_say_so(smaller, monkeypatch):
    monkeypatch.setattr(suite, "free_memory", lambda device: 0)
    result = bench_run.run(run_suite("small"))
    assert all("0.0 are free on cpu" in row["skipped"] for row in result["rows"])
    monkeypatch.undo()


def test_rows_without_their_part_say_so(smaller, monkeypatch):
    monkeypatch.setattr(speed, "_config", lambda name: replace(CONFIG, vit=None, vae=None))
    rows = {
        row["name"]: row["skipped"]
        for row in bench_run.run(run_suite("small", "--skip", "growth", "t2i", "t2i_batch4", "t2v"))["rows"]
    }
    assert rows.pop("prefill_edit") is None and "vision tower" in rows.pop("token")
    assert set(rows.values()) == {"the checkpoint has no VAE"}


def test_a_row_out_of_memory_says_so_and_the_rest_goes_on(smaller, monkeypatch):
    picture = Bench.picture

    def greedy(self, name, case, *rest):
        if case.frames > 1:
            raise suite.OUT_OF_MEMORY("tried to allocate\nmore")
        return picture(self, name, case, *rest)

    monkeypatch.setattr(Bench, "picture", greedy)
    result = bench_run.run(run_suite("small", "--skip", "growth", *ROWS[:5]))
    assert [row["skipped"] for row in result["rows"]] == [
        None,
        None,
        *["out of memory on cpu: tried to allocate"] * 2,
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["small", "--size", "64x64"], "--size does not go with --suite"),
        (["small", "--no-guidance"], "--no-guidance does not go with --suite"),
        (["small", "--skip", "step"], "no measure 'step'"),
        (["small", "--patience", "0"], "patience is 0"),
        (["small", "--layers", "4"], "from 1 to 3"),
        (["small", "--markdown", "/nowhere/at/all.md"], "folder does not exist"),
        (["small", "--plot", "bench.xyz"], r"\.png"),
    ],
)
def test_wrong_suites_are_refused(words, says, unmeasured):
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    with pytest.raises(RequestError, match=says):
        bench_run.run(run_suite(*words))


def test_a_plot_without_matplotlib_is_refused_before_measuring(monkeypatch, unmeasured, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(RequestError, match=r"pip install '\.\[bench\]'"):
        bench_run.run(run_suite("small", "--plot", str(tmp_path / "bench.png")))
    with pytest.raises(RequestError, match="matplotlib"):
        plot.require("bench.png")


def test_goals_count_what_a_user_waits_for():
    entry = {"seconds": 1.6, "share_of_matmul": 0.64, "whole": None}
    assert [g["met"] for g in suite.compare("t2i", entry)] == [True, True]
    slower = suite.compare("t2i", entry | {"whole": {"seconds": 1.8}})
    assert [(g["what"], g["met"]) for g in slower] == [("seconds", False), ("share_of_matmul", False)]
    assert slower[1]["reached"] == pytest.approx(0.64 * 1.6 / 1.8)
    token = suite.compare("token", {"seconds": 0.002, "tokens_per_second": 500, "share_of_copy": 0.6})
    assert [g["met"] for g in token] == [True, False]


# -- growth --------------------------------------------------------------------------------------------------


def test_a_fit_finds_what_it_was_made_of():
    tokens = [1600 * f for f in (1, 4, 9, 16, 25, 31)]
    found = fit(tokens, [0.01 + 2e-5 * n + 3e-10 * n**2 for n in tokens])
    assert [found[k] for k in "abc"] == pytest.approx([0.01, 2e-5, 3e-10], rel=1e-6)
    assert found["r2"] == pytest.approx(1) and max(map(abs, found["residuals"])) < 1e-9


def test_a_fit_is_never_negative_and_weighs_relative_errors():
    tokens = [10, 20, 40, 80]
    found = fit(tokens, [n**1.5 - 5 for n in tokens])  # a straight fit would start below zero
    assert found["a"] == 0 and found["b"] > 0 and found["c"] > 0
    assert fit([5], [2.0])["a"] == pytest.approx(2)
    even = fit([1, 2], [1.0, 3.0])
    assert all(even[k] >= 0 for k in "abc") and len(even["residuals"]) == 2
    off = fit([1, 2, 3, 4], [1.0, 2.0, 3.0, 8.0])
    assert off["r2"] < 1 and max(map(abs, off["residuals"])) > 0.05


def test_steadiness_compares_like_with_like():
    guided = [True] * 26 + [False] * 4
    steps = [9.0, *[1.0] * 20, *[1.1] * 5, *[0.5] * 4]
    whole = {
        "steps": steps,
        "guided": guided,
        "memory_bytes": [100, 200, *[200] * 27, 260],
        "allocations": [*[7] * 24, 9, *[3] * 4],
    }
    found = steadiness(whole)
    assert (found["first"], found["last"]) == (1.0, 1.1) and found["drift"] == pytest.approx(0.1)
    assert (
        found["memory_growth"] == 60
        and found["allocation_growth"] == 2
        and found["spread"] == pytest.approx(0.05, abs=0.05)
    )
    plain = steadiness(whole | {"guided": [False] * 30, "memory_bytes": [None] * 30, "allocations": None})
    assert (
        plain["first"] == 1.0
        and plain["last"] == 0.5
        and plain["memory_growth"] is None
        and plain["allocation_growth"] is None
    )
