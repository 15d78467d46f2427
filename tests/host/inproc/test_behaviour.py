"""How our nodes behave among others: same numbers whatever ComfyUI does with the weights, and nothing left
behind.
"""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from graphs import node
from small import (
    advanced,
    away,
    edit,
    i2v,
    ksampler,
    lance,
    module,
    partial_loading,
    question,
    samples,
    t2i,
    text,
)

SAMPLERS = [
    "euler",
    "heun",
    "dpmpp_2m",
    "res_multistep",
    "uni_pc",
    "euler_ancestral",
    "dpmpp_2m_sde",
    "ddim",
    "lcm",
    "dpmpp_sde",
]


# -- same numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [t2i, i2v])
def test_a_batch_is_its_singles(comfy, make):
    both = samples(comfy, lance(make(batch=2)))
    for i in range(2):
        assert away(both[i : i + 1], samples(comfy, lance(make(), seed=7 + i))) < 1e-5
    assert away(both[:1], both[1:]) > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_pinned_frame_stays(comfy, sampler):
    graph = i2v(batch=2)
    start = samples(comfy, graph, "latent")
    made = samples(comfy, lance(graph, sampler=sampler, steps=4))
    assert torch.equal(made[:, :, 0], start[:, :, 0])
    assert bool(torch.isfinite(made).all()) and away(made[:, :, 1:], start[:, :, 1:]) > 0.1


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_partial_load_changes_nothing(comfy, monkeypatch, share):
    monkeypatch.setattr(
        module(comfy, "lance_core.model.ops"), "FEW_ROWS", 0
    )  # a CPU's way with weights that lie still; it rounds another way
    graph = lance(edit())
    graph["decoded"] = node("LanceVAEDecode", samples=["sampler", 0], vae=["loader", 2])
    want = [("sampler", 0), ("decoded", 0)]
    comfy.forget()
    latent, images = comfy.run(graph, want).values
    answer = comfy.value(question(), "answer")
    comfy.forget()
    with partial_loading(monkeypatch, share) as left:
        again, pictures = comfy.run(graph, want).values
        assert comfy.value(question(), "answer") == answer
    comfy.forget()
    assert min(left) > 5, "every model was to be loaded in part"
    assert away(again["samples"], latent["samples"]) < 1e-6
    assert away(pictures, images) < 1e-6


def test_every_weight_can_be_left_behind(comfy):
    """Modules with weights are ComfyUI's, or cast what they hold themselves (the VAE's norms, as in
    stock VAEs).
    """
    from comfy.ops import CastWeightBiasOp

    main, reader, vae = (comfy.value(t2i(), "loader", i) for i in range(3))
    for patcher in (main, reader.und, reader.vit, vae.patcher):
        for name, part in patcher.model.named_modules():
            if next(part.parameters(recurse=False), None) is not None:
                assert isinstance(part, CastWeightBiasOp) or type(part).__name__ == "ChannelNorm", name


@pytest.mark.parametrize(("dtype", "drift"), [("bf16", 0.1), ("fp16", 0.02), ("fp8_e4m3fn", 0.6)])
def test_weight_dtypes_drift_little(comfy, dtype, drift):
    full = samples(comfy, lance(t2i()))
    made = samples(comfy, lance(t2i(dtype=dtype)))
    kept = {p.dtype for p in comfy.value(t2i(dtype=dtype), "loader").model.diffusion_model.parameters()}
    assert len(kept) == 1 and dtype.replace("bf", "bfloat").replace("fp", "float") in str(kept)
    error = float((made - full).norm() / full.norm())
    print(f"{dtype}: {error:.2e}")
    assert error < drift  # the checkpoint's own dtype is float16
    comfy.value({**question(), "loader": t2i(dtype=dtype)["loader"]}, "answer")


def test_the_same_again(comfy):
    first = samples(comfy, lance(t2i()))
    samples(comfy, ksampler(t2i("a blue boat"), sampler_name="dpmpp_2m"))
    samples(comfy, lance(i2v()))
    comfy.value(question(), "answer")
    comfy._executor.reset()
    assert torch.equal(samples(comfy, lance(t2i())), first)
    comfy.forget()
    assert torch.equal(samples(comfy, lance(t2i())), first)


