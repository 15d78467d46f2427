"""The benchmark: its parts are right and its results complete. How long anything takes is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benching import CHECKPOINT, options, tiny
from torch.utils.flop_counter import FlopCounterMode

from lance_core.bench import cost, device, measure, speed
from lance_core.bench import run as bench_run
from lance_core.bench.case import case_of, noise
from lance_core.bench.device import Meter, cut_layers, materialise
from lance_core.bench.measure import Bench
from lance_core.bench.released_decoder import Baseline, parts_of
from lance_core.bench.released_vae import BaselineVAE
from lance_core.checkpoint.checkpoint import Checkpoint
from lance_core.config import RELEASED_LLM, LanceConfig, LLMConfig, VAEConfig, ViTConfig
from lance_core.errors import CheckpointError, RequestError
from lance_core.model.decoder import ExpertLayer
from lance_core.model.denoise import denoise
from lance_core.model.dual_expert import DualExpert
from lance_core.model.experts import Generation, Understanding
from lance_core.model.plan import Plan, Row
from lance_core.model.sampler import Guidance, schedule
from lance_core.model.sequence import Branch
from lance_core.model.token_loop import TokenLoop
from lance_core.model.vit import VisionTower
from lance_core.vae.wan import WanVAE

pytestmark = pytest.mark.usefixtures("small_rates")
LLM = LLMConfig(48, 80, 3, 6, 2, 8, 64, 1e4, (1, 1, 2), 1e-6)
VIT = ViTConfig(3, 32, 48, 2, 48, fullatt_block_indexes=(1,))
VAE = VAEConfig((8, 16, 16), (8, 16, 16), 1, 1, (False, True))
CONFIG = LanceConfig(LLM, VIT, VAE, "video")
CPU = torch.device("cpu")


def plain_attention(q, k, v, causal=False):
    """Attention as two matrix products, which torch's counter sees on every device."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (
        q.transpose(1, 2),
        k.transpose(1, 2).repeat_interleave(groups, 1),
        v.transpose(1, 2).repeat_interleave(groups, 1),
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        queries, keys = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(queries, keys).tril(keys - queries) == 0, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def model_of(config: LLMConfig = LLM, joined: bool = True) -> DualExpert:
    und, gen = (part(config, device="meta", joined=joined) for part in (Understanding, Generation))
    und, gen = (materialise(part, CPU, torch.float32) for part in (und, gen))
    torch.manual_seed(5)
    for module in (und, gen):
        for weight in module.parameters():  # norms too: every weight must matter
            weight.add_(0.1 * torch.randn_like(weight))
    return DualExpert(config, und, gen, attention=plain_attention)


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def request_of(frames: int = 1, **options):
    case = case_of(CONFIG, "80x48", frames, context=9, **options)
    sequence = case.sequence(CONFIG)
    return case, sequence, Plan.of(sequence, 2, case.guidance)


# -- costs ---------------------------------------------------------------------------------------------------


def test_released_costs_are_the_known_ones():
    assert 2 * cost.expert_weights(RELEASED_LLM) == pytest.approx(2.77e9 * 2, rel=0.002)
    image = cost.step(RELEASED_LLM, (1, 48, 48), [100], 1, 2)
    assert image.flops == pytest.approx(14.3e12, rel=0.02)
    video = cost.step(RELEASED_LLM, (31, 53, 30), [100], 1, 2)
    assert video.flops == pytest.approx(0.99e15, rel=0.02)
    token = cost.token(RELEASED_LLM, 700, 2)
    assert token.bytes == pytest.approx(6.2e9, rel=0.01)


@pytest.mark.parametrize("kind", [{}, {"edit": True}, {"guidance": False, "batch": 2}])
@torch.inference_mode()
def test_decoder_costs_equal_torchs_count(kind):
    case, sequence, plan = request_of(frames=5, **kind)
    model = model_of()
    assert counted(lambda: model.prefill(plan)) == cost.prefill(LLM, plan, 4).flops
    prepared = model.prefill(plan)
    rows = [Row(prepared, branch) for branch in plan.rests for _ in range(case.batch)]
    x, t = noise(len(rows), *case.grid, 48), torch.full((len(rows), case.grid[0]), 0.5)
    contexts = [plan.lengths[0] + n for n in plan.lengths[1]]
    assert (
        counted(lambda: model.velocity(rows, x, t))
        == cost.step(LLM, case.grid, contexts, case.batch, 4).flops
    )


@torch.inference_mode()
def test_token_cost_equals_torchs_count():
    model, question = model_of(), request_of()[0].question(CONFIG)
    context, _, position = model.read(question, 2, 1)
    length = sum(s.length for s in question.context)
    following = TokenLoop(model, context, position)
    assert counted(lambda: following(3)) == cost.token(LLM, length, 4).flops


