"""Several devices: guidance split between them, and models put onto one by nodes. The two here are both the
CPU, under two names.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from graphs import node
from small import MODEL, away, edit, ksampler, lance, module, samples, t2i

OTHER = torch.device("cpu", 1)
NEGATIVE = ["text", 1]


@pytest.fixture(autouse=True)
def two_devices(comfy, monkeypatch):
    import comfy.model_management as mm

    if "MultiGPU_WorkUnits" not in comfy.nodes:
        pytest.skip("this ComfyUI has no nodes for several devices")
    both = [torch.device("cpu"), OTHER]
    monkeypatch.setattr(
        mm, "get_all_torch_devices", lambda exclude_current=False: both[1:] if exclude_current else both
    )


def split(graph, model=MODEL):
    return {**graph, "split": node("MultiGPU_WorkUnits", model=model, max_gpus=2)}


def forwards(comfy, monkeypatch):
    """(thread, expert whose forward it is, both experts that the call is given) of every model call."""
    denoiser = module(comfy, "nodes.model").Denoiser
    forward, seen = denoiser.forward, []

    def spy(self, *args, lance, **kwargs):
        seen.append((threading.get_ident(), self, lance.model.gen, lance.model.und))
        return forward(self, *args, lance=lance, **kwargs)

    monkeypatch.setattr(denoiser, "forward", spy)
    return seen


@pytest.mark.parametrize("graph", [t2i, edit])
@pytest.mark.parametrize("build", [lance, ksampler])
def test_each_device_computes_with_weights_of_its_own(comfy, monkeypatch, graph, build):
    links = (
        {} if build is lance else {"latent_image": ["latent" if graph is t2i else "vision", graph is edit]}
    )
    links = {k: [v[0], int(v[1])] for k, v in links.items()}
    plain = samples(comfy, build(graph(), **links))
    seen = forwards(comfy, monkeypatch)
    assert away(samples(comfy, build(split(graph()), model=["split", 0], **links)), plain) < 1e-5
    assert all(own is given for _, own, given, _ in seen)
    assert len({thread for thread, *_ in seen}) == 2
    assert len({id(gen) for _, _, gen, _ in seen}) == len({id(und) for *_, und in seen}) == 2
    assert len(seen) == 6  # two branches in three steps


class UndPatch:
    """Test node: a patch on the understanding expert, as a LoRA is one."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        model = model.clone()
        width = model.model.llm.hidden_size
        change = torch.randn(width, width, generator=torch.Generator().manual_seed(1)) / 8
        name = "diffusion_model.understanding.layers.0.self_attn.o_proj.weight"
        assert model.add_patches({name: ("diff", (change,))}, 1.0) == [name]
        return (model,)


@pytest.mark.parametrize("after", [False, True])
def test_a_lora_on_the_understanding_expert_reaches_both_devices(comfy, monkeypatch, after):
    monkeypatch.setitem(comfy.nodes, "TestUndPatch", UndPatch)
    patched = {**t2i(), "patched": node("TestUndPatch", model=MODEL)}
    wanted = samples(comfy, lance(patched, model=["patched", 0]))
    assert away(wanted, samples(comfy, lance(t2i()))) > 1e-3
    if after:
        graph = {**split(t2i()), "patched": node("TestUndPatch", model=["split", 0])}
        found = samples(comfy, lance(graph, model=["patched", 0]))
    else:
        found = samples(comfy, lance(split(patched, ["patched", 0]), model=["split", 0]))
    assert away(found, wanted) < 1e-5


def test_a_second_device_reads_the_checkpoint_once(comfy, monkeypatch):
    loader = module(comfy, "nodes.loader")
    opened, open_checkpoint = [], loader.open_checkpoint
    monkeypatch.setattr(loader, "open_checkpoint", lambda name: opened.append(name) or open_checkpoint(name))
    comfy.forget()
    model = comfy.value(split(t2i()), "split")
    assert len(opened) == 2  # Lance Loader's, and the second device's
    (clone,) = model.get_additional_models_with_key("multigpu")
    (und,) = clone.get_additional_models_with_key("lance_und")
    assert clone.load_device == und.load_device == OTHER
    for patcher in (clone, und, model):  # nothing holds on to what was read
        assert patcher.cached_patcher_init[0] is loader.reload


def test_select_model_device_takes_both_experts_along(comfy, monkeypatch):
    plain = samples(comfy, lance(t2i()))
    graph = {**t2i(), "there": node("SelectModelDevice", model=MODEL, device="gpu:1")}
    seen = forwards(comfy, monkeypatch)
    assert away(samples(comfy, lance(graph, model=["there", 0])), plain) < 1e-5
    model = comfy.value(graph, "there")
    (und,) = model.get_additional_models_with_key("lance_und")
    assert model.load_device == und.load_device == OTHER
    assert {id(und) for *_, und in seen} == {id(und.model)}


def test_the_understanding_expert_follows_a_model_that_is_moved(comfy):
    """As "cpu" of Select Model Device does it: only the main patcher's device changes."""
    original = comfy.value(t2i(), "loader")
    model = original.clone()
    model.load_device = model.offload_device = OTHER
    devices = module(comfy, "nodes.devices")
    devices.follow("lance_und")(lambda *args: None, model)
    (und,), (kept,) = (m.get_additional_models_with_key("lance_und") for m in (model, original))
    assert und.load_device == und.offload_device == OTHER and und.model is kept.model
    assert kept.load_device == torch.device("cpu")


class MovedVAE:
    """Test node: a VAE as Select VAE Device moves it to a GPU; that node takes no CPU."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "move"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",)}}

    def move(self, vae):
        there = copy.copy(vae)
        there.patcher = vae.patcher.clone().deepclone_multigpu(new_load_device=OTHER)
        there.first_stage_model, there.device = there.patcher.model, OTHER
        assert there.first_stage_model is not vae.first_stage_model
        return (there,)


def test_a_vae_on_another_device(comfy, monkeypatch):
    monkeypatch.setitem(comfy.nodes, "TestMovedVAE", MovedVAE)
    graph = lance(t2i(), steps=1)
    graph["decoded"] = node("VAEDecode", samples=["sampler", 0], vae=["loader", 2])
    graph["there"] = node("TestMovedVAE", vae=["loader", 2])
    graph["again"] = node("VAEDecode", samples=["sampler", 0], vae=["there", 0])
    wanted, found = comfy.run(graph, [("decoded", 0), ("again", 0)]).values
    assert torch.equal(wanted, found)