def test_the_global_generators_are_left_alone(comfy):
    import random

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    comfy.forget()
    torch.manual_seed(1)
    before = states()
    first = samples(comfy, lance(edit()))
    sampled = question()
    sampled["answer"]["inputs"] |= {"temperature": 1.0, "seed": 5}
    answer = comfy.value(sampled, "answer")
    assert states() == before
    comfy.forget()
    torch.manual_seed(2)
    assert torch.equal(samples(comfy, lance(edit())), first)
    assert comfy.value(sampled, "answer") == answer


def test_one_forward_or_two(comfy, monkeypatch):
    """Guidance runs both sides at once where memory allows, and gives the same where it does not."""
    model = module(comfy, "lance_core.model.dual_expert").DualExpert
    rows, velocity = [], model.velocity
    monkeypatch.setattr(model, "velocity", lambda self, r, *a: rows.append(len(r)) or velocity(self, r, *a))
    graph = t2i(negative="rain, and a much longer negative prompt than the prompt is")
    joined = samples(comfy, lance(graph))
    assert set(rows) == {2}
    comfy._executor.reset()
    rows.clear()
    monkeypatch.setattr(module(comfy, "nodes.model").LanceModel, "memory_required", lambda *a, **k: 1e15)
    assert away(samples(comfy, lance(graph)), joined) < 1e-5
    assert set(rows) == {1}


# -- context -------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(comfy, monkeypatch):
    """(branch, tokens) of every pass that extends a context; the branch of the shared prefix is None."""
    context, seen = module(comfy, "lance_core.model.kv_cache").Context, []
    extend = context.extend

    def noted(self, region, tokens, *args):
        branches = {id(rest): branch.name for branch, rest in self.rests.items()}
        seen.append((branches.get(id(region)), tokens))
        return extend(self, region, tokens, *args)

    monkeypatch.setattr(context, "extend", noted)
    return seen


def test_what_both_sides_share_is_computed_once(comfy, passes):
    samples(comfy, lance(edit("as before"), seed=100))
    shared = [tokens for branch, tokens in passes if branch is None]
    assert len(shared) == 3, "the text before the picture, what is seen of it, its latent"
    assert {branch for branch, _ in passes} == {None, "CONDITIONAL", "UNCONDITIONAL"}
    assert len(passes) == len(set(passes)), "no pass twice"


def test_without_guidance_only_one_side(comfy, passes):
    samples(comfy, lance(t2i("without guidance"), cfg=1.0))
    assert {branch for branch, _ in passes} == {None, "CONDITIONAL"}


def test_memory_estimate_counts_the_context(comfy, monkeypatch):
    from torch.profiler import ProfilerActivity, profile

    contexts, context = [], module(comfy, "lance_core.model.kv_cache").Context
    init = context.__init__
    monkeypatch.setattr(
        context, "__init__", lambda self, *a, **k: contexts.append(self) or init(self, *a, **k)
    )
    # Not the host's choice for a CPU, which spells attention scores out, as many as memory allows.
    from comfy.ldm.modules.attention import attention_pytorch

    monkeypatch.setattr(module(comfy, "nodes.comfy_compat"), "optimized_attention", attention_pytorch)
    model = comfy.value(edit(), "loader").model
    contexts_module = module(comfy, "nodes.contexts")
    for graph in (edit("short"), edit("long " * 200), t2i("two", width=512, height=512)):
        contexts.clear()
        positive, negative = comfy.run(graph, [("text", 0), ("text", 1)]).values
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            made = samples(comfy, lance(graph, steps=1))
        (real,) = contexts
        shapes = {"lance": [model.extra_conds_shapes(**c[0][1])["lance"] for c in (positive, negative)]}
        assert isinstance(shapes["lance"][0], contexts_module.ContextShape)
        bare = model.memory_required([2, *made.shape[1:]], {})
        counted = model.memory_required([2, *made.shape[1:]], shapes)
        reading = (
            shapes["lance"][0][-1] > 2 * made.shape[2:].numel()
        )  # then it is reading the prompt that is widest
        assert counted - bare > real.nbytes if reading else counted - bare == real.nbytes
        events = [
            (e.start_ns(), e.nbytes())
            for e in recorded.profiler.kineto_results.events()
            if e.name() == "[memory]"
        ]
        peak = int(np.cumsum([size for _, size in sorted(events)]).max())
        print(f"{tuple(made.shape)}: estimated {counted:.0f}, measured {peak}, of it context {real.nbytes}")
        if made.shape[-1] == 32:  # among smaller things the graph's own bookkeeping shows
            assert (
                0.8 * peak < counted < 2.5 * peak
            )  # of so small a model; 17.3 for 17.0 GB at the released widths


