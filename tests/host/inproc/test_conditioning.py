"""Stock nodes on Lance's conditionings: what each does is what it is for, or is refused with what to use."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from graphs import node
from inprocess import NodeFailedError
from small import MODEL, advanced, away, edit, i2v, ksampler, lance, samples, t2i, text

POSITIVE, NEGATIVE = ["text", 0], ["text", 1]


class TestCondition:
    """Values written into a conditioning, as nodes for other models do."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "write"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"conditioning": ("CONDITIONING",), "key": ("STRING", {}), "value": ("FLOAT", {})}
        }

    def write(self, conditioning, key, value):
        return ([[c[0], {**c[1], key: value}] for c in conditioning],)


class TestCrop:
    """Part of a LATENT, in cells; stock Latent Crop takes rows for columns where there are frames."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "crop"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        whole = ("INT", {})
        return {"required": {"samples": ("LATENT",), "x": whole, "y": whole, "columns": whole, "rows": whole}}

    def crop(self, samples, x, y, columns, rows):
        return ({"samples": samples["samples"][..., y : y + rows, x : x + columns].clone()},)


@pytest.fixture(autouse=True)
def helpers(comfy):
    comfy.nodes["TestCondition"] = TestCondition
    comfy.nodes["TestCrop"] = TestCrop


def refused(comfy, graph, words, at="sampler"):
    with pytest.raises(NodeFailedError) as caught:
        comfy.value(graph, at)
    assert caught.value.data["exception_type"].startswith("lance_core."), caught.value
    assert re.search(words, caught.value.message, re.DOTALL), caught.value.message


# -- arithmetic ----------------------------------------------------------------------------------------------


def two(width=64, height=64):
    return {**t2i(width=width, height=height), "other": text("a blue boat")}


def average(graph, strength, to=POSITIVE, source=("other", 0)):
    inputs = {"conditioning_to": to, "conditioning_from": list(source), "conditioning_to_strength": strength}
    return {**graph, "mixed": node("ConditioningAverage", **inputs)}


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 0.99])
def test_averages_are_refused(comfy, strength):
    """Whatever the weights: either prompt alone would not be the average."""
    words = "cannot be averaged.*Set Area Strength.*Combine"
    refused(comfy, lance(average(two(), strength), positive=["mixed", 0]), words)
    refused(comfy, ksampler(average(two(), strength), positive=["mixed", 0]), words)


def test_an_average_that_is_one_of_them(comfy):
    plain = samples(comfy, lance(t2i()))
    assert torch.equal(samples(comfy, lance(average(two(), 1.0), positive=["mixed", 0])), plain)
    same = average(two(), 0.3, source=POSITIVE)
    assert torch.equal(samples(comfy, lance(same, positive=["mixed", 0])), plain)


def test_averages_with_nothing_are_refused(comfy):
    zero = {**two(), "zero": node("ConditioningZeroOut", conditioning=["other", 0])}
    refused(comfy, lance(average(zero, 0.5, source=("zero", 0)), positive=["mixed", 0]), "cannot be averaged")


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
def test_multiples_are_refused(comfy, factor):
    graph = {**t2i(), "mixed": node("ConditioningMultiply", conditioning=POSITIVE, multiplier=factor)}
    if "ConditioningMultiply" not in comfy.nodes:
        pytest.skip("no such node in this ComfyUI")
    refused(comfy, lance(graph, positive=["mixed", 0]), "cannot be averaged or multiplied")
    graph["mixed"]["inputs"]["multiplier"] = 1.0
    assert torch.equal(samples(comfy, lance(graph, positive=["mixed", 0])), samples(comfy, lance(t2i())))


def test_concat_is_refused(comfy):
    graph = {
        **two(),
        "mixed": node("ConditioningConcat", conditioning_to=POSITIVE, conditioning_from=["other", 0]),
    }
    refused(comfy, ksampler(graph, positive=["mixed", 0]), "cannot be concatenated.*Combine")


def test_a_mix_with_another_models_is_refused(comfy):
    class Clip:
        RETURN_TYPES = ("CONDITIONING",)
        FUNCTION = "make"
        CATEGORY = "testing"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def make(self):
            return ([[torch.ones(1, 1, 768), {"pooled_output": torch.ones(1, 768)}]],)

    comfy.nodes["TestClip"] = Clip
    graph = average({**t2i(), "clip": node("TestClip")}, 0.5, source=("clip", 0))
    refused(comfy, lance(graph, positive=["mixed", 0]), "another model's: encode both")


@pytest.mark.parametrize("weight", [0.25, 2.0])
def test_combined_with_strengths_is_the_weighted_mean(comfy, weight):
    """The way that the refusal of an average names."""
    graph = two()
    graph["weighted"] = node("ConditioningSetAreaStrength", conditioning=POSITIVE, strength=weight)
    graph["both"] = node("ConditioningCombine", conditioning_1=["weighted", 0], conditioning_2=["other", 0])
    one, other, both = (
        samples(comfy, lance(graph, positive=c, cfg=1.0, steps=1))
        for c in (POSITIVE, ["other", 0], ["both", 0])
    )
    assert away(both, (weight * one + other) / (weight + 1)) < 1e-5
    assert away(one, other) > 1e-3


# -- what nodes for other models write -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("reference_latents", "Reference Latent.*Lance Vision Encode"),
        ("concat_latent_image", "WanImageToVideo.*Lance Image To Video Latent"),
        ("gligen", "GLIGEN.*Set Area"),
        ("clip_vision_output", "CLIP vision.*Lance Vision Encode"),
        ("unclip_conditioning", "unCLIPConditioning"),
        ("vace_frames", "WanVaceToVideo"),
        ("audio_embed", "sound"),
        ("camera_conditions", "WanCameraImageToVideo"),
        ("time_dim_concat", "Lance Vision Encode"),
        ("keyframe_idxs", "LTXVAddGuide"),
    ],
)
@pytest.mark.parametrize("where", ["positive", "negative"])
def test_what_changes_the_picture_elsewhere_is_refused(comfy, key, words, where):
    inputs = {"conditioning": POSITIVE if where == "positive" else NEGATIVE, "key": key, "value": 1.0}
    graph = {**t2i(), "written": node("TestCondition", **inputs)}
    refused(comfy, lance(graph, **{where: ["written", 0]}), f"{words}")
    refused(comfy, ksampler(graph, **{where: ["written", 0]}), f"'{key}' on the conditioning")


def test_reference_latent_node(comfy):
    graph = edit()
    graph["encoded"] = node("VAEEncode", pixels=["photo", 0], vae=["loader", 2])
    graph["reference"] = node("ReferenceLatent", conditioning=POSITIVE, latent=["encoded", 0])
    refused(
        comfy, lance(graph, positive=["reference", 0]), "Reference Latent.*show the picture to Lance Vision"
    )


def test_wan_image_to_video_node(comfy):
    graph = i2v()
    graph["wan"] = node(
        "WanImageToVideo",
        positive=POSITIVE,
        negative=NEGATIVE,
        vae=["loader", 2],
        width=96,
        height=64,
        length=9,
        batch_size=1,
        start_image=["photo", 0],
    )
    latent = node(
        "EmptyLanceLatent", size="custom", aspect="1:1", width=96, height=64, frames=9, batch_size=1
    )
    graph = lance({**graph, "latent": latent}, positive=["wan", 0], negative=["wan", 1])
    refused(comfy, graph, "WanImageToVideo.*Lance Image To Video Latent")


class TestControl:
    """A CONTROL_NET of no model, as far as the stock node and a sampler's preparations look into it."""

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        import comfy.controlnet

        return (comfy.controlnet.T2IAdapter(torch.nn.Identity(), 3, 8, "nearest-exact"),)


