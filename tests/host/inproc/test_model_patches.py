"""What stock nodes put on the model: its attention function, its layers, its positions."""

from __future__ import annotations

import pytest
import torch
from graphs import node
from small import MODEL, away, edit, ksampler, lance, module, samples, t2i

POSITIVE, NEGATIVE = ["text", 0], ["text", 1]


class Patched:
    """Test node: the model with `change(clone)` applied, which the test sets."""

    change = staticmethod(lambda model: None)
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def patch(self, model):
        model = model.clone()
        Patched.change(model)
        return (model,)


@pytest.fixture
def patched(comfy, monkeypatch):
    """A graph of `t2i` whose model `change` has been applied to, sampled by Lance Sampler."""
    monkeypatch.setitem(comfy.nodes, "TestPatched", Patched)

    def run(change, graph=None, **inputs):
        monkeypatch.setattr(Patched, "change", staticmethod(change))
        graph = {**(graph or t2i()), "patched": node("TestPatched", model=MODEL)}
        return samples(comfy, lance(graph, model=["patched", 0], **inputs))

    return run


@pytest.fixture(scope="module")
def plain(comfy):
    return samples(comfy, lance(t2i()))


def forwards(comfy, monkeypatch):
    """Counts the rows that the generation expert's forwards take."""
    model, rows = comfy.value(t2i(), "loader").model.diffusion_model, []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, *a, **k: rows.append(len(x)) or forward(x, *a, **k))
    return rows


# -- attention -----------------------------------------------------------------------------------------------


def override(function):
    def change(model):
        model.model_options["transformer_options"]["optimized_attention_override"] = function

    return change


def test_an_attention_override_is_called_in_every_layer(patched, plain, comfy):
    seen = []

    def same(func, q, k, v, heads, *args, **kwargs):
        assert kwargs["transformer_options"]["optimized_attention_override"] is same
        seen.append(kwargs["transformer_options"].get("block_index"))
        return func(q, k, v, heads, *args, **kwargs)

    assert torch.equal(patched(override(same)), plain)
    layers = comfy.value(t2i(), "loader").model.llm.num_layers
    steps, rows = 3, 2
    denoising = [i for layer in range(layers) for i in [layer] * rows] * steps
    assert seen[-len(denoising) :] == denoising


def test_an_attention_override_decides(patched, plain):
    def nothing(func, q, k, v, heads, *args, **kwargs):
        return torch.zeros_like(q)

    assert away(patched(override(nothing)), plain) > 0.01


def test_a_masked_attention_is_the_hosts_own(patched):
    """The causal attention of prompts; backends that nodes choose ignore masks, or refuse them."""

    def strict(func, q, k, v, heads, *args, mask=None, **kwargs):
        assert mask is None
        return func(q, k, v, heads, *args, **kwargs)

    patched(override(strict), seed=21)


def test_model_attention_backend(comfy, plain, monkeypatch):
    if "ModelAttentionBackend" not in comfy.nodes:
        pytest.skip("this ComfyUI has no such node")
    from comfy.ldm.modules import attention

    called = []
    pytorch = attention.get_attention_function("pytorch")
    found = {"pytorch": lambda *a, **k: called.append(1) or pytorch(*a, **k)}
    monkeypatch.setattr(attention, "get_attention_function", lambda name, *default: found.get(name, *default))
    graph = {**t2i(), "backend": node("ModelAttentionBackend", model=MODEL, attention="pytorch attention")}
    assert away(samples(comfy, lance(graph, model=["backend", 0])), plain) < 1e-4
    assert len(called) >= 3 * 2 * 3  # layers, rows, steps


# -- layers --------------------------------------------------------------------------------------------------


def block(function, index):
    return lambda model: model.set_model_patch_replace(function, "dit", "double_block", index)


def test_a_block_patch_that_calls_the_block_changes_nothing(patched, plain):
    seen = []

    def around(args, extra):
        before = args["img"].clone()
        out = extra["original_block"](args)
        assert torch.equal(args["img"], before) and not torch.equal(out["img"], before)
        seen.append((args["transformer_options"]["block_index"], tuple(args["img"].shape)))
        return {"img": out["img"]}

    assert torch.equal(patched(block(around, 1)), plain)
    assert seen == [(1, (2, 16, seen[0][1][2]))] * 3


