"""Quantised layers on their own, in the host's patchers: the core's numbers, LoRAs whatever way they come,
and the memory they take.
"""

from __future__ import annotations

import pytest
import small
import torch
from torch import nn

FORMATS = ("fp8", "int8", "int4", "nvfp4")
WIDE, NARROW = 192, 128


class Two(nn.Module):
    """One layer with a bias, one without."""

    def __init__(self, ops, dtype) -> None:
        super().__init__()
        self.first = ops.Linear(WIDE, NARROW, bias=True, device="meta", dtype=dtype)
        self.second = ops.Linear(NARROW, WIDE, bias=False, device="meta", dtype=dtype)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture
def modules(comfy):
    return tuple(
        small.module(comfy, name)
        for name in ("nodes.comfy_quant", "nodes.quant", "lance_core.checkpoint.quantize", "nodes.patcher")
    )


@pytest.fixture(autouse=True)
def inference():
    """As nodes run."""
    with torch.inference_mode():
        yield


@pytest.fixture
def build(comfy, modules, monkeypatch):
    """(format, dtype) -> patcher of a `Two` with such layers, and the same in the core."""
    host, quant, core, patchers = modules
    monkeypatch.setattr(
        comfy.server, "last_prompt_id", "", raising=False
    )  # as in a server, for the progress bar

    def made(name: str, dtype=torch.float32):
        form, generator = core.FORMATS[name], torch.Generator().manual_seed(1)
        module, plain = (
            Two(small.module(comfy, "nodes.comfy_compat").operations(dtype, dtype), dtype),
            Two(torch.nn, dtype),
        )
        core.swap(module, {"first": form, "second": form}, quant.make)
        core.swap(plain, {"first": form, "second": form})
        tensors = {"first.bias": torch.randn(NARROW, generator=generator).to(dtype)}
        for layer, shape in (("first", (NARROW, WIDE)), ("second", (WIDE, NARROW))):
            parts = form.encode(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
            tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in parts.items()}
        plain.load_state_dict(tensors, assign=True)
        patcher = patchers.make_patcher(module, patchers.PatchesInForward)
        patchers.fill(patcher, module, ((k, v.clone()) for k, v in tensors.items()), len(tensors))
        return patcher, plain

    return made


def inputs(dtype=torch.float32):
    """Activations as those of a language model: one channel a thousand times the others."""
    x = torch.randn(5, WIDE, generator=torch.Generator().manual_seed(2))
    x[:, 7] *= 1000
    return x.to(dtype)


def loras(strength: float = 0.3):
    """Patches of both layers as the host keeps them, and what they add, by layer."""
    from comfy.weight_adapter import LoRAAdapter

    generator, patches, added = torch.Generator().manual_seed(3), {}, {}
    for layer, (rows, columns) in {"first": (NARROW, WIDE), "second": (WIDE, NARROW)}.items():
        a, b = (
            torch.randn(4, columns, generator=generator) / 30,
            torch.randn(rows, 4, generator=generator) / 30,
        )
        patches[f"{layer}.weight"] = LoRAAdapter(set(), (b, a, 4.0, None, None, None))
        added[layer] = strength * b @ a
    return patches, added


def merged(plain, added):
    """What the core's layers would give with the LoRA's sum in unrounded weights."""
    done = Two(torch.nn, torch.float32)
    for name, layer in plain.named_children():
        parts = {leaf: p for leaf, p in layer.named_parameters() if leaf != "bias"}
        linear = getattr(done, name)
        linear.weight = nn.Parameter(layer.format.decode(parts, torch.float32) + added[name])
        linear.bias = layer.bias
    return done


def run(patcher, x):
    import comfy.model_management as mm

    mm.load_models_gpu([patcher])
    return patcher.model(x)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_the_cores_numbers(build, name, dtype, bound):
    patcher, plain = build(name, dtype)
    assert small.away(run(patcher, inputs(dtype)), plain(inputs(dtype))) < bound


@pytest.mark.parametrize("name", FORMATS)
def test_the_hosts_own_layers_where_it_has_them(comfy, modules, build, name):
    host, quant = modules[:2]
    layer, native = build(name)[0].model.first, host.quantised_linear(torch.float32, quant.Quantised)
    if native is None:
        assert type(layer) is quant.OwnQuantLinear
        return
    from comfy.quant_ops import QUANT_ALGOS

    assert type(layer) is native
    assert layer.quant_format in QUANT_ALGOS or name not in ("fp8", "nvfp4"), (
        "every host with such layers has kernels for these"
    )
    known = QUANT_ALGOS.get(layer.quant_format, {"comfy_tensor_layout": f"Lance{name}"})
    assert layer.weight._layout_cls == known["comfy_tensor_layout"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [None, 0.5, 0.0])