def test_controlnet_node(comfy):
    comfy.nodes["TestControl"] = TestControl
    graph = {**t2i(), "net": node("TestControl"), "photo": node("LoadImage", image="photo.png")}
    graph["applied"] = node(
        "ControlNetApplyAdvanced",
        positive=POSITIVE,
        negative=NEGATIVE,
        control_net=["net", 0],
        image=["photo", 0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    refused(
        comfy, lance(graph, positive=["applied", 0], negative=["applied", 1]), "ControlNet.*no control nets"
    )


def test_inpaint_model_conditioning_goes_by_its_noise_mask(comfy):
    """It writes what WanImageToVideo writes, and a noise mask, which is all Lance needs."""
    graph = edit()
    graph["text"] = text("a red fox")
    graph["scaled"] = node(
        "ImageScale", image=["photo", 0], upscale_method="bilinear", width=128, height=96, crop="center"
    )
    graph["black"] = node("SolidMask", value=0.0, width=128, height=96)
    graph["white"] = node("SolidMask", value=1.0, width=64, height=96)
    graph["mask"] = node(
        "MaskComposite", destination=["black", 0], source=["white", 0], x=64, y=0, operation="add"
    )
    graph["inpaint"] = node(
        "InpaintModelConditioning",
        positive=POSITIVE,
        negative=NEGATIVE,
        vae=["loader", 2],
        pixels=["scaled", 0],
        mask=["mask", 0],
        noise_mask=True,
    )
    chosen = {"positive": ["inpaint", 0], "negative": ["inpaint", 1], "latent": ["inpaint", 2]}
    before, after = comfy.run(lance(graph, **chosen), [("inpaint", 2), ("sampler", 0)]).values
    assert torch.equal(after["samples"][..., :4], before["samples"][..., :4])
    assert away(after["samples"][..., 4:], before["samples"][..., 4:]) > 0.1
    graph["inpaint"]["inputs"]["noise_mask"] = False
    refused(comfy, lance(graph, **chosen), "set a noise mask")


def told(caplog):
    return [r.getMessage() for r in caplog.records if "Lance ignores" in r.getMessage()]


def test_what_is_ignored_is_told_once_a_run(comfy, caplog):
    graph = {
        **t2i(),
        "flux": node("FluxGuidance", conditioning=POSITIVE, guidance=3.5),
        "odd": node("TestCondition", conditioning=NEGATIVE, key="zest", value=1.0),
    }
    with caplog.at_level(logging.WARNING):
        found = samples(comfy, lance(graph, positive=["flux", 0], negative=["odd", 0]))
    assert torch.equal(found, samples(comfy, lance(t2i())))
    assert len(told(caplog)) == 2
    assert any("'guidance'" in line and "FluxGuidance" in line for line in told(caplog))
    assert any("'zest'" in line for line in told(caplog))


def test_what_is_read_is_not_told(comfy, caplog):
    graph = {**two(), "mask": node("SolidMask", value=1.0, width=64, height=64)}
    graph["timed"] = node("ConditioningSetTimestepRange", conditioning=POSITIVE, start=0.0, end=0.9)
    graph["masked"] = node(
        "ConditioningSetMask",
        conditioning=["timed", 0],
        mask=["mask", 0],
        strength=1.0,
        set_cond_area="mask bounds",
    )
    graph["both"] = node("ConditioningCombine", conditioning_1=["masked", 0], conditioning_2=["other", 0])
    with caplog.at_level(logging.WARNING):
        samples(comfy, ksampler(graph, positive=["both", 0]))
        samples(comfy, lance(i2v()))
    assert not told(caplog)


# -- regions -------------------------------------------------------------------------------------------------


def area(x, y, width, height, source=POSITIVE, strength=1.0):
    """Set Area, in pixels."""
    return node(
        "ConditioningSetArea", conditioning=source, width=width, height=height, x=x, y=y, strength=strength
    )


def share(x, y, width, height, source=POSITIVE):
    return node(
        "ConditioningSetAreaPercentage",
        conditioning=source,
        width=width,
        height=height,
        x=x,
        y=y,
        strength=1.0,
    )


def mask(graph, x, y, width, height, of=(192, 128), bounds="mask bounds", source=POSITIVE):
    """`graph` with Set Mask as "region": a rectangle of white on black, in pixels."""
    return {
        **graph,
        "black": node("SolidMask", value=0.0, width=of[0], height=of[1]),
        "white": node("SolidMask", value=1.0, width=width, height=height),
        "mask": node(
            "MaskComposite", destination=["black", 0], source=["white", 0], x=x, y=y, operation="add"
        ),
        "region": node(
            "ConditioningSetMask",
            conditioning=source,
            mask=["mask", 0],
            strength=1.0,
            set_cond_area=bounds,
        ),
    }


def regional(width=192, height=128):
    """A latent to go on from (no noise, so that a part of it can be sampled alone), and two prompts."""
    graph = two(width, height)
    graph["started"] = lance(graph, cfg=1.0)["sampler"]
    graph = {**graph, "sampler": graph["started"]}
    return graph


def one_step(graph, positive, latent=("started", 0)):
    guider = node("BasicGuider", model=MODEL, conditioning=positive)
    graph = advanced({**graph}, guider, noise="LanceNoise")
    graph["noise"] = node("DisableNoise")
    graph["sigmas"] = node("LanceScheduler", steps=1, shift=3.5, denoise=0.5)
    graph["sampler"]["inputs"]["latent_image"] = list(latent)
    return graph


def alone(comfy, graph, positive, x, y, columns, rows):
    """One step on a part of the latent, in cells, and nothing else."""
    crop = node("TestCrop", samples=["started", 0], x=x, y=y, columns=columns, rows=rows)
    return samples(comfy, one_step({**graph, "crop": crop}, positive, ("crop", 0)))


def test_two_regions_each_get_their_prompt(comfy):
    """Left half a fox, right half a boat: exactly what each half gives alone, joined in the middle."""
    graph = regional()
    graph["left"] = area(0, 0, 96, 128)
    graph["right"] = area(96, 0, 96, 128, ["other", 0])
    graph["both"] = node("ConditioningCombine", conditioning_1=["left", 0], conditioning_2=["right", 0])
    found = samples(comfy, one_step(graph, ["both", 0]))
    left = alone(comfy, graph, POSITIVE, 0, 0, 6, 8)
    right = alone(comfy, graph, ["other", 0], 6, 0, 6, 8)
    assert away(found, torch.cat([left, right], dim=-1)) < 1e-5
    assert away(left, alone(comfy, graph, ["other", 0], 0, 0, 6, 8)) > 1e-3


REGIONS = {  # the same 64x64 pixels at (96, 32), however they are said; cells 6..9 by 2..5
    "pixels": (lambda graph: {**graph, "region": area(96, 32, 64, 64)}),
    "shares": (lambda graph: {**graph, "region": share(0.5, 0.25, 1 / 3, 0.5)}),
    "mask bounds": (lambda graph: mask(graph, 96, 32, 64, 64)),
    "mask of another size": (lambda graph: mask(graph, 48, 16, 32, 32, (96, 64))),
}


@pytest.mark.parametrize("how", REGIONS)
def test_a_region_is_where_it_was_set(comfy, how):
    graph = REGIONS[how](regional())
    graph["both"] = node("ConditioningCombine", conditioning_1=["region", 0], conditioning_2=["other", 0])
    found = samples(comfy, one_step(graph, ["both", 0]))
    background = samples(comfy, one_step(graph, ["other", 0]))
    changed = ((found - background).abs().amax(dim=(0, 1, 2)) > 1e-5).nonzero()
    assert changed.amin(0).tolist() == [2, 6] and changed.amax(0).tolist() == [5, 9], changed


def test_a_region_of_a_video_is_of_all_frames(comfy):
    graph = i2v()
    graph["other"] = text("a boat", target="video")
    for how in ("share", "mask"):
        chosen = (
            {**graph, "region": share(0.5, 0.0, 0.5, 1.0)}
            if how == "share"
            else mask(graph, 48, 0, 48, 64, (96, 64))
        )
        chosen["both"] = node(
            "ConditioningCombine", conditioning_1=["region", 0], conditioning_2=["other", 0]
        )
        found = samples(comfy, lance(chosen, positive=["both", 0], cfg=1.0, steps=1))
        plain = samples(comfy, lance(chosen, positive=["other", 0], cfg=1.0, steps=1))
        changed = (found - plain).abs().amax(dim=(0, 1, 3)) > 1e-4
        assert changed[1:, 3:].all() and not changed[:, :3].any() and not changed[0].any(), how


def test_masks_for_each_frame(comfy):
    """A mask a frame: where it is black, the other prompt rules alone."""
    graph = mask({**i2v(), "other": text("a boat", target="video")}, 0, 0, 96, 64, (96, 64), "default")
    graph["five"] = node("RepeatImageBatch", image=["picture", 0], amount=5)
    graph["picture"] = node("MaskToImage", mask=["mask", 0])
    graph["dark"] = node("EmptyImage", width=96, height=64, batch_size=4, color=0)
    graph["clip"] = node("ImageBatch", image1=["five", 0], image2=["dark", 0])
    graph["masks"] = node("ImageToMask", image=["clip", 0], channel="red")
    graph["region"]["inputs"]["mask"] = ["masks", 0]
    graph["both"] = node("ConditioningCombine", conditioning_1=["region", 0], conditioning_2=["other", 0])
    found = samples(comfy, lance(graph, positive=["both", 0], cfg=1.0, steps=1))
    plain = samples(comfy, lance(graph, positive=["other", 0], cfg=1.0, steps=1))
    changed = (found - plain).abs().amax(dim=(0, 1, 3, 4)) > 1e-4
    assert changed.tolist() == [False, True, False]  # the first is the picture that is kept
    graph["dark"]["inputs"]["batch_size"] = 2
    refused(comfy, lance(graph, positive=["both", 0]), "7 masks.*video of 9 frames.*one mask for all")


def test_masks_that_context_windows_would_cut_wrongly(comfy):
    """They take a mask's third axis for time, which is its rows: refused where it would show."""
    graph = mask({**i2v(), "other": text("a boat", target="video")}, 48, 0, 48, 64, (96, 64))
    given = {"context_length": 5, "context_overlap": 1, "context_schedule": "standard_static", "dim": 2}
    given |= {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "freenoise": False}
    given |= {"cond_retain_index_list": "", "split_conds_to_windows": False, "causal_window_fix": False}
    given |= {"latent_retain_index_list": ""}
    known = {i.id for i in comfy.nodes["ContextWindowsManual"].define_schema().inputs}
    given = {name: value for name, value in given.items() if name in known}
    graph["windows"] = node("ContextWindowsManual", model=MODEL, **given)
    graph["both"] = node("ConditioningCombine", conditioning_1=["region", 0], conditioning_2=["other", 0])
    chosen = {"model": ["windows", 0], "positive": ["both", 0]}
    refused(comfy, lance(graph, **chosen), "Context windows cannot cut the mask")


def test_areas_share_their_edges(comfy):
    """Edges that fall between cells are rounded alike on both sides: no cell is without a prompt."""
    graph = regional()
    graph["left"] = area(0, 0, 88, 128)  # 5.5 cells
    graph["right"] = area(88, 0, 104, 128, ["other", 0])
    graph["both"] = node("ConditioningCombine", conditioning_1=["left", 0], conditioning_2=["right", 0])
    found = samples(comfy, one_step(graph, ["both", 0]))
    joined = [
        alone(comfy, graph, POSITIVE, 0, 0, 6, 8),
        alone(comfy, graph, ["other", 0], 6, 0, 6, 8),
    ]
    assert away(found, torch.cat(joined, dim=-1)) < 1e-5


def test_shares_of_a_video_are_in_our_cells_too(comfy):
    """The stock node for videos says frames as well; the same half as the one for pictures says."""
    graph = {**i2v(), "other": text("a boat", target="video"), "half": share(0.5, 0.0, 0.5, 1.0)}
    inputs = {"width": 0.5, "height": 1.0, "temporal": 1.0, "x": 0.5, "y": 0.0, "z": 0.0, "strength": 1.0}
    graph["video"] = node("ConditioningSetAreaPercentageVideo", conditioning=POSITIVE, **inputs)
    found = []
    for region in ("half", "video"):
        both = node("ConditioningCombine", conditioning_1=[region, 0], conditioning_2=["other", 0])
        found.append(samples(comfy, lance({**graph, "both": both}, positive=["both", 0], cfg=1.0, steps=1)))
    assert torch.equal(*found)


def test_an_area_past_the_edge_is_cut_and_one_outside_refused(comfy):
    graph = {**regional(), "region": area(128, 64, 640, 640)}
    cut = {**graph, "region": area(128, 64, 64, 64)}
    assert torch.equal(
        samples(comfy, one_step(graph, ["region", 0])), samples(comfy, one_step(cut, ["region", 0]))
    )
    for region in (area(192, 0, 64, 64), area(0, 512, 64, 64), share(1.0, 0.0, 0.5, 0.5)):
        refused(
            comfy,
            lance({**t2i(width=192, height=128), "region": region}, positive=["region", 0]),
            "outside of the picture, which is 192x128",
        )


def test_an_empty_mask_does_nothing(comfy):
    graph = mask(regional(), 0, 0, 16, 16)
    graph["white"]["inputs"]["value"] = 0.0
    graph["both"] = node("ConditioningCombine", conditioning_1=["region", 0], conditioning_2=["other", 0])
    found = samples(comfy, one_step(graph, ["both", 0]))
    assert away(found, samples(comfy, one_step(graph, ["other", 0]))) < 1e-6


def test_edits_take_masks_and_no_areas(comfy):
    graph = edit()
    graph["other"] = text("make it night", vision=["vision", 0])
    region = {**graph, "region": area(0, 0, 64, 64)}
    refused(comfy, lance(region, positive=["region", 0]), "area: use Conditioning .Set Mask")
    graph = mask(graph, 0, 0, 152, 224, (304, 224), "default")
    graph["both"] = node("ConditioningCombine", conditioning_1=["region", 0], conditioning_2=["other", 0])
    found = samples(comfy, lance(graph, positive=["both", 0], cfg=1.0, steps=1))
    night, blue = (
        samples(comfy, lance(graph, positive=c, cfg=1.0, steps=1)) for c in (["other", 0], POSITIVE)
    )
    assert away(found[..., 10:], night[..., 10:]) < 1e-5  # the mask ends in column 9
    assert away(found[..., :9], (blue + night)[..., :9] / 2) < 1e-5
    assert away(blue, night) > 1e-3


def test_regions_guide_against_the_negative(comfy):
    """Each region's guidance is against the negative of the same region."""
    graph = regional()
    graph["left"] = area(0, 0, 96, 128)
    graph["right"] = area(96, 0, 96, 128, ["other", 0])
    graph["both"] = node("ConditioningCombine", conditioning_1=["left", 0], conditioning_2=["right", 0])

    def guided(positive, latent):
        stepped = one_step(graph | {"crop": crop}, positive, latent)
        stepped["guider"] = node("CFGGuider", model=MODEL, positive=positive, negative=NEGATIVE, cfg=4.0)
        return samples(comfy, stepped)

    crop = node("TestCrop", samples=["started", 0], x=0, y=0, columns=6, rows=8)
    left = guided(POSITIVE, ("crop", 0))
    found = guided(["both", 0], ("started", 0))
    # The negative is of the whole and of each region; where it is whole, its mean with the region's counts.
    assert found.shape[-1] == 12 and bool(torch.isfinite(found).all())
    assert away(found[..., :6], left) < 0.5


# -- a second prompt and a second pass -----------------------------------------------------------------------


def test_an_empty_prompt_names_the_negative_output(comfy):
    graph = {**t2i(), "nothing": text("  ")}
    refused(comfy, lance(graph, negative=["nothing", 0]), "prompt is empty.*`negative` output", "sampler")


def second_pass(size_from=True):
    """An edit at 304x224, its latent one and a half times as large, and 10 % of the way once more."""
    graph = lance(edit())
    graph["first"] = graph.pop("sampler")
    graph["large"] = node("LatentUpscaleBy", samples=["first", 0], upscale_method="bilinear", scale_by=1.5)
    graph["again"] = {**graph["vision"], "inputs": dict(graph["vision"]["inputs"])}
    if size_from:
        graph["again"]["inputs"]["size_from"] = ["large", 0]
    graph["prompt"] = text("paint it blue", vision=["again", 0])
    chosen = {"positive": ["prompt", 0], "negative": ["prompt", 1], "latent": ["large", 0]}
    return lance(graph, **chosen, denoise=0.3)


def test_hires_fix_of_an_edit(comfy):
    found = samples(comfy, second_pass())
    assert found.shape[-2:] == (21, 28)  # 14 x 19 cells, half as many again
    assert 0.001 < away(found, comfy.value(second_pass(), "large")["samples"]) < 1


def test_hires_fix_without_it_says_how(comfy):
    refused(
        comfy, second_pass(False), "448x336.*encoded as 304x224.*size_from of another Lance Vision Encode"
    )


def test_size_from_is_for_edits(comfy):
    graph = second_pass()
    graph["again"]["inputs"]["role"] = "subject reference"
    refused(comfy, graph, "size_from is for an edit source only", "again")


def test_size_from_its_own_latent_changes_nothing(comfy):
    graph = edit()
    graph["again"] = {**graph["vision"], "inputs": {**graph["vision"]["inputs"], "size_from": ["vision", 1]}}
    graph["prompt"] = text("paint it blue", vision=["again", 0])
    found = samples(comfy, lance(graph, positive=["prompt", 0], negative=["prompt", 1]))
    assert torch.equal(found, samples(comfy, lance(edit())))
