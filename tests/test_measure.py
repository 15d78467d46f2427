"""Memory, loading and quality: the accounting against arithmetic and torch's own profiler, the sparse files
against the loader, drift against the number of bits.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lance_core.bench import loading, memory, quality, report
from lance_core.bench.accounting import Accountant
from lance_core.bench.device import CPU, materialise
from lance_core.checkpoint import tiny
from lance_core.checkpoint.checkpoint import Checkpoint
from lance_core.checkpoint.quantize import FORMATS, quantisable
from lance_core.config import LanceConfig
from lance_core.model.dual_expert import DualExpert
from lance_core.model.experts import Generation, Understanding
from lance_core.model.plan import Plan, Row
from lance_core.model.sequence import Branch
from lance_core.vae.wan import WanVAE

TINY = LanceConfig(replace(tiny.LLM, hidden_size=64, intermediate_size=128), tiny.VIT, tiny.VAE, "video")
REQUEST = memory.Request("t2v", "t2v", 64, 64, 5)
EDIT = memory.Request("edit", "edit", 64, 64, 5)
QUESTION = memory.Request("vqa", "vqa", 64, 64)


# -- memory --------------------------------------------------------------------------------------------------


def test_a_chain_of_linears_is_counted_to_the_byte():
    chain = nn.Sequential(
        *(nn.Linear(a, b, bias=False, device="meta") for a, b in ((100, 300), (300, 200), (200, 10)))
    )
    weights = 4 * (100 * 300 + 300 * 200 + 200 * 10)
    x = torch.empty(7, 100, device="meta")
    with torch.inference_mode(), Accountant() as meter:
        meter.hold("weights", chain.parameters())
        meter.hold("weights", chain.parameters())  # once is enough
        assert meter.total == weights
        y = chain(x)
        assert meter.peak == weights + 4 * 7 * (300 + 200)  # the input is not of the run's making
        assert meter.total == weights + y.nbytes
        view = y.view(-1)[:3]
        del y
        assert meter.total == weights + 4 * 7 * 10, "a view keeps its storage"
        del view
        assert meter.total == weights
        meter.reset()
        assert meter.peak == weights


def test_peak_agrees_with_torchs_profiler():
    """The allocator's own record of a real guided step on the CPU, whatever its kernels need beside their
    results included.
    """
    config = replace(TINY.llm, num_layers=2)
    parts = [
        materialise(cls(config, device="meta"), CPU, torch.float32) for cls in (Understanding, Generation)
    ]
    model = DualExpert(config, *parts)
    case = memory.Request("t2i", "t2v", 512, 512).case(TINY)
    sequence = case.sequence(TINY)
    prepared = model.prefill(Plan.of(sequence, 2, guided=True))
    rows = [Row(prepared, b) for b in Branch]
    x, t = torch.zeros(2, *case.grid, 48), torch.zeros(2, 1)
    with torch.inference_mode(), Accountant("cpu") as meter:
        model.velocity(rows, x, t)
    with (
        torch.inference_mode(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        model.velocity(rows, x, t)
    live = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert 0.7 * most <= meter.peak <= 1.3 * most, (meter.peak, most)


@pytest.mark.parametrize("request_", [REQUEST, EDIT, QUESTION], ids=lambda r: r.name)
def test_meta_and_cpu_count_the_same(request_):
    meta, real = (memory.measure(request_, TINY, device) for device in ("meta", "cpu"))
    assert meta.peaks.keys() == real.peaks.keys()
    for stage, size in real.peaks.items():
        # The meta device adds workspaces and spells out the prompt's masked attention; the CPU has the pass's
        # small tables, too.
        assert 0.7 * size <= meta.peaks[stage] <= (3 if stage == "prefill" else 1.5) * size, stage


def test_placement_counts_weights():
    peaks = {
        place: memory.measure(REQUEST, TINY, place=place).peaks["step, 1 row"] for place in memory.PLACES
    }
    sizes = {part: memory.size_of(part, TINY) for part in ("und", "gen")}
    assert peaks["whole"] - peaks["lean"] == pytest.approx(sizes["und"], rel=0.2)
    assert peaks["lean"] - peaks["streamed"] == pytest.approx(sizes["gen"], rel=0.2)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_weigh_what_they_should(name):
    plain, small = (
        dict(memory.build("gen", TINY, w, "meta", joined=False).named_parameters()) for w in ("bf16", name)
    )
    matrices = [
        p for n, p in plain.items() if quantisable(n, TINY.llm.num_layers) and FORMATS[name].fits(*p.shape)
    ]
    layout = sum(
        torch.Size(s).numel() * d.itemsize
        for p in matrices
        for d, s in FORMATS[name].layout(*p.shape).values()
    )
    rest = sum(p.nbytes for p in plain.values()) - sum(p.nbytes for p in matrices)
    assert sum(p.nbytes for p in small.values()) == rest + layout


def test_memory_tables():
    peaks = memory.measure(REQUEST, TINY).peaks
    found = {("t2v", w, p): peaks for w in memory.WEIGHTS for p in memory.PLACES}
    results = [{"request": r, "weights": w, "place": p, "peaks": of} for (r, w, p), of in found.items()]
    sizes = {w: {part: memory.size_of(part, TINY, w) for part in memory.PARTS} for w in memory.WEIGHTS}
    told = {"torch": "2", "device": "meta", "weights": sizes, "results": results, "largest": {}}
    text = report.markdown(memory.document(told))
    assert "| t2v | 0.0 (4 GB)" in text and "VAE decode, tiles" in text and "Goals" not in text
    stages = memory.by_stage(found, ["t2v"]).markdown()
    assert len({line.count("|") for line in stages.splitlines()}) == 1
    assert memory.card(15 * 10**9) == "16 GB" and memory.card(10**12) == "over 80 GB"


# -- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", loading.CASES, ids=lambda c: c.name)
def test_sparse_checkpoints_are_accepted(case, tmp_path):
    path = loading.write_case(tmp_path / case.name, case, TINY)
    checkpoint = Checkpoint(path)
    assert checkpoint.config.llm.intermediate_size == 128
    assert checkpoint.config.variant == ("image" if case.name == "image" else "video")
    found = {f.name for f in checkpoint.parts["gen"].formats.values()}
    assert found == ({case.stored} if case.stored in FORMATS else set())
    checkpoint.load("gen"), checkpoint.load("vit"), checkpoint.load("vae")


def test_sparse_files_take_no_disk(tmp_path):
    path = tmp_path / "big.safetensors"
    size = loading.write_sparse(path, {"x": (torch.float32, (1 << 16, 1 << 12))}, {"a": "b"})
    assert path.stat().st_size == size > 1 << 30
    assert path.stat().st_blocks * 512 < 1 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_is_measured_in_a_process_of_its_own(tmp_path):
    result = loading.measure(loading.CASES[0], TINY, ["und", "gen"], 1, tmp_path)
    assert result["result"] * 2 == result["read"] and 0 < result["before"] <= result["peak"]
    told = {
        "layers": 3,
        "of_layers": 36,
        "parts": ["und", "gen"],
        "repeat": 1,
        "torch": "2",
        "results": [result],
    }
    text = report.text(loading.document(told))
    assert "released, fp32, image" in text and "3 layers instead of 36" in text


# -- quality -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drifts():
    llm = replace(TINY.llm, num_layers=4)
    config = replace(TINY, llm=llm)
    parts = [quality.random_expert(cls, config, i) for i, cls in enumerate((Understanding, Generation))]
    vae = materialise(WanVAE(tiny.VAE, device="meta"), CPU, torch.float32)
    return quality.measure(quality.Subject(*parts, config), vae, cells=4, steps=2)


def test_drift_grows_as_bits_shrink(drifts):
    by = {one["variant"]: one["drift"]["float32"] for one in drifts}
    for what in quality.MEASURES:
        assert 0 < by["bf16 weights"][what] < by["int8"][what] < min(by["int4"][what], by["nvfp4"][what])
        assert by["bf16 weights"][what] < by["fp8"][what] < min(by["int4"][what], by["nvfp4"][what])
    assert by["understanding bf16, generation int4"]["answer logits"] == by["bf16 weights"]["answer logits"]
    for what in ("guided latent", "pixels"):
        assert by["understanding int4, generation bf16"][what] < by["int4"][what]


def test_quality_tables(drifts):
    lines = quality.drifts(drifts, "bf16").markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + len(drifts)
    assert len(quality.decide(drifts)) == len(FORMATS)
    json.dumps(drifts)


def test_a_checkpoint_is_measured_as_it_would_be_converted(golden):
    subject, vae = quality.stored(golden / "checkpoint" / "Lance_3B")
    assert {n for n in subject.original["gen"] if quantisable(n)} == {
        n for n in Checkpoint(golden / "checkpoint" / "Lance_3B").parts["gen"].tensors if quantisable(n)
    }, "each matrix on its own, as convert takes them"
    found = quality.measure(subject, None, cells=4, steps=1, variants=quality.VARIANTS[:1])
    assert set(found[0]["drift"]["float32"]) == {*quality.MEASURES} - {"pixels"}
    assert "pixels" not in quality.drifts(found, "float32").text() and isinstance(vae, WanVAE)


def test_bf16_decoding_is_close():
    vae = materialise(WanVAE(tiny.VAE, device="meta"), CPU, torch.float32)
    assert 0 < quality.vae_drift(vae, 8)["drift"] < 0.1