@torch.inference_mode()
def test_vit_cost_equals_torchs_count():
    grid = (2, 10, 14)
    tower = materialise(VisionTower(VIT, device="meta", attention=plain_attention), CPU, torch.float32)
    x = noise(2 * 10 * 14, 3 * 2 * 14 * 14)
    assert counted(lambda: tower(x, [grid])) == cost.vit(VIT, grid, 4).flops


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_vae_cost_equals_torchs_count(frames):
    vae = WanVAE(VAE, device="meta")
    scale, length = VAE.spatial_ratio, 1 + VAE.temporal_ratio * (frames - 1)
    pixels = torch.empty(1, 3, length, 4 * scale, 6 * scale, device="meta")
    latent = torch.empty(1, 48, frames, 4, 6, device="meta")
    assert counted(lambda: vae.encode(pixels)) == cost.vae(VAE, (frames, 4, 6), False, 4).flops
    assert counted(lambda: vae.decode(latent)) == cost.vae(VAE, (frames, 4, 6), True, 4).flops


# -- the baseline --------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("edit", [False, True])
def test_baseline_gives_the_same_velocity_and_result(edit):
    case, sequence, plan = request_of(frames=5, edit=edit, batch=2)
    model = model_of()
    prepared, baseline = model.prefill(plan), Baseline(model)
    sides = baseline.prefill(plan)
    x, t = noise(1, *case.grid, 48), torch.full((1, case.grid[0]), 0.6)
    both = [baseline.velocity(side, sequence, x, t) for side in sides]
    ours = model.velocity([Row(prepared, b) for b in Branch], torch.cat([x, x]), torch.cat([t, t]))
    assert ours.std() > 0.1 and (ours[0] - ours[1]).abs().max() > 1e-3  # the comparison says something
    torch.testing.assert_close(torch.cat(both), ours, rtol=1e-4, atol=1e-5)
    x = noise(2, *case.grid, 48)
    for guidance in (Guidance(), Guidance(1.0)):
        slow = baseline.denoise(sides, sequence, x, schedule(3), guidance)
        torch.testing.assert_close(
            slow, denoise(model, prepared, x, schedule(3), guidance), rtol=1e-4, atol=1e-4
        )


@torch.inference_mode()
def test_baseline_writes_the_same_logits():
    model, question = model_of(), request_of()[0].question(CONFIG)
    context, ours, position = model.read(question, 2, 3)
    baseline, following = Baseline(model), TokenLoop(model, context, position)
    side, logits = baseline.read(question, 2)
    torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-5)
    for i, token in enumerate((4, 9)):
        torch.testing.assert_close(
            baseline.next_token(side, token, position + i), following(token), rtol=1e-4, atol=1e-5
        )


@torch.inference_mode()
def test_the_baseline_multiplies_by_each_projection_alone():
    """Joined or not; of a joined one by views of its rows."""
    layer, x = model_of(joined=False).und.layers[0], noise(5, LLM.hidden_size)
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "mlp")
    parts = parts_of(layer)
    alone = {name: parts[name](x) for name in names}
    torch.testing.assert_close(alone["mlp"], layer.mlp(x[None])[0])
    apart, layer = layer, ExpertLayer(LLM)
    layer.load_state_dict(apart.state_dict())
    parts = parts_of(layer)
    assert not hasattr(layer.self_attn, "k_proj") and not hasattr(layer.mlp, "up_proj")
    for name, expected in alone.items():
        torch.testing.assert_close(parts[name](x), expected)
    weight = parts["k_proj"].keywords["weight"]
    assert weight.untyped_storage().data_ptr() == layer.self_attn.qkv_proj.weight.untyped_storage().data_ptr()


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_the_baseline_vae_gives_the_same_pictures(frames):
    vae = materialise(WanVAE(VAE, device="meta"), CPU, torch.float32)
    torch.manual_seed(5)
    for weight in vae.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    slow, scale = BaselineVAE(vae), VAE.spatial_ratio
    latent, pixels = (
        noise(1, 48, frames, 4, 6),
        noise(1, 3, 1 + VAE.temporal_ratio * (frames - 1), 4 * scale, 6 * scale).clamp(-1, 1),
    )
    decoded, encoded = vae.decode(latent), vae.encode(pixels)
    assert decoded.std() > 0.05 and encoded.std() > 0.05
    torch.testing.assert_close(slow.decode(latent), decoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slow.encode(pixels), encoded, rtol=1e-4, atol=1e-4)


# -- tools ---------------------------------------------------------------------------------------------------


