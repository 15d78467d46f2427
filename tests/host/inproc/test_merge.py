"""ComfyUI's merge and extraction nodes on two Lance MODELs: both experts, exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from graphs import GOLDEN, node
from safetensors.torch import load_file, save_file
from small import CHECKPOINT, MODEL, VIDEO_CHECKPOINT, away, lance, module, samples, t2i

OTHER = ["other", 0]
UND = "diffusion_model.understanding."


def two(second: str = VIDEO_CHECKPOINT, first: str = CHECKPOINT):
    """The graph of a picture, with a second loader as "other"."""
    graph = {**t2i(), "other": node("LanceLoader", checkpoint=second, weight_dtype="default")}
    graph["loader"]["inputs"]["checkpoint"] = first
    return graph


def merged(kind: str, graph=None, model1=MODEL, model2=OTHER, **inputs):
    graph = graph or two()
    return {**graph, "merged": node(kind, model1=model1, model2=model2, **inputs)}


def picture(comfy, graph, model="merged"):
    return samples(comfy, lance(graph, model=[model, 0]))


def blocks(ratio: float):
    return {"input": ratio, "middle": 1.0, "out": 1.0}


@pytest.fixture(scope="module")
def spliced(comfy, base, tmp_path_factory):
    """Checkpoints made with torch alone: name -> weights of the two combined; and quantised ones."""
    import folder_paths

    folder = tmp_path_factory.mktemp("spliced")
    golden = GOLDEN / "checkpoint"
    shutil.copytree(golden / "Qwen2.5-VL-ViT", folder / "Qwen2.5-VL-ViT")
    shutil.copy(golden / "Wan2.2_VAE.pth", folder)
    a, b = (load_file(golden / name / "model.safetensors") for name in (CHECKPOINT, VIDEO_CHECKPOINT))
    made = {
        "half": lambda x, y: 0.5 * x + 0.5 * y,
        "quarter": lambda x, y: 0.25 * x + 0.75 * y,
        "sum": lambda x, y: x + y,
        "difference": lambda x, y: 0.5 * x - 0.5 * y,
    }
    for name, combine in made.items():
        shutil.copytree(golden / CHECKPOINT, folder / name)
        new = {k: combine(w.float(), b[k].float()) if k in b else w for k, w in a.items()}
        save_file(new, folder / name / "model.safetensors")
    convert = module(comfy, "lance_core.checkpoint.convert").convert
    for dtype in ("int8", "nvfp4"):
        convert(golden / VIDEO_CHECKPOINT, folder / f"{dtype}.safetensors", dtype)
    (base / "models" / "loras").mkdir(exist_ok=True)
    generator, lora = torch.Generator().manual_seed(5), {}
    for prefix in ("", "understanding."):
        for layer, rows, columns in (("self_attn.k_proj", 32, 64), ("self_attn.qkv_proj", 128, 64)):
            name = f"diffusion_model.{prefix}layers.1.{layer}"
            lora[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 4
            lora[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
        lora[f"diffusion_model.{prefix}layers.0.mlp.down_proj.dora_scale"] = torch.ones(64, 1)
        name = f"diffusion_model.{prefix}layers.0.mlp.down_proj"
        lora[f"{name}.lora_A.weight"] = torch.randn(4, 96, generator=generator) / 4
        lora[f"{name}.lora_B.weight"] = torch.randn(64, 4, generator=generator) / 4
    save_file(lora, base / "models" / "loras" / "merge.safetensors")
    folder_paths.add_model_folder_path("lance", str(folder))
    yield folder
    folder_paths.folder_names_and_paths["lance"][0].remove(str(folder))


def loaded(comfy, name):
    graph = t2i()
    graph["loader"]["inputs"]["checkpoint"] = name
    return samples(comfy, lance(graph))


@pytest.mark.parametrize("kind", ["simple", "blocks"])
def test_the_ends_of_a_merge_are_the_models_themselves(comfy, spliced, kind):
    def at(ratio):
        if kind == "simple":
            return picture(comfy, merged("ModelMergeSimple", ratio=ratio))
        return picture(comfy, merged("ModelMergeBlocks", **blocks(ratio)))

    one, other = samples(comfy, lance(t2i())), loaded(comfy, VIDEO_CHECKPOINT)
    assert away(one, other) > 0.1
    assert torch.equal(at(1.0), one)
    assert torch.equal(at(0.0), other)


@pytest.mark.parametrize(
    ("name", "kind", "inputs"),
    [
        ("half", "ModelMergeSimple", {"ratio": 0.5}),
        ("quarter", "ModelMergeSimple", {"ratio": 0.25}),
        ("quarter", "ModelMergeBlocks", blocks(0.25)),
        ("sum", "ModelMergeAdd", {}),
    ],
)
def test_what_is_between_is_the_file_made_with_torch(comfy, spliced, name, kind, inputs):
    wanted = loaded(comfy, name)
    assert away(picture(comfy, merged(kind, **inputs)), wanted) < 1e-5
    assert away(wanted, samples(comfy, lance(t2i()))) > 0.01


def test_subtracting(comfy, spliced):
    """ComfyUI's subtraction with a multiplier m is m times the difference."""
    found = picture(comfy, merged("ModelMergeSubtract", multiplier=0.5))
    assert away(found, loaded(comfy, "difference")) < 1e-4


