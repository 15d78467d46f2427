"""LoRA files by every name that trainers give Lance's layers, and what is said of files for other models."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import inprocess
import pytest
import torch
from graphs import GOLDEN, node
from safetensors.torch import load_file, save_file
from small import CHECKPOINT, MODEL, away, ksampler, lance, module, samples, t2i

RANK, ALPHA = 4, 2.0
# Our module -> the released one.
MODULES = {
    "layers.0.self_attn.q_proj": "language_model.model.layers.0.self_attn.q_proj_moe_gen",
    "layers.1.mlp.up_proj": "language_model.model.layers.1.mlp_moe_gen.up_proj",
    "layers.2.mlp.down_proj": "language_model.model.layers.2.mlp_moe_gen.down_proj",
    "understanding.layers.0.self_attn.v_proj": "language_model.model.layers.0.self_attn.v_proj",
    "understanding.layers.1.mlp.gate_proj": "language_model.model.layers.1.mlp.gate_proj",
}
PEFT, PEFT_NAMED = (
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A.fox.weight", ".lora_B.fox.weight"),
)
KOHYA, DIFFUSERS = (".lora_down.weight", ".lora_up.weight"), (".lora.down.weight", ".lora.up.weight")
PLAIN, BARE = (".lora_A.weight", ".lora_B.weight"), (".lora_A", ".lora_B")


def ours(name: str) -> str:
    return name


def released(name: str) -> str:
    return MODULES[name]


def flat(named: Callable[[str], str]) -> Callable[[str], str]:
    return lambda name: named(name).replace(".", "_")


def after(prefix: str, named: Callable[[str], str]) -> Callable[[str], str]:
    return lambda name: prefix + named(name)


def short(much: str) -> Callable[[str], str]:
    return lambda name: MODULES[name].removeprefix(much)


NAMINGS = {
    "ours": (after("diffusion_model.", ours), PLAIN, False),
    "ours, bare": (ours, PLAIN, False),
    "ours, kohya's suffixes and alpha": (after("diffusion_model.", ours), KOHYA, True),
    "ours after transformer.": (after("transformer.", ours), PLAIN, False),
    "ours, kohya": (after("lora_unet_", flat(ours)), KOHYA, True),
    "ours, lycoris": (after("lycoris_", flat(ours)), KOHYA, True),
    "ours, PEFT": (after("base_model.model.", ours), PEFT, False),
    "released, bare": (released, PLAIN, False),
    "released, bare suffixes": (released, BARE, False),
    "released after diffusion_model.": (after("diffusion_model.", released), PLAIN, True),
    "released after transformer., diffusers": (after("transformer.", released), DIFFUSERS, False),
    "released, PEFT": (after("base_model.model.", released), PEFT, False),
    "released, PEFT with an adapter's name": (after("base_model.model.", released), PEFT_NAMED, False),
    "released, PEFT as saved": (after("base_model.model.", released), PLAIN, False),
    "released after two prefixes": (after("base_model.model.diffusion_model.", released), PLAIN, False),
    "released, kohya": (after("lora_unet_", flat(released)), KOHYA, True),
    "released, lycoris": (after("lycoris_", flat(released)), KOHYA, True),
    "without language_model., PEFT": (after("base_model.model.", short("language_model.")), PLAIN, False),
    "without language_model.model.": (short("language_model.model."), PLAIN, False),
    "without language_model.model., kohya": (
        after("lora_unet_", flat(short("language_model.model."))),
        KOHYA,
        True,
    ),
}


@pytest.fixture(scope="module")
def weights():
    return load_file(GOLDEN / "checkpoint" / CHECKPOINT / "model.safetensors")


@pytest.fixture(scope="module")
def pairs(weights):
    """A, B of each module."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, key in MODULES.items():
        rows, columns = weights[f"{key}.weight"].shape
        made[name] = (
            torch.randn(RANK, columns, generator=generator) / 6,
            torch.randn(rows, RANK, generator=generator) / 6,
        )
    return made