def test_a_skipped_block_is_a_model_without_it(comfy, patched, plain, monkeypatch):
    found = patched(block(lambda args, extra: args, 1))
    assert away(found, plain) > 1e-3
    # The same by taking the layer's two halves out of the denoising passes.
    decoder = module(comfy, "lance_core.model.decoder")
    layer = decoder.decoder_layer

    def without(index, und_layer, gen_layer, und, gen, *args, **kwargs):
        if index == 1 and gen is not None:
            return und, gen
        return layer(index, und_layer, gen_layer, und, gen, *args, **kwargs)

    monkeypatch.setattr(decoder, "decoder_layer", without)
    comfy.forget()
    assert torch.equal(found, samples(comfy, lance(t2i())))
    comfy.forget()


def test_patches_after_blocks(patched, plain):
    seen = []

    def after(args):
        seen.append(args["block_index"])
        return {"img": args["img"] * (1.5 if args["block_index"] == 0 else 1)}

    changed = patched(lambda model: model.set_model_patch(after, "double_block"))
    assert away(changed, plain) > 1e-3 and seen == [0, 1, 2] * 3


@pytest.mark.parametrize("kind", ["SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple"])
def test_skip_layer_guidance(comfy, patched, plain, kind):
    inputs = {"double_layers": "1", "single_layers": "1", "start_percent": 0.0, "end_percent": 1.0}
    if kind == "SkipLayerGuidanceDiT":
        inputs |= {"scale": 2.0, "rescaling_scale": 0.0}
    graph = {**t2i(), "slg": node(kind, model=MODEL, **inputs)}
    one = {"renorm": "none", "steps": 1}
    found = samples(comfy, lance(graph, model=["slg", 0], **one))
    noise = {"cfg": 1.0, **one}
    positive = samples(comfy, lance(t2i(), **noise))
    negative = samples(comfy, lance(t2i(), positive=NEGATIVE, **noise))
    skipped = block(lambda args, extra: args, 1)
    if kind == "SkipLayerGuidanceDiT":  # (cond + (cond - uncond) * 3) + (cond - skipped) * 2
        without = patched(skipped, **noise)
        wanted = negative + (positive - negative) * 4 + (positive - without) * 2
    else:
        without = patched(skipped, positive=NEGATIVE, **noise)
        wanted = without + (positive - without) * 4
    assert away(found, wanted) < 1e-4
    assert away(found, negative + (positive - negative) * 4) > 1e-3


def test_skip_layer_guidance_of_layers_that_are_not_there(comfy, plain, monkeypatch, caplog):
    """The node's defaults, on a model of three layers: said, and nothing computed twice."""
    inputs = {"double_layers": "7, 8, 9", "single_layers": "7, 8, 9", "scale": 3.0, "rescaling_scale": 0.0}
    inputs |= {"start_percent": 0.0, "end_percent": 1.0}
    graph = {**t2i(), "slg": node("SkipLayerGuidanceDiT", model=MODEL, **inputs)}
    rows = forwards(comfy, monkeypatch)
    assert away(samples(comfy, lance(graph, model=["slg", 0])), plain) < 1e-6
    assert rows == [2, 2, 2]
    (said,) = [r.getMessage() for r in caplog.records if "Lance has no layers" in r.getMessage()]
    assert "dit double_block 7 (nodes_slg)" in said


# -- normalised attention guidance ---------------------------------------------------------------------------


def nag(scale: float, alpha: float = 0.5, tau: float = 2.5):
    return {
        **t2i(),
        "nag": node("NAGuidance", model=MODEL, nag_scale=scale, nag_alpha=alpha, nag_tau=tau),
    }


def test_normalized_attention_guidance(comfy, plain):
    if "NAGuidance" not in comfy.nodes:
        pytest.skip("this ComfyUI has no such node")
    assert away(samples(comfy, lance(nag(5.0), model=["nag", 0])), plain) > 1e-3
    assert away(samples(comfy, lance(nag(5.0, alpha=0.0), model=["nag", 0], negative=NEGATIVE)), plain) > 1e-3
    # Scale 1 is the positive's own attention, which both rows then have in their latent cells.
    once = samples(comfy, lance(nag(1.0), model=["nag", 0], cfg=1.0))
    assert away(once, samples(comfy, lance(t2i(), cfg=1.0))) < 1e-5
    assert away(samples(comfy, lance(nag(5.0), model=["nag", 0], cfg=1.0)), once) > 1e-3


