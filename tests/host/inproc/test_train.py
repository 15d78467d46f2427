"""ComfyUI's own training node on our MODEL: the loss falls, and the LoRA it makes changes the picture."""

from __future__ import annotations

import inspect

import pytest
from graphs import node
from small import MODEL, away, edit, lance, samples, t2i

SETTINGS = {
    "batch_size": 1,
    "grad_accumulation_steps": 1,
    "steps": 24,
    "learning_rate": 0.01,
    "rank": 4,
    "optimizer": "AdamW",
    "loss_function": "MSE",
    "seed": 3,
    "training_dtype": "fp32",
    "lora_dtype": "fp32",
    "quantized_backward": False,
    "algorithm": "LoRA",
    "gradient_checkpointing": False,
    "checkpoint_depth": 1,
    "offloading": False,
    "existing_lora": "[None]",
    "bucket_mode": False,
    "bypass_mode": False,
}


def known_inputs(kind) -> set[str]:
    """Names of a node's inputs in this ComfyUI: older ones have fewer."""
    return {name for group in kind.INPUT_TYPES().values() for name in group}


def training(comfy, graph, latent, **changes):
    """`graph` with TrainLoraNode as "train", and its LoRA and losses by output."""
    kind = comfy.nodes["TrainLoraNode"]
    settings = {k: v for k, v in {**SETTINGS, **changes}.items() if k in known_inputs(kind)}
    graph = {
        **graph,
        "train": node("TrainLoraNode", model=MODEL, latents=latent, positive=["text", 0], **settings),
    }
    first = list(kind.RETURN_TYPES).index("LORA_MODEL")
    lora, losses = comfy.run(graph, [("train", first), ("train", first + 1)]).values
    return graph, first, lora, losses["loss"]


def fell(losses) -> bool:
    """Each step is of another time and noise, so single ones say little."""
    third = len(losses) // 3
    return sum(losses[-third:]) < 0.9 * sum(losses[:third])


def photo():
    """A picture as a latent, to be learned."""
    return {
        "photo": node("LoadImage", image="photo.png"),
        "small": node(
            "ImageScale", image=["photo", 0], upscale_method="area", width=64, height=64, crop="center"
        ),
        "learned": node("VAEEncode", pixels=["small", 0], vae=["loader", 2]),
    }


@pytest.fixture(autouse=True)
def fresh(comfy):
    comfy.forget()
    yield
    comfy.forget()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_loss_falls_and_the_lora_changes_the_picture(comfy, dtype, checkpointing):
    plain = samples(comfy, lance(t2i()))
    graph, first, lora, losses = training(
        comfy,
        {**t2i(), **photo()},
        ["learned", 0],
        training_dtype=dtype,
        lora_dtype=dtype,
        gradient_checkpointing=checkpointing,
    )
    assert len(losses) == SETTINGS["steps"] and fell(losses), losses
    assert any(bool(t.any()) for n, t in lora.items() if "lora_up" in n)
    graph["learnt"] = node("LoraModelLoader", model=MODEL, lora=["train", first], strength_model=1.0)
    if "bypass" in known_inputs(comfy.nodes["LoraModelLoader"]):
        graph["learnt"]["inputs"]["bypass"] = False
    changed = samples(comfy, lance(graph, model=["learnt", 0]))
    assert away(changed, plain) > 0.01
    assert away(samples(comfy, lance(t2i())), plain) == 0, "the model itself has not been trained"


def test_the_saved_lora_is_the_trained_one(comfy, base):
    graph, first, _, _ = training(comfy, {**t2i(), **photo()}, ["learned", 0], steps=4)
    (base / "models" / "loras").mkdir(exist_ok=True)
    graph["learnt"] = node("LoraModelLoader", model=MODEL, lora=["train", first], strength_model=1.0)
    if "bypass" in known_inputs(comfy.nodes["LoraModelLoader"]):
        graph["learnt"]["inputs"]["bypass"] = False
    wanted = samples(comfy, lance(graph, model=["learnt", 0]))
    kind = "SaveLoRA" if "SaveLoRA" in comfy.nodes else "SaveLoRANode"
    saving = {**graph, "save": node(kind, lora=["train", first], prefix="loras/trained")}
    comfy.run(saving)
    (file,) = (base / "output" / "loras").glob("trained*.safetensors")
    file.rename(base / "models" / "loras" / "trained.safetensors")
    loaded = {
        **t2i(),
        "lora": node("LoraLoaderModelOnly", model=MODEL, lora_name="trained.safetensors", strength_model=1.0),
    }
    assert away(samples(comfy, lance(loaded, model=["lora", 0])), wanted) < 1e-5


def test_a_model_that_has_sampled_can_be_trained(comfy):
    """What is loaded then was moved in inference mode."""
    samples(comfy, lance(t2i()))
    _, _, _, losses = training(comfy, {**t2i(), **photo()}, ["learned", 0], steps=3)
    assert len(losses) == 3


def test_weights_are_not_made_in_inference_mode(comfy):
    model = comfy.value(t2i(), "loader")
    assert not any(p.is_inference() for p in model.model.parameters())
    assert not any(p.is_inference() for p in model.additional_models["lance_und"][0].model.parameters())


def test_a_clone_with_weights_of_its_own_shares_none(comfy, monkeypatch):
    monkeypatch.setattr(comfy.server, "last_prompt_id", "", raising=False)  # for the progress bar
    model = comfy.value(t2i(), "loader")
    if "force_deepcopy" not in inspect.signature(type(model).__mro__[-2].clone).parameters:
        pytest.skip("clones of this ComfyUI share their weights always")
    clone = model.clone(force_deepcopy=True)
    (mine,), (theirs,) = (m.additional_models["lance_und"] for m in (model, clone))
    assert clone.model is not model.model and theirs.model is not mine.model
    assert clone.model.diffusion_model.understanding is theirs.model
    shared = {p.data_ptr() for m in (model, mine) for p in m.model.parameters()}
    assert not any(p.data_ptr() in shared for m in (clone, theirs) for p in m.model.parameters())


def test_an_edit_can_be_trained(comfy):
    """What is edited passes through the expert that is trained: its context is made anew in each step, as a
    constant of the step.
    """
    graph = edit()
    _, _, lora, losses = training(comfy, graph, ["vision", 1], steps=3)
    assert len(losses) == 3
    assert any(bool(t.any()) for n, t in lora.items() if "lora_up" in n)


class Both:
    """Test node: two latents as a list."""

    RETURN_TYPES = ("LATENT",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "both"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"first": ("LATENT",), "second": ("LATENT",)}}

    def both(self, first, second):
        return ([first, second],)


def test_pictures_of_several_sizes_are_trained_together(comfy, monkeypatch):
    """A list of latents, each of its own size."""
    kind = comfy.nodes["TrainLoraNode"]
    if not getattr(kind, "INPUT_IS_LIST", False):
        pytest.skip("this ComfyUI trains on one size")
    monkeypatch.setitem(comfy.nodes, "TestBoth", Both)
    graph = {**t2i(), **photo()}
    graph["wide"] = node(
        "ImageScale", image=["photo", 0], upscale_method="area", width=96, height=64, crop="center"
    )
    graph["other"] = node("VAEEncode", pixels=["wide", 0], vae=["loader", 2])
    graph["both"] = node("TestBoth", first=["learned", 0], second=["other", 0])
    _, _, _, losses = training(comfy, graph, ["both", 0], steps=6)
    assert len(losses) == 6
