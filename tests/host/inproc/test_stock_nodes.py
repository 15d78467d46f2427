"""ComfyUI's own nodes with our MODEL, CONDITIONING, LATENT and VAE: what they do is what they are for."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from graphs import GOLDEN, node
from safetensors.torch import load_file, save_file
from small import (
    CHECKPOINT,
    MODEL,
    advanced,
    away,
    edit,
    i2v,
    ksampler,
    lance,
    module,
    question,
    samples,
    t2i,
    text,
)

POSITIVE, NEGATIVE = ["text", 0], ["text", 1]


# -- samplers and guiders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solution(comfy):
    """Where the flow of `t2i` leads from KSampler's noise, by many small steps."""
    return samples(comfy, ksampler(t2i(), cfg=1.0, steps=60, sampler_name="heun"))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "res_multistep", "uni_pc"])
def test_ksampler_solves_the_flow(comfy, solution, sampler):
    """Higher orders come nearer to the solution than euler does in as many steps."""
    euler = away(samples(comfy, ksampler(t2i(), cfg=1.0, steps=30)), solution)
    assert (
        away(samples(comfy, ksampler(t2i(), cfg=1.0, steps=30, sampler_name=sampler)), solution)
        < 0.95 * euler
        < 0.04
    )


@pytest.mark.parametrize(
    "sampler", ["euler", "heun", "dpmpp_2m", "res_multistep"]
)  # KSampler gives uni_pc a schedule of its own
def test_ksampler_and_custom_advanced_agree(comfy, sampler):
    graph = advanced(
        t2i(),
        node("CFGGuider", model=MODEL, positive=POSITIVE, negative=NEGATIVE, cfg=4.0),
        sampler,
        "RandomNoise",
    )
    graph["sigmas"] = node("BasicScheduler", model=MODEL, scheduler="simple", steps=4, denoise=1.0)
    assert away(samples(comfy, graph), samples(comfy, ksampler(t2i(), steps=4, sampler_name=sampler))) < 1e-6


def test_stock_guiders_guide_as_lance_sampler_does(comfy):
    """Lance Sampler's numbers are the golden ones; the stock guiders are its guidance without
    renormalisation, and none.
    """
    guided = samples(comfy, lance(t2i(), renorm="none"))
    both = {"model": MODEL, "negative": NEGATIVE}
    assert (
        away(samples(comfy, advanced(t2i(), node("CFGGuider", **both, positive=POSITIVE, cfg=4.0))), guided)
        < 1e-5
    )
    dual = node(
        "DualCFGGuider",
        **both,
        cond1=POSITIVE,
        cond2=NEGATIVE,
        cfg_conds=4.0,
        cfg_cond2_negative=1.0,
        style="regular",
    )
    assert away(samples(comfy, advanced(t2i(), dual)), guided) < 1e-5
    basic = samples(comfy, advanced(t2i(), node("BasicGuider", model=MODEL, conditioning=POSITIVE)))
    assert away(basic, samples(comfy, lance(t2i(), cfg=1.0))) < 1e-6
    assert away(basic, guided) > 0.01


def test_dual_guidance_over_three_prompts(comfy):
    graph = {
        **t2i(),
        "other": text("a blue boat"),
        "plain": node("ConditioningZeroOut", conditioning=["other", 0]),
    }
    dual = node(
        "DualCFGGuider",
        model=MODEL,
        cond1=POSITIVE,
        cond2=["other", 0],
        negative=["plain", 0],
        cfg_conds=2.0,
        cfg_cond2_negative=3.0,
        style="regular",
    )
    found = samples(comfy, advanced(graph, dual, steps=1))
    # One step is linear in the three predictions.
    one, two, none = (
        samples(comfy, advanced(graph, node("BasicGuider", model=MODEL, conditioning=c), steps=1))
        for c in (POSITIVE, ["other", 0], ["plain", 0])
    )
    assert away(found, two + 2 * (one - two) + (3 - 1) * (two - none)) < 1e-4


