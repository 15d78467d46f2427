"""ComfyUI's save nodes and ours: files that Lance Loader lists and loads, with all that was on a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import inprocess
import pytest
import torch
from graphs import GOLDEN, node
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import CHECKPOINT, MODEL, VIDEO_CHECKPOINT, away, lance, module, question, samples, t2i

VAE, LANCE = ["loader", 2], ["loader", 1]


@pytest.fixture(scope="module")
def lora(base):
    """A LoRA on layers of both experts, part of a joined one and all of it among them."""
    (base / "models" / "loras").mkdir(exist_ok=True)
    generator, lora = torch.Generator().manual_seed(5), {}
    for prefix in ("", "understanding."):
        for layer, rows, columns in (("k_proj", 32, 64), ("qkv_proj", 128, 64)):
            name = f"diffusion_model.{prefix}layers.1.self_attn.{layer}"
            lora[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 4
            lora[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
        lora[f"diffusion_model.{prefix}norm.diff"] = torch.randn(64, generator=generator) / 10
    save_file(lora, base / "models" / "loras" / "saved.safetensors")
    return "saved.safetensors"


@pytest.fixture(scope="module")
def quantised(comfy, tmp_path_factory):
    """Converted files in a lance folder of their own, by dtype."""
    import folder_paths

    folder = tmp_path_factory.mktemp("quantised")
    convert = module(comfy, "lance_core.checkpoint.convert").convert
    for dtype in ("fp8", "int8", "int4", "nvfp4"):
        convert(GOLDEN / "checkpoint" / CHECKPOINT, folder / f"q_{dtype}.safetensors", dtype)
    folder_paths.add_model_folder_path("lance", str(folder))
    yield folder
    folder_paths.folder_names_and_paths["lance"][0].remove(str(folder))


@pytest.fixture(autouse=True)
def saved_folders(base, monkeypatch):
    """As main.py does it at start: what is saved is among the models; and nothing is left of other tests."""
    import folder_paths

    for kind in ("checkpoints", "diffusion_models"):
        folder = base / "output" / kind
        shutil.rmtree(folder, ignore_errors=True)
        paths = [*folder_paths.folder_names_and_paths[kind][0], str(folder)]
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, (paths, folder_paths.folder_names_and_paths[kind][1])
        )


def from_checkpoint(name: str, graph=None, dtype: str = "default"):
    graph = graph or t2i()
    graph["loader"]["inputs"] |= {"checkpoint": name, "weight_dtype": dtype}
    return graph


def with_lora(graph, name, strength=1.0):
    loader = node("LoraLoaderModelOnly", model=MODEL, lora_name=name, strength_model=strength)
    return {**graph, "lora": loader}


def model_save(comfy, graph, model=MODEL, name="mine"):
    """What the list of Lance Loader calls the file that ModelSave makes."""
    comfy.run({**graph, "save": node("ModelSave", model=model, filename_prefix=f"diffusion_models/{name}")})
    return listed(comfy, f"diffusion_models/{name}_")


def lance_save(comfy, graph, model=MODEL, name="whole", **inputs):
    saving = node("LanceSaveCheckpoint", model=model, filename_prefix=f"checkpoints/{name}", **inputs)
    comfy.run({**graph, "save": saving})
    return listed(comfy, f"checkpoints/{name}_")


def listed(comfy, start):
    options = comfy.nodes["LanceLoader"].INPUT_TYPES()["required"]["checkpoint"][1]["options"]
    (found,) = [name for name in options if name.startswith(start)]
    return found


def file_of(base: Path, name: str) -> Path:
    return base / "output" / name


def test_a_saved_model_is_listed_and_makes_the_same_picture(comfy, base):
    wanted = samples(comfy, lance(t2i()))
    name = model_save(comfy, t2i())
    comfy.forget()
    assert torch.equal(samples(comfy, lance(from_checkpoint(name))), wanted)
    golden, saved = (
        load_file(GOLDEN / "checkpoint" / CHECKPOINT / "model.safetensors"),
        load_file(file_of(base, name)),
    )
    expected = {n for n in golden if not n.startswith(("latent_pos_embed", "vit_model"))}
    assert set(saved) == {*expected, "lance_config"}, "the released names, and the configuration"
    assert all(torch.equal(saved[n].float(), golden[n].float()) for n in expected)


def test_a_saved_model_answers(comfy):
    """The vision tower and the VAE are found where the other checkpoints have theirs."""
    answer = comfy.value(question(), "answer")
    name = model_save(comfy, t2i(), name="asked")
    assert comfy.value(from_checkpoint(name, question()), "answer") == answer


@pytest.mark.parametrize("sampled", [False, True], ids=["fresh", "sampled before"])
def test_loras_are_baked_in(comfy, lora, sampled):
    comfy.forget()
    graph = with_lora(t2i(), lora)
    wanted = samples(comfy, lance(graph, model=["lora", 0]))
    assert away(wanted, samples(comfy, lance(t2i()))) > 0.05
    comfy.forget()
    if sampled:
        samples(comfy, lance(graph, model=["lora", 0]))
    name = model_save(comfy, graph, ["lora", 0], f"baked{sampled}")
    comfy.forget()
    assert away(samples(comfy, lance(from_checkpoint(name))), wanted) < 1e-5


def test_a_loaded_lora_of_another_clone_is_not(comfy, lora):
    """Clones share their weights: what is loaded last must not be in what is saved."""
    wanted = samples(comfy, lance(t2i()))
    samples(comfy, lance(with_lora(t2i(), lora), model=["lora", 0]))
    name = lance_save(comfy, with_lora(t2i(), lora), name="plain")
    comfy.forget()
    assert torch.equal(samples(comfy, lance(from_checkpoint(name))), wanted)


def test_a_merge_is_baked_in(comfy):
    graph = {**t2i(), "other": node("LanceLoader", checkpoint=VIDEO_CHECKPOINT, weight_dtype="default")}
    graph["merged"] = node("ModelMergeSimple", model1=MODEL, model2=["other", 0], ratio=0.5)
    wanted = samples(comfy, lance(graph, model=["merged", 0]))
    name = model_save(comfy, graph, ["merged", 0], "merged")
    comfy.forget()
    assert away(samples(comfy, lance(from_checkpoint(name))), wanted) < 1e-5


def test_our_node_makes_a_file_that_needs_nothing_else(comfy, base, tmp_path, lora):
    import folder_paths

    graph = with_lora(t2i(), lora)
    wanted, answer = samples(comfy, lance(graph, model=["lora", 0])), comfy.value(question(), "answer")
    name = lance_save(comfy, graph, ["lora", 0], lance=LANCE, vae=VAE)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.move(file_of(base, name), alone / "alone.safetensors")
    checkpoint = module(comfy, "lance_core.checkpoint.checkpoint").Checkpoint(alone / "alone.safetensors")
    assert checkpoint.config.vit is not None and checkpoint.config.vae is not None
    assert checkpoint.config.variant == "image"
    with safe_open(alone / "alone.safetensors", "pt") as file:
        told = file.metadata()
    assert {"llm_config", "tokenizer", "vit_config", "variant"} <= set(json.loads(told["lance"]))
    assert "LanceLoader" in told["prompt"], "the graph is in it, as in ComfyUI's own files"
    folder_paths.add_model_folder_path("lance", str(alone))
    try:
        found = samples(comfy, lance(from_checkpoint("alone.safetensors")))
        assert away(found, wanted) < 1e-5
        assert isinstance(comfy.value(from_checkpoint("alone.safetensors", question()), "answer"), str)
    finally:
        folder_paths.folder_names_and_paths["lance"][0].remove(str(alone))
    assert isinstance(answer, str)


def test_the_vae_in_it_is_the_connected_one(comfy, base):
    name = lance_save(comfy, t2i(), vae=VAE, name="vae")
    saved = load_file(file_of(base, name))
    import torch as t

    golden = t.load(GOLDEN / "checkpoint" / "Wan2.2_VAE.pth", weights_only=True)
    assert {f"vae.{n}" for n in golden} == {n for n in saved if n.startswith("vae.")}
    assert all(away(saved[f"vae.{n}"], w) < 0.01 for n, w in golden.items())


class Clip:
    """A CLIP as save nodes see it; nothing of Lance's is one."""

    def __init__(self) -> None:
        from comfy.model_patcher import ModelPatcher

        self.patcher = ModelPatcher(torch.nn.Linear(2, 2), torch.device("cpu"), torch.device("cpu"))

    def load_model(self):
        return self.patcher

    def get_sd(self):
        return self.patcher.model.state_dict()

    state_dict_for_saving = get_sd