def test_loras_in_every_way_of_loading(comfy, build, monkeypatch, name, share):
    patcher, plain = build(name)
    before = run(patcher, inputs())
    held = sum(p.nbytes for p in patcher.model.parameters())
    patches, added = loras()
    patched = patcher.clone()
    assert set(patched.add_patches(patches, 0.3)) == set(patches)
    wanted = merged(plain, added)(inputs())
    assert small.away(wanted, before) > 0.01
    if share is None:
        found = run(patched, inputs())
        assert sum(p.nbytes for p in patcher.model.parameters()) == held, (
            "a patched weight takes no more memory"
        )
    else:
        with small.partial_loading(monkeypatch, share) as left:
            found = run(patched, inputs())
        assert left[-1] > 0
    assert small.away(found, wanted) < 1e-5
    patched.partially_unload(patched.offload_device, 1e9)  # what was loaded is left behind, LoRA and all
    assert small.away(patched.model(inputs()), wanted) < 1e-5
    assert torch.equal(run(patcher, inputs()), before), "and gone with its clone"


@pytest.mark.parametrize("name", FORMATS)
def test_loras_left_by_dynamic_loading(modules, build, name):
    """It hands a layer its LoRA and expects it to be applied, in each product or once."""
    from comfy.model_patcher import LowVramPatch

    patcher, plain = build(name)
    if modules[0].quantised_linear(torch.float32, modules[1].Quantised) is None:
        pytest.skip("this host does not load dynamically")
    run(patcher, inputs())
    patches, added = loras()
    patcher.add_patches(patches, 0.3)
    for key in patches:
        layer = getattr(patcher.model, key.split(".")[0])
        layer.weight_lowvram_function, layer.weight_function = LowVramPatch(key, patcher.patches), []
    kept = patcher.model.first.weight.dequantize()
    for _ in range(2):
        assert small.away(patcher.model(inputs()), merged(plain, added)(inputs())) < 1e-5
    assert torch.equal(patcher.model.first.weight.dequantize(), kept), (
        "the weight itself is not rounded again"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_loras_are_in_what_is_saved(modules, build, name):
    patcher, plain = build(name)
    if modules[0].quantised_linear(torch.float32, modules[1].Quantised) is None:
        pytest.skip("this host saves what is loaded")
    patches, added = loras()
    patcher.add_patches(patches, 0.3)
    saved = patcher.patch_weight_to_device("first.weight", return_weight=True).state_dict("weight")
    form, layer = modules[2].FORMATS[name], plain.first
    wanted = form.decode(dict(layer.named_parameters()), torch.float32) + added["first"]
    assert saved.keys() == form.layout(NARROW, WIDE).keys()
    assert small.away(form.decode(saved, torch.float32), wanted) < {"fp8": 0.05, "int8": 0.01}.get(name, 0.2)
    assert small.away(wanted, wanted - added["first"]) > 0.01


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_another_packs_patcher(build, name):
    """Without our behaviour the host patches weights for good."""
    import comfy.model_patcher

    patcher, plain = build(name)
    before = run(patcher, inputs())
    theirs = comfy.model_patcher.ModelPatcher(
        patcher.model, patcher.load_device, patcher.offload_device, size=patcher.model_size()
    )
    patches, added = loras()
    theirs.add_patches(patches, 0.3)
    assert small.away(run(theirs, inputs()), merged(plain, added)(inputs())) < 1e-5
    theirs.unpatch_model()
    assert torch.equal(run(patcher, inputs()), before)


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_hooks_change_a_lora_between_conditionings(build, name):
    """As the sampler does it with a hook on one conditioning: on, off, and on again, from the host's cache
    where it has one.
    """
    import comfy.hooks

    patcher, plain = build(name)
    before = run(patcher, inputs())
    patches, added = loras()
    group = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=0.3, strength_clip=0.0)
    group.add(hook)
    patcher.add_hook_patches(hook, patches, 0.3)
    for _ in range(2):
        patcher.apply_hooks(group)
        assert small.away(patcher.model(inputs()), merged(plain, added)(inputs())) < 1e-5
        patcher.apply_hooks(None)
        assert torch.equal(patcher.model(inputs()), before)
    patcher.apply_hooks(group)
    patcher.unpatch_model()
    assert torch.equal(patcher.model(inputs()), before), "nor does it outlast the loading"


def test_behaviour_stays_in_the_hosts_plain_clones(modules, build):
    """Newer hosts make a plain patcher of a dynamic one for hooks and compilers, with LoRAs to come."""
    import comfy.model_patcher

    patcher, _ = build("int8")
    clone = comfy.model_patcher.ModelPatcher.clone
    plainly = type("Plainly", (), {"clone": lambda self, **kwargs: demoted(clone(self))})

    def demoted(n):
        n.__class__ = comfy.model_patcher.ModelPatcher
        return n

    patcher.__class__ = type(
        type(patcher).__name__, (modules[3].PatchesInForward, plainly, comfy.model_patcher.ModelPatcher), {}
    )
    made = patcher.clone(disable_dynamic=True)
    assert isinstance(made, modules[3].PatchesInForward) and isinstance(
        made, comfy.model_patcher.ModelPatcher
    )
    assert made.model is patcher.model