def test_denoise_starts_from_the_latent(comfy):
    first = samples(comfy, lance(t2i(), denoise=1.0))
    graph = {**lance(t2i()), "first": lance(t2i())["sampler"]}
    graph = ksampler(graph, latent_image=["first", 0], denoise=0.2, seed=1)
    assert 0.01 < away(samples(comfy, graph), first) < away(samples(comfy, ksampler(t2i(), seed=1)), first)


# -- patches of the model ------------------------------------------------------------------------------------


def test_model_sampling_sd3(comfy):
    graph = {**t2i(), "shift": node("ModelSamplingSD3", model=MODEL, shift=3.5)}
    plain = samples(comfy, ksampler(t2i()))
    assert torch.equal(samples(comfy, ksampler(graph, model=["shift", 0])), plain)
    graph["shift"]["inputs"]["shift"] = 8.0
    assert away(samples(comfy, ksampler(graph, model=["shift", 0])), plain) > 1e-3


LORA = {  # module -> the released weight it changes
    "gen": {
        "layers.0.self_attn.q_proj": "language_model.model.layers.0.self_attn.q_proj_moe_gen.weight",
        "layers.0.self_attn.k_proj": "language_model.model.layers.0.self_attn.k_proj_moe_gen.weight",
        "layers.1.mlp.up_proj": "language_model.model.layers.1.mlp_moe_gen.up_proj.weight",
        "layers.2.mlp.down_proj": "language_model.model.layers.2.mlp_moe_gen.down_proj.weight",
        "llm2vae": "llm2vae.weight",
    },
    "und": {
        "understanding.layers.1.self_attn.v_proj": "language_model.model.layers.1.self_attn.v_proj.weight",
        "understanding.layers.0.mlp.gate_proj": "language_model.model.layers.0.mlp.gate_proj.weight",
    },
}


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory):
    """A LoRA on each expert, and next to it a checkpoint with the same change merged into its weights."""
    import folder_paths

    merged = tmp_path_factory.mktemp("merged")
    folder_paths.add_model_folder_path("lance", str(merged))
    (base / "models" / "loras").mkdir(exist_ok=True)
    shutil.copytree(GOLDEN / "checkpoint" / "Qwen2.5-VL-ViT", merged / "Qwen2.5-VL-ViT")
    shutil.copy(GOLDEN / "checkpoint" / "Wan2.2_VAE.pth", merged)
    generator = torch.Generator().manual_seed(0)
    for name, changed in LORA.items():
        folder = shutil.copytree(GOLDEN / "checkpoint" / CHECKPOINT, merged / f"merged_{name}")
        weights, lora = load_file(folder / "model.safetensors"), {}
        for path, key in changed.items():
            rows, columns = weights[key].shape
            a, b = (
                torch.randn(4, columns, generator=generator) / 8,
                torch.randn(rows, 4, generator=generator) / 8,
            )
            lora |= {f"diffusion_model.{path}.lora_A.weight": a, f"diffusion_model.{path}.lora_B.weight": b}
            weights[key] = (weights[key].float() + 0.8 * b @ a).to(torch.float32)
        save_file(weights, folder / "model.safetensors")
        save_file(lora, base / "models" / "loras" / f"{name}.safetensors")
    yield
    folder_paths.folder_names_and_paths["lance"][0].remove(str(merged))


@pytest.mark.parametrize("expert", ["gen", "und"])
def test_lora_is_what_it_would_be_merged(comfy, loras, expert):
    plain = samples(comfy, lance(t2i()))

    def with_lora(strength):
        graph = {
            **t2i(),
            "lora": node(
                "LoraLoaderModelOnly", model=MODEL, lora_name=f"{expert}.safetensors", strength_model=strength
            ),
        }
        return samples(comfy, lance(graph, model=["lora", 0], seed=7))

    merged = t2i()
    merged["loader"]["inputs"]["checkpoint"] = f"merged_{expert}"
    changed = with_lora(0.8)
    assert away(changed, plain) > 0.01
    assert away(changed, samples(comfy, lance(merged))) < 1e-5
    assert torch.equal(with_lora(0.0), plain)
    # No context of the changed weights is left, nor any changed weight: same request, another seed in
    # between.
    samples(comfy, lance(t2i(), seed=8))
    comfy._executor.reset()
    assert torch.equal(samples(comfy, lance(t2i())), plain)