def test_nothing_is_left_when_the_graph_is_gone(comfy, monkeypatch):
    import comfy.model_management as mm

    comfy.forget()
    made, context = [], module(comfy, "lance_core.model.kv_cache").Context
    init = context.__init__
    monkeypatch.setattr(
        context, "__init__", lambda self, *a, **k: made.append(weakref.ref(self)) or init(self, *a, **k)
    )
    guided = advanced(
        t2i(),
        node("LanceGuider", model=["loader", 0], positive=["text", 0], negative=["text", 1], **GUIDANCE),
    )
    main, reader, vae = comfy.run(
        guided, [("loader", 0), ("loader", 1), ("loader", 2), ("sampler", 0)]
    ).values[:3]
    samples(comfy, lance(edit()))
    comfy.value(question(), "answer")
    made += [weakref.ref(x) for x in (main.model, reader.und.model, reader.vit.model, vae.first_stage_model)]
    gc.collect()
    assert not any(ref() for ref in made[:-4]), "contexts end with their run"
    assert all(ref() for ref in made[-4:])
    del main, reader, vae
    module_capture = comfy.nodes["TestCapture"]
    module_capture.values.clear()
    comfy.forget()
    gc.collect()
    assert not any(ref() for ref in made)
    assert mm.current_loaded_models == []


GUIDANCE = {"cfg": 4.0, "cfg_start": 1.0, "cfg_end": 0.0, "renorm": "global", "renorm_min": 0.0}


def test_understanding_loads_half(comfy):
    import comfy.model_management as mm

    comfy.forget()
    comfy.value(question(), "answer")
    assert {type(m.model.model).__name__ for m in mm.current_loaded_models} == {
        "Understanding",
        "VisionTower",
    }
    samples(comfy, lance(t2i()))
    assert "LanceModel" in {type(m.model.model).__name__ for m in mm.current_loaded_models}


def test_guider_leaves_model_options_alone(comfy):
    guider = comfy.value(
        advanced(
            t2i(),
            node("LanceGuider", model=["loader", 0], positive=["text", 0], negative=["text", 1], **GUIDANCE),
        ),
        "guider",
    )
    before = json.dumps(guider.model_patcher.model_options, default=lambda o: type(o).__name__)
    noise = module(comfy, "nodes.sampling").SeededNoise(1)
    latent = {"samples": torch.zeros(1, 48, 1, 4, 4)}
    import comfy.samplers

    guider.sample(
        noise.generate_noise(latent),
        latent["samples"],
        comfy.samplers.sampler_object("euler"),
        torch.tensor([1.0, 0.5, 0.0]),
    )
    assert json.dumps(guider.model_patcher.model_options, default=lambda o: type(o).__name__) == before
    clone = guider.model_patcher.clone()
    assert (
        clone.model_options == guider.model_patcher.model_options
        and clone.model_options is not guider.model_patcher.model_options
    )
    assert clone.model is guider.model_patcher.model
    assert (
        clone.get_additional_models_with_key("lance_und")[0].model
        is guider.model_patcher.get_additional_models_with_key("lance_und")[0].model
    )


# -- caching -------------------------------------------------------------------------------------------------


def test_only_what_changed_runs_again(comfy):
    graph = lance(edit())
    comfy.run(graph, [("sampler", 0)])
    everything = set(graph)
    assert comfy.run(lance(edit(), seed=99), [("sampler", 0)]).cached == everything - {"sampler"}
    assert comfy.run(lance(edit("and now green"), seed=99), [("sampler", 0)]).cached == everything - {
        "sampler",
        "text",
    }
    again = lance({**edit(), "text": text("paint it blue", "rain", vision=["vision", 0])})
    assert {"vision", "loader"} <= comfy.run(again, [("sampler", 0)]).cached
    asked = question()
    comfy.run(asked, [("answer", 0)])
    assert comfy.run(question("And who?"), [("answer", 0)]).cached == set(asked) - {"answer"}