def test_checkpoint_save_with_somebodys_clip(comfy, base):
    wanted = samples(comfy, lance(t2i()))
    loaded = comfy.run(t2i(), [("loader", 0), ("loader", 2)]).values
    with torch.inference_mode():
        comfy.nodes["CheckpointSave"]().save(loaded[0], Clip(), loaded[1], "checkpoints/clip")
    name = listed(comfy, "checkpoints/clip_")
    assert any(n.startswith("vae.") for n in load_file(file_of(base, name)))
    comfy.forget()
    assert torch.equal(samples(comfy, lance(from_checkpoint(name))), wanted)


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4", "nvfp4"])
@pytest.mark.parametrize("node_kind", ["ModelSave", "LanceSaveCheckpoint"])
def test_quantised_layers_stay_as_they_are(comfy, base, quantised, dtype, node_kind):
    source = f"q_{dtype}.safetensors"
    save = model_save if node_kind == "ModelSave" else lance_save
    name = save(comfy, from_checkpoint(source), name=f"{dtype}_kept")
    before, after = load_file(quantised / source), load_file(file_of(base, name))
    layers = {n for n in before if ".layers." in n or "scaled_fp8" in n}
    assert layers == {n for n in after if ".layers." in n or "scaled_fp8" in n}
    for n in layers:
        if "scaled_fp8" not in n:
            one, other = before[n], after[n]
            exact = "_proj" in n and one.dtype == other.dtype
            assert one.shape == other.shape and torch.equal(one.float(), other.float()), n
            assert exact or one.is_floating_point(), n
    wanted = samples(comfy, lance(from_checkpoint(source)))
    comfy.forget()
    assert away(samples(comfy, lance(from_checkpoint(name))), wanted) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [("fp8", 0.3), ("int8", 0.05)])