@pytest.mark.parametrize("expert", ["gen", "und"])
def test_lora_as_a_conditioning_hook_is_what_it_would_be_merged(comfy, loras, expert):
    """Hooks patch weights for one conditioning at a time, by other ways than a loader's LoRA."""
    merged = t2i()
    merged["loader"]["inputs"]["checkpoint"] = f"merged_{expert}"
    graph = t2i()
    graph["hook"] = node("CreateHookLoraModelOnly", lora_name=f"{expert}.safetensors", strength_model=0.8)
    pair = {"positive_NEW": ["text", 0], "negative_NEW": ["text", 1]}
    graph["hooked"] = node(
        "PairConditioningSetProperties", **pair, hooks=["hook", 0], strength=1.0, set_cond_area="default"
    )
    hooked = ksampler(graph, positive=["hooked", 0], negative=["hooked", 1])
    assert away(samples(comfy, hooked), samples(comfy, ksampler(merged))) < 1e-5
    assert away(samples(comfy, hooked), samples(comfy, ksampler(t2i()))) > 0.01


@pytest.mark.parametrize("expert", ["gen", "und"])
def test_a_hook_on_one_conditioning_leaves_the_other_alone(comfy, loras, expert):
    """On the positive only: the negative's prediction is that of the plain weights, in each step."""
    graph = t2i()
    graph["hook"] = node("CreateHookLoraModelOnly", lora_name=f"{expert}.safetensors", strength_model=0.8)
    graph["hooked"] = node(
        "ConditioningSetProperties",
        cond_NEW=["text", 0],
        hooks=["hook", 0],
        strength=1.0,
        set_cond_area="default",
    )
    one = samples(comfy, ksampler(graph, positive=["hooked", 0], cfg=4.0))
    merged = t2i()
    merged["loader"]["inputs"]["checkpoint"] = f"merged_{expert}"
    plain, both = samples(comfy, ksampler(t2i(), cfg=4.0)), samples(comfy, ksampler(merged, cfg=4.0))
    assert away(one, plain) > 0.01 and away(one, both) > 0.01
    # Without guidance only the positive counts.
    alone = samples(comfy, ksampler(graph, positive=["hooked", 0], cfg=1.0))
    assert away(alone, samples(comfy, ksampler(merged, cfg=1.0))) < 1e-5
    assert torch.equal(
        samples(comfy, ksampler(t2i(), cfg=4.0, seed=8)), samples(comfy, ksampler(t2i(), seed=8))
    )
    comfy._executor.reset()
    assert torch.equal(samples(comfy, ksampler(t2i(), cfg=4.0)), plain), "and nothing stays behind"


def test_lora_leaves_understanding_alone(comfy, loras):
    """A LoRA on the understanding expert belongs to the MODEL it was put on; LANCE answers as before."""
    answer = comfy.value(question(), "answer")
    graph = {
        **t2i(),
        "lora": node("LoraLoaderModelOnly", model=MODEL, lora_name="und.safetensors", strength_model=1.0),
    }
    samples(comfy, lance(graph, model=["lora", 0], seed=11))
    again = question()
    again["answer"]["inputs"]["seed"] = 1  # greedy: only there to run it again
    assert comfy.value(again, "answer") == answer


def easycache(threshold: float, batch: int):
    graph = {
        **t2i(batch=batch),
        "easy": node("EasyCache", model=MODEL, reuse_threshold=threshold, start_percent=0.0, end_percent=1.0),
    }
    graph["easy"]["inputs"]["verbose"] = False
    return graph