def test_taking_a_model_away_and_adding_it_again(comfy, spliced):
    graph = merged("ModelMergeSubtract", multiplier=1.0)
    graph["again"] = node("ModelMergeAdd", model1=["merged", 0], model2=OTHER)
    assert away(picture(comfy, graph, "again"), samples(comfy, lance(t2i()))) < 1e-4


def test_a_third_model_is_merged_into_a_merge(comfy, spliced):
    graph = merged("ModelMergeSimple", ratio=0.5)
    graph["third"] = node("ModelMergeSimple", model1=MODEL, model2=["merged", 0], ratio=0.5)
    blend = 0.75, 0.25
    a, b = (
        load_file(GOLDEN / "checkpoint" / n / "model.safetensors") for n in (CHECKPOINT, VIDEO_CHECKPOINT)
    )
    folder = spliced / "third"
    if not folder.exists():
        shutil.copytree(GOLDEN / "checkpoint" / CHECKPOINT, folder)
        new = {k: blend[0] * w.float() + blend[1] * b[k].float() if k in b else w for k, w in a.items()}
        save_file(new, folder / "model.safetensors")
    assert away(picture(comfy, graph, "third"), loaded(comfy, "third")) < 1e-5


def with_lora(graph, model, strength=1.0):
    lora = node("LoraLoaderModelOnly", model=model, lora_name="merge.safetensors", strength_model=strength)
    return {**graph, "lora": lora}


def test_the_second_models_loras_come_along(comfy, spliced):
    """On part of a joined layer, on all of it, and a DoRA; of both experts."""
    graph = with_lora(two(), OTHER)
    wanted = picture(comfy, graph, "lora")
    assert away(wanted, loaded(comfy, VIDEO_CHECKPOINT)) > 0.05
    found = merged("ModelMergeSimple", graph, model2=["lora", 0], ratio=0.0)
    assert away(picture(comfy, found), wanted) < 1e-6


def test_loaded_or_not_the_second_model_is_the_same(comfy, spliced):
    """A loaded model has patched weights in place of its own, which are in a backup."""
    graph = with_lora(two(), OTHER)
    wanted = picture(comfy, graph, "lora")
    found = merged("ModelMergeSimple", graph, model2=["lora", 0], ratio=0.0)
    after = picture(comfy, found)
    comfy.forget()
    assert torch.equal(picture(comfy, found), after)
    assert away(after, wanted) < 1e-6