@pytest.fixture(scope="module")
def loras(base):
    folder = base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def spliced(comfy, weights, tmp_path_factory):
    """(name, changes of released weights) -> makes a checkpoint that has them."""
    import folder_paths

    folder = tmp_path_factory.mktemp("spliced_loras")
    shutil.copytree(GOLDEN / "checkpoint" / "Qwen2.5-VL-ViT", folder / "Qwen2.5-VL-ViT")
    shutil.copy(GOLDEN / "checkpoint" / "Wan2.2_VAE.pth", folder)
    folder_paths.add_model_folder_path("lance", str(folder))

    def make(name, changed):
        shutil.copytree(GOLDEN / "checkpoint" / CHECKPOINT, folder / name)
        changed = {f"{key}.weight": w for key, w in changed.items()}
        save_file({**weights, **changed}, folder / name / "model.safetensors")
        return name

    yield make
    folder_paths.folder_names_and_paths["lance"][0].remove(str(folder))


@pytest.fixture(scope="module")
def merged(comfy, spliced, weights, pairs):
    """What the LoRA should make of the picture, at full strength without and with alpha."""
    pictures = {}
    for with_alpha, scale in ((False, 1.0), (True, ALPHA / RANK)):
        changed = {
            MODULES[name]: weights[f"{MODULES[name]}.weight"].float() + scale * b @ a
            for name, (a, b) in pairs.items()
        }
        name = spliced(f"names_{with_alpha}", changed)
        pictures[with_alpha] = samples(comfy, lance(from_checkpoint(name)))
    return pictures


def from_checkpoint(name):
    graph = t2i()
    graph["loader"]["inputs"]["checkpoint"] = name
    return graph


def with_lora(name, checkpoint=CHECKPOINT, strength=1.0):
    lora = node("LoraLoaderModelOnly", model=MODEL, lora_name=name, strength_model=strength)
    return {**from_checkpoint(checkpoint), "lora": lora}


def picture(comfy, name, **changes):
    return samples(comfy, lance(with_lora(name, **changes), model=["lora", 0]))


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_the_lora_of_both_experts(comfy, loras, merged, pairs, caplog, naming):
    named, (down, up), alpha = NAMINGS[naming]
    lora = {}
    for name, (a, b) in pairs.items():
        lora |= {f"{named(name)}{down}": a, f"{named(name)}{up}": b}
        if alpha:
            lora[f"{named(name)}.alpha"] = torch.tensor(ALPHA)
    file = f"naming_{abs(hash(naming))}.safetensors"
    save_file(lora, loras / file)
    found = picture(comfy, file)
    assert away(found, merged[alpha]) < 1e-5
    assert not [r for r in caplog.records if "not loaded" in r.getMessage().lower()]
    assert away(merged[alpha], samples(comfy, lance(t2i()))) > 0.01


@pytest.mark.parametrize("naming", ["released, PEFT", "released, kohya"])
def test_hooks_know_the_same_names(comfy, loras, pairs, naming):
    """One of the generation expert, as a conditioning's hook."""
    named, (down, up), _ = NAMINGS[naming]
    (a, b), name = pairs["layers.1.mlp.up_proj"], named("layers.1.mlp.up_proj")
    save_file({f"{name}{down}": a, f"{name}{up}": b}, loras / "hook.safetensors")
    graph = t2i()
    graph["hook"] = node("CreateHookLoraModelOnly", lora_name="hook.safetensors", strength_model=1.0)
    pair = {"positive_NEW": ["text", 0], "negative_NEW": ["text", 1]}
    graph["hooked"] = node(
        "PairConditioningSetProperties", **pair, hooks=["hook", 0], strength=1.0, set_cond_area="default"
    )
    found = samples(comfy, ksampler(graph, positive=["hooked", 0], negative=["hooked", 1]))
    wanted = samples(comfy, ksampler(with_lora("hook.safetensors"), model=["lora", 0]))
    assert away(found, wanted) < 1e-5
    assert away(wanted, samples(comfy, ksampler(t2i()))) > 1e-3


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("suffix", ["", ".weight", ".default.weight", ".default"])
def test_pefts_dora_is_computed_as_peft_does(comfy, loras, spliced, weights, pairs, suffix, strength):
    lora, changed = {}, {}
    generator = torch.Generator().manual_seed(4)
    for name, (a, b) in pairs.items():
        key = MODULES[name]
        weight = weights[f"{key}.weight"].float()
        magnitude = weight.norm(dim=1) * (1 + 0.2 * torch.randn(len(weight), generator=generator))
        lora[f"base_model.model.{key}.lora_A.weight"] = a
        lora[f"base_model.model.{key}.lora_B.weight"] = b
        lora[f"base_model.model.{key}.lora_magnitude_vector{suffix}"] = magnitude
        together = weight + b @ a
        done = magnitude[:, None] * together / together.norm(dim=1, keepdim=True)
        changed[key] = weight + strength * (done - weight)
    save_file(lora, loras / "dora.safetensors")
    name = spliced(f"dora_{suffix}_{strength}".replace(".", "_"), changed)
    comfy._executor.reset()  # the file's name is the same each time
    found = picture(comfy, "dora.safetensors", strength=strength)
    assert away(found, samples(comfy, lance(from_checkpoint(name)))) < 1e-5