@pytest.mark.parametrize("batch", [1, 2])
def test_easycache(comfy, caplog, batch):
    plain = samples(comfy, lance(t2i(batch=batch), steps=12))
    assert away(samples(comfy, lance(easycache(0.0, batch), model=["easy", 0], steps=12)), plain) < 1e-5
    with caplog.at_level(logging.INFO):
        near = samples(comfy, lance(easycache(0.2, batch), model=["easy", 0], steps=12))
    skipped = [r.getMessage() for r in caplog.records if "EasyCache - skipped" in r.getMessage()]
    assert skipped and "skipped 0/" not in skipped[-1]
    assert 0 < away(near, plain) < 0.3


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_torch_compile(comfy, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path)
    )  # what another torch has compiled here may not suit this one
    graph = {**t2i(), "compiled": node("TorchCompileModel", model=MODEL, backend="inductor")}
    for cfg in (1.0, 4.0):
        assert (
            away(
                samples(comfy, lance(graph, model=["compiled", 0], cfg=cfg)),
                samples(comfy, lance(t2i(), cfg=cfg)),
            )
            < 1e-4
        )


# -- conditioning --------------------------------------------------------------------------------------------


def test_zero_out_is_the_trained_negative(comfy):
    graph = {**t2i(), "zero": node("ConditioningZeroOut", conditioning=POSITIVE)}
    plain = samples(comfy, lance(t2i()))
    assert torch.equal(samples(comfy, lance(graph, negative=["zero", 0])), plain)
    # Also when the encode brought a negative prompt, which then is left out.
    graph["text"] = text("a red fox", "rain")
    assert away(samples(comfy, lance({**t2i(), "text": graph["text"]})), plain) > 1e-3
    assert away(samples(comfy, lance(graph, negative=["zero", 0])), plain) < 1e-6


def test_combine_is_the_mean(comfy):
    graph = {**t2i(), "other": text("a blue boat")}
    graph["both"] = node("ConditioningCombine", conditioning_1=POSITIVE, conditioning_2=["other", 0])
    one, two, both = (
        samples(comfy, lance(graph, positive=c, cfg=1.0, steps=1))
        for c in (POSITIVE, ["other", 0], ["both", 0])
    )
    assert away(both, (one + two) / 2) < 1e-5
    assert away(one, two) > 1e-3


def test_timestep_ranges_hand_over(comfy):
    graph = {**t2i(), "other": text("a blue boat")}
    graph["early"] = node("ConditioningSetTimestepRange", conditioning=POSITIVE, start=0.0, end=0.5)
    graph["late"] = node("ConditioningSetTimestepRange", conditioning=["other", 0], start=0.5, end=1.0)
    graph["both"] = node("ConditioningCombine", conditioning_1=["early", 0], conditioning_2=["late", 0])
    found = samples(comfy, lance(graph, positive=["both", 0], cfg=1.0))
    # 0.5 is sigma 0.78; the three steps start at 1, 0.88 and 0.64.
    by_hand = advanced(graph, node("BasicGuider", model=MODEL, conditioning=POSITIVE))
    by_hand["split"] = node("SplitSigmas", sigmas=["sigmas", 0], step=2)
    by_hand["sampler"]["inputs"]["sigmas"] = ["split", 0]
    by_hand["then"] = node("BasicGuider", model=MODEL, conditioning=["other", 0])
    by_hand["silence"] = node("DisableNoise")
    by_hand["second"] = node("SamplerCustomAdvanced", **by_hand["sampler"]["inputs"])
    by_hand["second"]["inputs"] |= {
        "noise": ["silence", 0],
        "guider": ["then", 0],
        "sigmas": ["split", 1],
        "latent_image": ["sampler", 0],
    }
    assert away(found, samples(comfy, by_hand, "second")) < 1e-4


# -- VAE -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo():
    """128x96 of the photo in a graph, as "scaled"."""
    scaled = node(
        "ImageScale", image=["photo", 0], upscale_method="bilinear", width=128, height=96, crop="center"
    )
    return {**edit(), "scaled": scaled}