@pytest.mark.parametrize("dtype", ["int8", "nvfp4"])
def test_a_quantised_model_on_either_side(comfy, spliced, dtype):
    """Its layers are apart where the other's are joined."""
    quantised = f"{dtype}.safetensors"
    there = merged("ModelMergeSimple", two(quantised), ratio=0.0)
    assert away(picture(comfy, there), loaded(comfy, quantised)) < 0.02  # bf16 sums or float32's
    here = merged("ModelMergeSimple", two(CHECKPOINT, quantised), ratio=0.0)
    assert away(picture(comfy, here), samples(comfy, lance(t2i()))) < 0.02


def test_what_cannot_be_merged_says_why(comfy, spliced, tmp_path):
    errors = module(comfy, "lance_core.errors")
    model = comfy.value(t2i(), "loader").clone()
    weight = torch.zeros(4, 4)
    with pytest.raises(errors.RequestError, match="Merge Lance with Lance"):
        model.add_patches({"diffusion_model.input_blocks.0.weight": [(weight, lambda w, **_: w)]}, 0.5, 0.5)
    for name in ("diffusion_model.layers.0.self_attn.q_proj.weight", f"{UND}norm.weight"):
        with pytest.raises(errors.RequestError, match="different sizes"):
            model.add_patches({name: [(weight, lambda w, **_: w)]}, 0.5, 0.5)


def test_both_experts_are_in_the_key_patches_and_only_where_asked(comfy):
    model = comfy.value(t2i(), "loader")
    asked = model.get_key_patches("diffusion_model.")
    assert f"{UND}layers.0.self_attn.k_proj.weight" in asked
    assert "diffusion_model.layers.0.self_attn.k_proj.weight" in asked
    assert not any("qkv_proj" in name for name in asked)
    own = model.get_key_patches()
    assert set(own) == set(model.model_state_dict()) and not any(UND in name for name in own)


# -- extraction
# ---------------------------------------------------------------------------------------------------------


def extract(comfy, base: Path, graph, model="merged", name="extracted"):
    """The LoRA file that LoraSave makes of a model, moved to where LoRAs are."""
    graph = {
        **graph,
        "save": node(
            "LoraSave",
            filename_prefix=f"loras/{name}",
            rank=8,
            lora_type="full_diff",
            bias_diff=True,
            model_diff=[model, 0],
        ),
    }
    comfy.run(graph)
    (file,) = (base / "output" / "loras").glob(f"{name}_*.safetensors")
    target = base / "models" / "loras" / f"{name}.safetensors"
    file.replace(target)
    return target


@pytest.mark.parametrize("sampled", [False, True], ids=["fresh", "sampled before"])
def test_an_extracted_lora_has_both_experts(comfy, base, spliced, sampled):
    comfy.forget()
    graph = with_lora(t2i(), MODEL)
    wanted = picture(comfy, graph, "lora")
    if not sampled:
        comfy.forget()
    graph = merged("ModelMergeSubtract", graph, model1=["lora", 0], model2=MODEL, multiplier=1.0)
    file = extract(comfy, base, graph, name=f"extracted{sampled}")
    names = load_file(file)
    assert any(name.startswith(f"{UND}layers.1.") for name in names)
    assert any(name.startswith("diffusion_model.layers.1.") for name in names)
    loading = with_lora(t2i(), MODEL)
    loading["lora"]["inputs"]["lora_name"] = file.name
    found = picture(comfy, loading, "lora")
    assert away(found, wanted) < 0.01  # the file has float16
    assert away(wanted, samples(comfy, lance(t2i()))) > 0.05


def test_quantised_weights_give_no_lora(comfy, base, spliced):
    import inprocess

    graph = with_lora(t2i(), MODEL)
    graph["loader"]["inputs"]["checkpoint"] = "int8.safetensors"
    graph = merged("ModelMergeSubtract", graph, model1=["lora", 0], model2=MODEL, multiplier=1.0)
    with pytest.raises(inprocess.NodeFailedError, match="cannot be extracted from quantised weights"):
        extract(comfy, base, graph, name="none")