def test_lycoris_forms_of_other_kinds(comfy, loras, spliced, weights):
    """LoHa and LoKr by released names: products of two matrices, element by element and Kronecker's."""
    generator = torch.Generator().manual_seed(9)
    one, other = (
        "language_model.model.layers.1.self_attn.k_proj_moe_gen",
        "language_model.model.layers.1.mlp.up_proj",
    )
    rows, columns = weights[f"{one}.weight"].shape
    w1a, w2a = (torch.randn(rows, 2, generator=generator) / 2 for _ in "ab")
    w1b, w2b = (torch.randn(2, columns, generator=generator) / 2 for _ in "ab")
    name = "lycoris_" + one.replace(".", "_")
    lora = {
        f"{name}.hada_w1_a": w1a,
        f"{name}.hada_w1_b": w1b,
        f"{name}.hada_w2_a": w2a,
        f"{name}.hada_w2_b": w2b,
    }
    n, k = weights[f"{other}.weight"].shape
    left, right = torch.randn(2, 2, generator=generator), torch.randn(n // 2, k // 2, generator=generator) / 9
    name = "lycoris_" + other.replace(".", "_")
    lora |= {f"{name}.lokr_w1": left, f"{name}.lokr_w2": right}
    save_file({k: v.contiguous() for k, v in lora.items()}, loras / "lycoris.safetensors")
    changed = {
        one: weights[f"{one}.weight"].float() + (w1a @ w1b) * (w2a @ w2b),
        other: weights[f"{other}.weight"].float() + torch.kron(left, right),
    }
    wanted = samples(comfy, lance(from_checkpoint(spliced("lycoris", changed))))
    assert away(picture(comfy, "lycoris.safetensors"), wanted) < 1e-5


@pytest.mark.parametrize("dtype", ["int8", "nvfp4"])
def test_a_lora_of_joined_layers_on_quantised_ones(comfy, loras, tmp_path_factory, dtype):
    """These are apart: what training and extraction call `qkv_proj` goes to its three parts."""
    import folder_paths

    folder = tmp_path_factory.mktemp(dtype)
    file = folder / f"names_{dtype}.safetensors"
    module(comfy, "lance_core.checkpoint.convert").convert(GOLDEN / "checkpoint" / CHECKPOINT, file, dtype)
    folder_paths.add_model_folder_path("lance", str(folder))
    generator = torch.Generator().manual_seed(6)
    whole, parts = {}, {}
    for owner in ("layers.1.self_attn", "understanding.layers.1.self_attn"):
        a = torch.randn(RANK, 64, generator=generator) / 4
        b = torch.randn(128, RANK, generator=generator) / 4
        whole |= {f"diffusion_model.{owner}.qkv_proj.lora_down.weight": a}
        whole |= {f"diffusion_model.{owner}.qkv_proj.lora_up.weight": b}
        whole |= {f"diffusion_model.{owner}.qkv_proj.alpha": torch.tensor(ALPHA)}
        for part, rows in {"q_proj": slice(0, 64), "k_proj": slice(64, 96), "v_proj": slice(96, 128)}.items():
            parts |= {f"diffusion_model.{owner}.{part}.lora_down.weight": a.clone()}
            parts |= {f"diffusion_model.{owner}.{part}.lora_up.weight": b[rows].clone()}
            parts |= {f"diffusion_model.{owner}.{part}.alpha": torch.tensor(ALPHA)}
    save_file(whole, loras / f"whole_{dtype}.safetensors")
    save_file(parts, loras / f"parts_{dtype}.safetensors")
    try:
        found = picture(comfy, f"whole_{dtype}.safetensors", checkpoint=file.name)
        assert torch.equal(found, picture(comfy, f"parts_{dtype}.safetensors", checkpoint=file.name))
        assert away(found, samples(comfy, lance(from_checkpoint(file.name)))) > 0.01
        both = picture(comfy, f"whole_{dtype}.safetensors")
        assert torch.equal(both, picture(comfy, f"parts_{dtype}.safetensors")) or (
            away(both, picture(comfy, f"parts_{dtype}.safetensors")) < 1e-5
        )
    finally:
        folder_paths.folder_names_and_paths["lance"][0].remove(str(folder))


REFUSED = {
    "another model's": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 64)},
        r"Nothing in the LoRA fits Lance.*double_blocks_0_img_attn_qkv",
    ),
    "another model's, with dots": (
        {f"transformer.blocks.{i}.attn1.to_q.lora_A.weight": (4, 64) for i in range(9)},
        r"transformer\.blocks\.0\.attn1\.to_q.* and 6 more",
    ),
    "no LoRA": ({"model.weight": (4, 4)}, "no LoRA that can be read.*model.weight"),
    "another size": (
        {
            "language_model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 2048),
            "language_model.model.layers.0.self_attn.q_proj.lora_B.weight": (2048, 4),
        },
        r"another size of model.*\[2048, 2048\].*\[64, 64\]",
    ),
    "a difference of another size": ({"diffusion_model.norm.diff": (2048,)}, "another size of model"),
    "two adapters": (
        {
            f"base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_{side}.{name}.weight": size
            for side, size in (("A", (4, 64)), ("B", (64, 4)))
            for name in ("one", "two")
        },
        "holds two LoRAs for understanding.layers.0.self_attn.q_proj",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_says_what_it_is_for(comfy, loras, case):
    shapes, says = REFUSED[case]
    file = f"refused_{abs(hash(case))}.safetensors"
    save_file({name: torch.ones(size) for name, size in shapes.items()}, loras / file)
    with pytest.raises(inprocess.NodeFailedError, match=f"(?s){says}") as caught:
        picture(comfy, file)
    assert len(caught.value.message) < 500


def test_a_hook_that_does_not_fit_says_so(comfy, loras):
    save_file({"blocks.0.to_q.lora_down.weight": torch.ones(4, 64)}, loras / "wrong_hook.safetensors")
    graph = t2i()
    graph["hook"] = node("CreateHookLoraModelOnly", lora_name="wrong_hook.safetensors", strength_model=1.0)
    pair = {"positive_NEW": ["text", 0], "negative_NEW": ["text", 1]}
    graph["hooked"] = node(
        "PairConditioningSetProperties", **pair, hooks=["hook", 0], strength=1.0, set_cond_area="default"
    )
    with pytest.raises(inprocess.NodeFailedError, match="Nothing in the LoRA fits Lance"):
        samples(comfy, ksampler(graph, positive=["hooked", 0], negative=["hooked", 1]))


def test_other_models_are_read_as_before(comfy):
    """And a second import of the pack does not stand in front of itself."""
    from comfy import lora as core

    mark = module(comfy, "nodes.comfy_compat").ORIGINAL
    original = getattr(core.load_lora, mark)
    module(comfy, "nodes.loras").install()
    assert getattr(core.load_lora, mark) is original
    assert not hasattr(original, mark)
    file = {"x.lora_up.weight": torch.ones(4, 2), "x.lora_down.weight": torch.ones(2, 4)}
    found, wanted = core.load_lora(file, {"x": "x.weight"}), original(file, {"x": "x.weight"})
    assert found.keys() == wanted.keys() and type(found["x.weight"]) is type(wanted["x.weight"])
    assert core.load_lora({}, {"x": "x.weight"}) == {}, "nor is a file refused that holds nothing for them"