def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_vae_encode_and_decode(comfy, photo):
    graph = {**photo, "encoded": node("VAEEncode", pixels=["scaled", 0], vae=["loader", 2])}
    latent = samples(comfy, graph, "encoded")
    assert latent.shape == (1, 48, 1, 6, 8)
    graph["decoded"] = node("VAEDecode", samples=["encoded", 0], vae=["loader", 2])
    graph["ours"] = node("LanceVAEDecode", samples=["encoded", 0], vae=["loader", 2])
    decoded, ours = comfy.run(graph, [("decoded", 0), ("ours", 0)]).values
    assert decoded.shape == (1, 96, 128, 3) and torch.equal(decoded, ours)
    tiled = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    graph["tiles"] = node("VAEDecodeTiled", samples=["encoded", 0], vae=["loader", 2], **tiled)
    graph["whole"] = node(
        "VAEDecodeTiled", samples=["encoded", 0], vae=["loader", 2], **{**tiled, "tile_size": 512}
    )
    graph["in_tiles"] = node(
        "VAEEncodeTiled", pixels=["scaled", 0], vae=["loader", 2], **{**tiled, "overlap": 32}
    )
    tiles, whole, in_tiles = comfy.run(graph, [("tiles", 0), ("whole", 0), ("in_tiles", 0)]).values
    assert away(whole, decoded) < 1e-5
    assert (
        0.6 < alike(tiles, decoded) < 1
    )  # a tile here is four cells, and random weights blend everything they see
    assert in_tiles["samples"].shape == latent.shape
    assert alike(in_tiles["samples"], latent) > 0.8


def test_vae_takes_clips(comfy):
    """A batch of images is a clip, as for every video VAE; 4k+1 of its frames are encoded."""
    graph = {
        **edit(),
        "clip": node("LoadVideo", file="clip.mp4"),
        "parts": node("GetVideoComponents", video=["clip", 0]),
        "frames": node("ImageFromBatch", image=["parts", 0], batch_index=0, length=11),
        "encoded": node("VAEEncode", pixels=["frames", 0], vae=["loader", 2]),
        "first": node("ImageFromBatch", image=["parts", 0], batch_index=0, length=9),
        "nine": node("VAEEncode", pixels=["first", 0], vae=["loader", 2]),
        "decoded": node("VAEDecode", samples=["nine", 0], vae=["loader", 2]),
    }
    eleven, nine, decoded = comfy.run(graph, [("encoded", 0), ("nine", 0), ("decoded", 0)]).values
    assert nine["samples"].shape[2] == 3 and torch.equal(eleven["samples"], nine["samples"])
    assert len(decoded) == 9


def test_vae_save(comfy, base):
    graph = {**t2i(), "save": node("VAESave", vae=["loader", 2], filename_prefix="vae/saved")}
    comfy.run(graph)
    (saved,) = (base / "output" / "vae").glob("saved*.safetensors")
    released = torch.load(GOLDEN / "checkpoint" / "Wan2.2_VAE.pth", weights_only=True)
    written = load_file(saved)
    assert written.keys() == released.keys()
    assert all(torch.equal(written[k].float(), released[k].float()) for k in released)


# -- latents -------------------------------------------------------------------------------------------------


def test_wan_image_to_video_latent(comfy):
    graph = {
        **i2v(),
        "scaled": node(
            "ImageScale", image=["photo", 0], upscale_method="bilinear", width=96, height=64, crop="center"
        ),
    }
    graph["latent"]["inputs"]["start_image"] = ["scaled", 0]
    graph["wan"] = node(
        "Wan22ImageToVideoLatent",
        vae=["loader", 2],
        width=96,
        height=64,
        length=9,
        batch_size=1,
        start_image=["scaled", 0],
    )
    ours, theirs = comfy.run(graph, [("latent", 0), ("wan", 0)]).values
    # Ours goes by the picture's 8 bits, as the released code does.
    assert away(theirs["samples"], ours["samples"]) < 0.02
    assert torch.equal(theirs["noise_mask"].expand_as(ours["noise_mask"]), ours["noise_mask"])
    made = samples(comfy, ksampler(graph, latent_image=["wan", 0], sampler_name="uni_pc"))
    assert torch.equal(made[:, :, 0], theirs["samples"][:, :, 0])
    assert away(made[:, :, 1:], theirs["samples"][:, :, 1:]) > 0.1