def test_random_weights_are_finite_and_leave_global_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for part in (
        Understanding(LLM, device="meta"),
        VisionTower(VIT, device="meta"),
        WanVAE(VAE, device="meta"),
    ):
        module = materialise(part, CPU, torch.bfloat16)
        for name, weight in module.named_parameters():
            assert weight.device == CPU and weight.dtype == torch.bfloat16 and not weight.requires_grad, name
            assert bool(torch.isfinite(weight).all()) and bool(weight.any()), name
    assert torch.equal(before, torch.get_rng_state())


def test_cut_layers_shares_weights_and_leaves_the_model_alone():
    model = model_of()
    short = cut_layers(model, 1)
    assert (len(short.und.layers), len(short.gen.layers), short.config.num_layers) == (1, 1, 1)
    assert (len(model.und.layers), len(model.gen.layers), model.config.num_layers) == (3, 3, 3)
    assert short.und.layers[0] is model.und.layers[0] and short.und.lm_head is model.und.lm_head


def test_memory_is_measured_where_the_system_can():
    """In a process of its own: here, an allocator may still hold enough from other tests to hide 256 MiB."""
    program = """
import torch
from lance_core.bench.device import Peak, free_memory
assert free_memory(torch.device("cpu")) > 0
peak = Peak(torch.device("cpu"))
peak.reset()
before = peak.read()
torch.ones(1 << 26).sum()  # gone again
print("unknown" if before is None else peak.read() - before)
"""
    root = Path(__file__).parents[1]
    grown = subprocess.run(
        [sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()
    if grown == "unknown":
        pytest.skip("/proc does not say here")
    assert 200 << 20 < int(grown) < 400 << 20


def test_other_programs_are_noticed():
    if device.Others().cores() is None:
        pytest.skip("/proc does not say here")
    others = device.Others()
    subprocess.run([sys.executable, "-c", "sum(range(10**8))"], check=True)
    assert others.cores() > 0.2  # a core's worth, less what starting it took


def test_meter_takes_turns_and_divides():
    ran = []
    found = Meter(CPU, 3)({"a": lambda: lambda: ran.append("a"), "b": lambda: lambda: ran.append("b")}, per=2)
    assert ran == ["a", "b", *["a", "b"] * 3]
    assert all(found[n]["fastest"] <= found[n]["seconds"] <= found[n]["slowest"] for n in "ab")
    assert "peak_bytes" in found["a"] and "peak_bytes" not in found["b"]


@pytest.mark.parametrize(("repeat", "budget", "runs"), [(5, 0.0, 2), (1, 0.0, 1), (4, 60.0, 4), (4, None, 4)])
def test_meter_keeps_to_its_budget_but_takes_two_turns(repeat, budget, runs):
    ran = []
    found = Meter(CPU, repeat, budget)({"a": lambda: lambda: ran.append("a")})["a"]
    assert found["runs"] == runs == len(ran) - 1  # and a warm-up


# -- whole runs ----------------------------------------------------------------------------------------------


def check_measure(entry: dict, decoder: bool, baseline: bool, cut: bool) -> None:
    wanted = {
        "seconds",
        "fastest",
        "slowest",
        "runs",
        "working_bytes",
        "peak_bytes",
        "flops",
        "bytes",
        "limit_seconds",
    }
    wanted |= {"share_of_limit", "share_of_matmul", "share_of_copy"}
    wanted |= {"baseline"} if baseline else set()
    wanted |= {"extrapolated"} if decoder and cut else set()
    assert set(entry) == wanted
    assert entry["seconds"] > 0 and entry["flops"] > 0 and entry["bytes"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_run(dtype, tmp_path):
    seen = []
    out = tmp_path / "bench.json"
    args = tiny("--dtype", dtype, "--size", "64x48", "32x32", "--edit", "--baseline", "--output", str(out))
    result = bench_run.run(args, lambda what, done, total: seen.append((what, done, total)))
    assert result == json.loads(out.read_text())
    assert set(result) == {"format", "environment", "model", "rates", "repeat", "cases"}
    assert result["environment"]["dtype"] == dtype and result["environment"]["device"] == "cpu"
    assert result["model"]["layers"] == result["model"]["layers_measured"] and result["model"]["cut"] is None
    assert [(c["width"], c["height"]) for c in result["cases"]] == [(64, 48), (32, 32)]
    for case in result["cases"]:
        assert set(case["measures"]) == {
            "prefill_edit",
            "step",
            "step_unguided",
            "token",
            "vit",
            "encode",
            "decode",
        }
        for name, entry in case["measures"].items():
            check_measure(entry, name not in ("vit", "encode", "decode"), baseline=name != "vit", cut=False)
        assert case["denoising"]["guided_steps"] == 26 and case["denoising"]["extrapolated"] is False
    assert any("step" in what for what, _, _ in seen) and all(done <= total for _, done, total in seen)
    text = bench_run.report(result)
    assert "64x48" in text and "step_unguided" in text and "extrapolated" not in text


def test_a_cut_model_is_extrapolated_and_says_so():
    result = bench_run.run(tiny("--layers", "1", "--frames", "5", "--skip", "encode", "decode", "vit"))
    model, (case,) = result["model"], result["cases"]
    assert (model["layers"], model["layers_measured"], model["cut"]) == (3, 1, "as asked")
    assert case["grid"] == [2, 3, 4] and case["denoising"]["extrapolated"] is True
    for name, entry in case["measures"].items():
        check_measure(entry, True, baseline=False, cut=True)
        far = entry["extrapolated"]
        assert far["layers"] == 3 and far["flops"] > entry["flops"]
        fixed = far["seconds_without_layers"]
        assert far["seconds"] == pytest.approx(fixed + 3 * max(entry["seconds"] - fixed, 0)), name
    assert "1 of 3 layers (as asked)" in bench_run.report(
        result
    ) and "extrapolated to all layers" in bench_run.report(result)


def test_both_experts_are_compiled_if_asked(monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "check_compiler", lambda device: seen.append(str(device)))
    monkeypatch.setattr(measure, "compile_layers", lambda module: (seen.append(type(module)), module)[1])
    result = bench_run.run(tiny("--compile", "--skip", "vit", "encode", "decode", "token", "prefill"))
    assert (
        seen == ["cpu", Understanding, Generation]
        and result["model"]["compiled"]
        and ", compiled" in bench_run.report(result)
    )


def test_layers_are_cut_to_what_memory_holds(monkeypatch):
    args = tiny(
        "--dtype", "float32", "--no-guidance", "--skip", "prefill", "token", "vit", "encode", "decode"
    )
    config = Checkpoint(CHECKPOINT).config
    work = Bench(config, CPU, torch.float32, 1, False)
    case = case_of(config, "64x48", guidance=False, context=7)
    for layers in (1, 2, 3):
        free = work.memory(case, layers)
        monkeypatch.setattr(measure, "free_memory", lambda device, free=free: free)
        model = bench_run.run(args)["model"]
        assert model["layers_measured"] == layers and (model["cut"] is None) == (layers == 3)
        assert layers == 3 or f"hold {layers} layers of 3" in model["cut"]
    monkeypatch.setattr(measure, "free_memory", lambda device: work.memory(case, 1) - 1)
    with pytest.raises(RequestError, match="too few for one layer"):
        bench_run.run(args)


def test_parts_a_checkpoint_lacks_are_left_out(monkeypatch):
    monkeypatch.setattr(speed, "_config", lambda name: replace(CONFIG, vit=None, vae=None))
    result = bench_run.run(tiny("--dtype", "float32"))
    assert set(result["cases"][0]["measures"]) == {"prefill_text", "step", "step_unguided", "token"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--size", "768"], "is not WIDTHxHEIGHT"),
        (["--size", "-64x64"], "is not WIDTHxHEIGHT"),
        (["--size", "64x²2"], "is not WIDTHxHEIGHT"),
        (["--size", "8x64"], "at least 16"),
        (["--size", "4096x4096"], "beyond 64 latent cells"),
        (["--frames", "125"], "at most 121"),
        (["--frames", "0"], "num_frames is 0"),
        (["--layers", "0"], "layers is 0"),
        (["--layers", "4"], "from 1 to 3"),
        (["--batch", "0"], "batch is 0"),
        (["--context", "0"], "context is 0"),
        (["--repeat", "0"], "repeat is 0"),
        (["--dtype", "int8"], "bfloat16, float16, float32"),
        (["--device", "nowhere"], "'cpu' always can"),
        (["--device", "meta"], "'cpu' always can"),
        (["--skip", "steps"], "no measure 'steps'"),
        (["--output", "/nowhere/at/all.json"], "folder does not exist"),
        (["--plot", "a.png"], "--plot shows a suite"),
        (["--markdown", "a.md"], "--markdown shows a suite"),
    ],
)
def test_wrong_options_are_refused(words, says):
    if words[0] == "--size":
        words = [f"{words[0]}={words[1]}"]
    with pytest.raises(RequestError, match=says):
        bench_run.run(tiny(*words))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        bench_run.run(options("--model", str(tmp_path), "--device", "cpu"))


@torch.inference_mode()
def test_all_steps_in_one_run_are_the_released_schedule():
    case, sequence, plan = request_of(frames=5)
    model, ran = model_of(), []

    def counted(*args):
        ran.append(1)
        return plain_attention(*args)

    model.attention = counted
    model.prefill(plan)
    context = len(ran)
    found = Bench(CONFIG, CPU, torch.float32, 1, False).whole(case, model)
    assert len(ran) - 2 * context == LLM.num_layers * (26 * 2 + 4) and len(found["steps"]) == 30