def test_a_lora_on_quantised_layers_is_baked_in(comfy, quantised, lora, dtype, bound):
    graph = with_lora(from_checkpoint(f"q_{dtype}.safetensors"), lora)
    wanted = samples(comfy, lance(graph, model=["lora", 0]))
    name = model_save(comfy, graph, ["lora", 0], f"{dtype}_baked")
    comfy.forget()
    found = samples(comfy, lance(from_checkpoint(name)))
    plain = samples(comfy, lance(from_checkpoint(f"q_{dtype}.safetensors")))
    drift = float((found - wanted).norm() / wanted.norm())
    assert drift < bound and drift < 0.5 * float((plain - wanted).norm() / wanted.norm())


def test_fp8_without_scales_is_saved_as_bf16(comfy, base):
    """What the loader's weight_dtype makes is no format of a file."""
    graph = from_checkpoint(CHECKPOINT, dtype="fp8_e4m3fn")
    wanted = samples(comfy, lance(graph))
    name = model_save(comfy, graph, name="raw_fp8")
    assert torch.float8_e4m3fn not in {t.dtype for t in load_file(file_of(base, name)).values()}
    comfy.forget()
    assert away(samples(comfy, lance(from_checkpoint(name))), wanted) < 0.05


def test_other_peoples_files_are_not_listed(comfy, base):
    folder = base / "output" / "checkpoints"
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(2, 2)}, folder / "theirs.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no")
    options = comfy.nodes["LanceLoader"].INPUT_TYPES()["required"]["checkpoint"][1]["options"]
    assert not [name for name in options if "theirs" in name or "broken" in name]


def test_what_cannot_be_saved_says_why(comfy):
    saving, errors = module(comfy, "nodes.saving"), module(comfy, "lance_core.errors")
    with pytest.raises(errors.RequestError, match=r"not Wan2\.2's"):
        saving.vae_tensors({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)})
    with pytest.raises(inprocess.NodeFailedError, match="not Lance"):
        graph = {"save": node("LanceSaveCheckpoint", model=["fake", 0], filename_prefix="x")}
        comfy.nodes["FakeModel"] = FakeModel
        try:
            comfy.run({**graph, "fake": node("FakeModel")})
        finally:
            del comfy.nodes["FakeModel"]


class FakeModel:
    """A MODEL of another family."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return (Clip().patcher,)