@pytest.mark.parametrize("sampler", ["euler", "uni_pc"])
def test_inpainting_keeps_what_is_masked_out(comfy, photo, sampler):
    graph = {
        **photo,
        "text": text("a red fox"),
        "encoded": node("VAEEncode", pixels=["scaled", 0], vae=["loader", 2]),
        "black": node("SolidMask", value=0.0, width=128, height=96),
        "white": node("SolidMask", value=1.0, width=64, height=96),
        "mask": node(
            "MaskComposite", destination=["black", 0], source=["white", 0], x=64, y=0, operation="add"
        ),
        "latent": node("SetLatentNoiseMask", samples=["encoded", 0], mask=["mask", 0]),
    }
    before = samples(comfy, graph, "encoded")
    after = samples(comfy, ksampler(graph, sampler_name=sampler))
    assert torch.equal(after[..., :4], before[..., :4])
    assert away(after[..., 4:], before[..., 4:]) > 0.1


def test_repeated_latents_are_a_batch(comfy):
    graph = {**t2i(), "two": node("RepeatLatentBatch", samples=["latent", 0], amount=2)}
    found = samples(comfy, lance(graph, latent=["two", 0]))
    assert torch.equal(found, samples(comfy, lance(t2i(batch=2))))
    graph["second"] = node("LatentFromBatch", samples=["two", 0], batch_index=1, length=1)
    assert away(samples(comfy, lance(graph, latent=["second", 0])), found[1:]) < 1e-5


# -- files and text ------------------------------------------------------------------------------------------


def test_videos_survive_a_round_trip(comfy, base):
    graph = lance(i2v(), steps=1)
    graph["decoded"] = node("LanceVAEDecode", samples=["sampler", 0], vae=["loader", 2])
    graph["made"] = node("CreateVideo", images=["decoded", 0], fps=12.0)
    for name, link in (("theirs", ["made", 0]), ("ours", ["decoded", 1])):
        graph[f"save_{name}"] = node(
            "SaveVideo", video=link, filename_prefix=name, format="mp4", codec="h264"
        )
    images, made, ours = comfy.run(graph, [("decoded", 0), ("made", 0), ("decoded", 1)]).values
    made, ours = made.get_components(), ours.get_components()
    assert torch.equal(made.images, ours.images) and made.frame_rate == ours.frame_rate
    files = []
    for name in ("theirs", "ours"):
        (saved,) = (base / "output").glob(f"{name}*.mp4")
        shutil.copy(saved, base / "input" / f"{name}.mp4")
        loaded = {
            "load": node("LoadVideo", file=f"{name}.mp4"),
            "parts": node("GetVideoComponents", video=["load", 0]),
        }
        again, _, fps = comfy.run(loaded, [("parts", 0), ("parts", 1), ("parts", 2)]).values
        assert fps == 12 and again.shape == images.shape
        assert alike(again, images) > 0.4  # a random model's video is noise, which h264 keeps little of
        files.append(again)
    assert alike(*files) > 0.9  # x264's threads do not always agree to the bit


def test_pictures_and_answers_are_shown(comfy, base):
    graph = {**lance(t2i(), steps=1)}
    graph["decoded"] = node("VAEDecode", samples=["sampler", 0], vae=["loader", 2])
    graph["save"] = node("SaveImage", images=["decoded", 0], filename_prefix="picture")
    result = comfy.run(graph, [("decoded", 0)])
    from PIL import Image

    (file,) = result.ui["save"]["images"]
    with Image.open(base / "output" / file["filename"]) as saved:
        levels = torch.tensor(list(saved.getdata())).reshape(64, 64, 3) / 255
    assert float((levels - result.values[0][0]).abs().max()) <= 1 / 255 + 1e-6
    asked = {**question(), "show": node("PreviewAny", source=["answer", 0])}
    result = comfy.run(asked, [("answer", 0)])
    assert json.loads(json.dumps(result.ui["show"]["text"])) == [result.values[0]]


def test_the_module_helper_finds_the_pack(comfy):
    assert module(comfy, "lance_core.model.kv_cache").Context is not None