def test_output_patches_see_the_latent_cells_apart_from_the_markers(patched, plain, comfy):
    seen = []

    def patch(out, extra):
        start, stop = extra["img_slice"]
        seen.append((extra["block_index"], start, stop - start, extra["n_heads"]))
        assert out.shape[:2] == (2, stop) and extra["cond_or_uncond"]
        return out

    assert torch.equal(patched(lambda model: model.set_model_attn1_output_patch(patch)), plain)
    heads = comfy.value(t2i(), "loader").model.llm.num_heads
    assert seen == [(i, 2, 16, heads) for i in range(3)] * 3


# -- what cannot work ----------------------------------------------------------------------------------------


def said(caplog):
    return [r.getMessage() for r in caplog.records if "Lance has no layers" in r.getMessage()]


@pytest.mark.parametrize("build", [lance, ksampler])
def test_perturbed_attention_guidance_costs_nothing_and_says_so(comfy, monkeypatch, caplog, build):
    without = samples(comfy, build(t2i()))
    graph = {**t2i(), "pag": node("PerturbedAttentionGuidance", model=MODEL, scale=3.0)}
    rows = forwards(comfy, monkeypatch)
    assert away(samples(comfy, build(graph, model=["pag", 0])), without) < 1e-6
    assert rows == [2, 2, 2]
    (message,) = said(caplog)
    assert "attn1 middle 0 (nodes_pag)" in message


@pytest.mark.parametrize("kind", ["HyperTile", "TomePatchModel"])
def test_token_merging_is_left_out_as_a_whole(comfy, plain, caplog, kind):
    inputs = {
        "HyperTile": {"tile_size": 256, "swap_size": 2, "max_depth": 0, "scale_depth": False},
        "TomePatchModel": {"ratio": 0.3},
    }[kind]
    graph = {**t2i(), "merging": node(kind, model=MODEL, **inputs)}
    assert torch.equal(samples(comfy, lance(graph, model=["merging", 0])), plain)
    assert len(said(caplog)) == 1 and "attn1" in said(caplog)[0]


def test_the_warning_comes_once_a_run_and_again_in_the_next(comfy, caplog):
    graph = {**t2i(), "pag": node("PerturbedAttentionGuidance", model=MODEL, scale=3.0)}
    for seed in (31, 32):
        samples(comfy, lance(graph, model=["pag", 0], seed=seed))
    assert len(said(caplog)) == 2


def test_nothing_is_remembered_when_sampling_is_over(comfy):
    samples(comfy, lance(t2i(), seed=33))
    assert not comfy.value(t2i(), "loader").model.last_call._made


# -- positions -----------------------------------------------------------------------------------------------

ROPE = {"scale_x": 1.0, "shift_x": 0.0, "scale_y": 1.0, "shift_y": 0.0, "scale_t": 1.0, "shift_t": 0.0}


def scaled(comfy, graph, **changes):
    if "ScaleROPE" not in comfy.nodes:
        pytest.skip("this ComfyUI has no such node")
    return {**graph, "rope": node("ScaleROPE", model=MODEL, **{**ROPE, **changes})}


@pytest.mark.parametrize("graph", [t2i, edit])
def test_scale_rope(comfy, graph):
    without = samples(comfy, lance(graph()))
    assert torch.equal(samples(comfy, lance(scaled(comfy, graph()), model=["rope", 0])), without)
    for change in ({"scale_x": 3.0}, {"shift_y": 20.0}):
        changed = samples(comfy, lance(scaled(comfy, graph(), **change), model=["rope", 0]))
        assert away(changed, without) > 1e-4


# -- what else nodes do to a model ---------------------------------------------------------------------------


def test_model_compute_dtype_is_both_experts(comfy):
    """Float32 weights computing in bfloat16."""
    plain = samples(comfy, lance(t2i()))
    graph = {**t2i(), "dtype": node("ModelComputeDtype", model=MODEL, dtype="bf16")}
    found = samples(comfy, lance(graph, model=["dtype", 0]))
    assert 1e-4 < away(found, plain) < 0.2


@pytest.mark.parametrize("build", [lance, ksampler])
def test_renorm_cfg(comfy, build):
    """A guidance function that asks the model for its number of channels. Lance Sampler has its own."""
    graph = {**t2i(), "renorm": node("RenormCFG", model=MODEL, cfg_trunc=100.0, renorm_cfg=0.5)}
    found, without = samples(comfy, build(graph, model=["renorm", 0])), samples(comfy, build(t2i()))
    assert torch.equal(found, without) if build is lance else away(found, without) > 1e-3
