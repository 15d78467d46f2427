"""What Lance cannot do is refused in a sentence that says what to do instead."""

from __future__ import annotations

import re

import pytest
from graphs import node
from inprocess import NodeFailedError, RejectedError
from small import (
    CHECKPOINT,
    MODEL,
    VIDEO_CHECKPOINT,
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


class TestForeign:
    """MODEL, CONDITIONING, VAE and LATENT of another family, as real as they must be to be connected."""

    RETURN_TYPES = ("MODEL", "CONDITIONING", "VAE", "LATENT", "LATENT")
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        import comfy.model_patcher
        import torch

        model = torch.nn.Linear(2, 2)
        patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
        vae = type("OtherVAE", (), {"latent_channels": 16, "encode": None, "decode": None})()
        four, other = torch.ones(1, 4, 8, 8), torch.ones(1, 16, 1, 8, 8)
        return (
            patcher,
            [[torch.ones(1, 77, 768), {"pooled_output": None}]],
            vae,
            {"samples": four},
            {"samples": other},
        )


def with_foreign(graph, change):
    graph = {**graph, "foreign": node("TestForeign")}
    for where, output in change.items():
        at, name = where.split(".")
        graph[at] = {**graph[at], "inputs": {**graph[at]["inputs"], name: ["foreign", output]}}
    return graph


def changed(graph, at, **inputs):
    """`graph` with inputs of one node changed; None takes one away."""
    merged = {**graph[at]["inputs"], **inputs}
    return {**graph, at: {**graph[at], "inputs": {k: v for k, v in merged.items() if v is not None}}}


def video_source(graph, role="edit source"):
    graph = {**graph, "clip": node("LoadVideo", file="clip.mp4")}
    graph = changed(graph, "vision", image=None, video=["clip", 0], role=role, resolution="video_192p")
    return changed(graph, "loader", checkpoint=VIDEO_CHECKPOINT)


def on_video_checkpoint(graph):
    return changed(graph, "loader", checkpoint=VIDEO_CHECKPOINT)


def decode(graph):
    return {**graph, "decoded": node("LanceVAEDecode", vae=["loader", 2], samples=["latent", 0])}


def two_pictures(graph):
    graph = {**graph, "first": graph["vision"]}
    return changed(graph, "vision", earlier=["first", 0])


BATCH = node("RepeatImageBatch", image=["photo", 0], amount=3)
EMPTY = node("EmptyLanceLatent", size="custom", aspect="1:1", width=64, height=64, frames=9, batch_size=1)
LARGE = node("LatentUpscaleBy", samples=["small", 0], upscale_method="nearest-exact", scale_by=8.0)

# name -> (graph, node to run, words of the sentence: what came, and what to do)
REFUSED = {
    "image source to text-to-video": (
        on_video_checkpoint(changed(edit(), "text", target="video")),
        "text",
        "set target to image.*Lance Image To Video",
    ),
    "video to image edit": (video_source(edit()), "text", "set target to video"),
    "image checkpoint makes no video": (
        changed(t2i(), "text", target="video"),
        "text",
        "Lance_3B is the image checkpoint.*load Lance_3B_Video",
    ),
    "image checkpoint reads no video": (
        changed(video_source(edit()), "loader", checkpoint=CHECKPOINT),
        "vision",
        "cannot read video.*Lance_3B_Video",
    ),
    "video as subject": (video_source(edit(), "subject reference"), "vision", "take a frame of the video"),
    "latent of another size than the source": (
        lance({**edit(), "latent": t2i()["latent"]}),
        "sampler",
        "64x64.*encoded as 304x224.*LATENT output of Lance Vision Encode",
    ),
    "stock sampler, too": (
        ksampler({**edit(), "latent": t2i()["latent"]}),
        "sampler",
        "connect the LATENT output",
    ),
    "video latent for an image": (
        lance({**t2i(), "latent": EMPTY}),
        "sampler",
        "encoded for an image: set Lance Text Encode's target",
    ),
    "latent too large": (
        ksampler({**t2i(), "small": t2i(width=256, height=256)["latent"], "latent": LARGE}),
        "sampler",
        "1024 pixels.*smaller and upscale",
    ),
    "another model": (
        with_foreign(lance(t2i()), {"sampler.model": 0}),
        "sampler",
        "connect the MODEL of Lance Loader",
    ),
    "another conditioning": (
        with_foreign(lance(t2i()), {"sampler.positive": 1}),
        "sampler",
        "encode the prompt with Lance Text Encode",
    ),
    "another negative": (
        with_foreign(ksampler(t2i()), {"sampler.negative": 1}),
        "sampler",
        "encode the prompt with Lance Text Encode",
    ),
    "another VAE for a picture": (
        with_foreign(edit(), {"vision.vae": 2}),
        "vision",
        "not Wan2.2's: connect the VAE of Lance Loader",
    ),
    "another VAE for a start image": (
        with_foreign(i2v(), {"latent.vae": 2}),
        "latent",
        "connect the VAE of Lance Loader",
    ),
    "another VAE to decode with": (
        with_foreign(decode(t2i()), {"decoded.vae": 2}),
        "decoded",
        "connect the VAE of Lance Loader",
    ),
    "another latent": (
        with_foreign(lance(t2i()), {"sampler.latent": 4}),
        "sampler",
        "use Empty Lance Latent",
    ),
    "another latent for a stock sampler": (
        with_foreign(ksampler(t2i()), {"sampler.latent_image": 4}),
        "sampler",
        "use Empty Lance Latent",
    ),
    "another latent to decode": (
        with_foreign(decode(t2i()), {"decoded.samples": 3}),
        "decoded",
        "48 channels.*sampler",
    ),
    "empty prompt": (changed(t2i(), "text", prompt="  "), "text", "prompt is empty.*say what is wanted"),
    "empty question": (question(" "), "answer", "question is empty"),
    "question to text encode": (
        changed(edit(), "vision", role="question", vae=None),
        "text",
        "role 'question': connect it to Lance Understand",
    ),
    "edit source to understand": (
        changed(question(), "vision", role="edit source", vae=["loader", 2]),
        "answer",
        "set it to 'question'",
    ),
    "another loader's vision": (
        changed(
            {**edit(), "video": node("LanceLoader", checkpoint=VIDEO_CHECKPOINT, weight_dtype="default")},
            "text",
            lance=["video", 1],
        ),
        "text",
        "use one Lance Loader for both",
    ),
    "two pictures to edit": (two_pictures(edit()), "vision", "only subject references can be appended"),
    "another role than before": (
        changed(two_pictures(edit()), "first", role="subject reference"),
        "vision",
        "use one role",
    ),
    "no picture": (changed(edit(), "vision", image=None), "vision", "Connect an image or a video"),
    "no VAE": (changed(edit(), "vision", vae=None), "vision", "Connect a VAE"),
    "several start images": (
        changed({**i2v(), "three": BATCH}, "latent", start_image=["three", 0]),
        "latent",
        "3 images.*connect one",
    ),
    "guidance from end to start": (
        lance(t2i(), cfg_start=0.2, cfg_end=0.6),
        "sampler",
        "cfg_end 0.6 is above cfg_start 0.2",
    ),
    "no such checkpoint": (
        changed(t2i(), "loader", checkpoint="Lance_9B"),
        "loader",
        "Lance_9B.*(models/lance|not in)",
    ),
    "concatenated prompts": (
        lance(
            {
                **t2i(),
                "both": node(
                    "ConditioningConcat", conditioning_to=["text", 0], conditioning_from=["text", 1]
                ),
            },
            positive=["both", 0],
        ),
        "sampler",
        "cannot be concatenated.*Combine",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_way_out(comfy, name):
    comfy.nodes["TestForeign"] = TestForeign
    graph, at, words = REFUSED[name]
    with pytest.raises((NodeFailedError, RejectedError)) as caught:
        comfy.run(graph, [(at, 0)])
    if isinstance(caught.value, NodeFailedError):
        said = caught.value.message
        assert caught.value.data["exception_type"].rpartition(".")[2] in (
            "RequestError",
            "CheckpointError",
        ), caught.value
    else:
        said = str(caught.value.node_errors)
    assert re.search(words, said, re.DOTALL), said


def test_no_checkpoint_at_all(comfy, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "lance", ([str(tmp_path)], set()))
    with pytest.raises(RejectedError) as caught:
        comfy.run(changed(t2i(), "loader", checkpoint=""), [("loader", 0)])
    said = str(caught.value.node_errors)
    assert (
        "No Lance checkpoint found" in said
        and str(tmp_path) in said
        and "huggingface.co/bytedance-research/Lance" in said
        and "HF_ENDPOINT=https://hf-mirror.com" in said
    )


def test_damaged_checkpoint(comfy, monkeypatch, tmp_path):
    import shutil

    import folder_paths
    from graphs import GOLDEN

    shutil.copytree(GOLDEN / "checkpoint", tmp_path / "lance")
    file = tmp_path / "lance" / CHECKPOINT / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "lance", ([str(tmp_path / "lance")], set()))
    comfy.forget()
    with pytest.raises(NodeFailedError, match="(?i)incomplete|truncated|damaged|again"):
        comfy.run(t2i(), [("loader", 0)])


def test_a_refusal_changes_nothing(comfy):
    good = samples(comfy, lance(t2i()))
    with pytest.raises(NodeFailedError):
        comfy.run(lance({**edit(), "latent": t2i()["latent"]}), [("sampler", 0)])
    comfy._executor.reset()
    assert (samples(comfy, lance(t2i())) == good).all()


def test_mask_of_another_image(comfy):
    graph = {**edit(), "other": node("SolidMask", value=0.5, width=32, height=32)}
    with pytest.raises(
        NodeFailedError, match="The mask is 32x32 and the image .*connect the mask of the same image"
    ):
        comfy.run(changed(graph, "vision", mask=["other", 0]), [("vision", 0)])


def test_numbers_that_are_none(comfy):
    """A VAE or model that gives NaN is told from a picture that is bad."""
    comfy.nodes["TestNaN"] = _NaN
    with pytest.raises(NodeFailedError, match="image has NaN or infinity"):
        comfy.run(changed({**edit(), "nan": node("TestNaN")}, "vision", image=["nan", 0]), [("vision", 0)])


class _NaN:
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        import torch

        return (torch.full((1, 64, 64, 3), float("nan")),)


def test_two_encodes_can_be_mixed(comfy):
    """Positive of one encode with the negative of another is no error."""
    samples(comfy, lance({**t2i(), "other": text("a boat", "rain")}, negative=["other", 1], model=MODEL))


def test_a_refused_clip_is_never_opened(comfy, monkeypatch):
    """The image checkpoint cannot read video: said before a frame of it is decoded."""
    media, opened = module(comfy, "lance_core.inputs.media"), []
    monkeypatch.setattr(media, "read_clip", lambda *args, **kwargs: opened.append(args))
    graph = changed(video_source(edit()), "loader", checkpoint=CHECKPOINT)
    with pytest.raises(NodeFailedError, match="cannot read video"):
        comfy.value(graph, "vision")
    assert not opened


def test_errors_have_a_short_name(comfy):
    """ComfyUI shows the exception's module before its message; ours would be a path of files."""
    with pytest.raises(NodeFailedError) as caught:
        comfy.value(changed(t2i(), "text", prompt=" "), "text")
    assert caught.value.data["exception_type"] == "lance_core.RequestError"


# -- what a person connects or a program queues
# ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "name", "value", "words"),
    [
        ("sampler", "model", 5, "'model' holds 5.*MODEL of Lance Loader"),
        ("sampler", "positive", "a fox", "'positive' holds 'a fox'.*Lance Text Encode"),
        ("sampler", "latent", {"samples": None}, "'latent' holds.*Empty Lance Latent"),
        ("sampler", "renorm", "loud", "'renorm' is 'loud', expected one of global, channel, none"),
        ("sampler", "sampler", "magic", "'sampler' is 'magic', expected one of"),
        ("latent", "size", "huge", "'size' is 'huge', expected one of image_768res"),
        ("latent", "aspect", "5:1", "'aspect' is '5:1'"),
        ("text", "lance", 1.5, "'lance' holds 1.5.*LANCE of Lance Loader"),
        ("text", "target", "sound", "'target' is 'sound', expected one of image, video"),
        ("loader", "weight_dtype", "int3", "'weight_dtype' is 'int3', expected one of default"),
    ],
)
def test_constants_and_unknown_choices(comfy, at, name, value, words):
    """Either ComfyUI refuses the prompt itself, or the node does in a sentence."""
    graph = changed(lance(t2i()), at, **{name: value})
    if at == "latent" and name == "aspect":
        graph = changed(graph, "latent", size="image_768res")
    with pytest.raises((NodeFailedError, RejectedError)) as caught:
        comfy.value(graph, "sampler")
    if isinstance(caught.value, NodeFailedError):
        assert caught.value.data["exception_type"] == "lance_core.RequestError"
        assert re.search(words, caught.value.message, re.DOTALL) and len(caught.value.message) < 500


class TestPictures:
    """IMAGE and MASK of any kind that other packs are known to give."""

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"which": ("STRING", {}), "masks": ("INT", {"default": 0})}}

    def make(self, which, masks):
        import torch

        g = torch.Generator().manual_seed(0)
        picture = (torch.rand(1, 48, 64, 3, generator=g) * 255).round()
        made = {
            "0..1": picture / 255,
            "0..255": picture,
            "uint8": picture.to(torch.uint8),
            "-1..1": picture / 127.5 - 1,
            "grey": picture[..., :1] / 255,
            "alpha": torch.cat([picture, torch.full_like(picture[..., :1], 255)], -1) / 255,
            "two": torch.cat([picture, picture]) / 255,
            "none": picture[:0],
            "nan": picture / 0 - picture / 0,
        }[which]
        return made, torch.zeros(max(masks, 1), 48, 64).index_fill(1, torch.arange(10), float(masks > 0))


@pytest.fixture
def pictures(comfy, monkeypatch):
    """seen(kind, masks) -> what the model sees of it."""
    monkeypatch.setitem(comfy.nodes, "TestPictures", TestPictures)

    def seen(kind: str, masks: int = 0, **inputs):
        graph = {**edit(), "made": node("TestPictures", which=kind, masks=masks)}
        mask = ["made", 1] if masks else None
        graph = changed(graph, "vision", image=["made", 0], mask=mask, resolution="image_256res", **inputs)
        return comfy.value(graph, "vision")

    return seen


def test_every_range_of_the_same_picture_is_the_same_picture(pictures):
    import torch

    plain = pictures("0..1").segments[0].data
    for kind in ("0..255", "uint8", "-1..1", "alpha"):
        torch.testing.assert_close(pictures(kind).segments[0].data, plain)
    assert pictures("grey").segments[0].data.shape == plain.shape


def test_masks_of_other_counts(pictures):
    import torch

    one = pictures("0..1", 1).segments[0].data
    assert not torch.equal(one, pictures("0..1").segments[0].data), "the mask shows white"
    with pytest.raises(NodeFailedError, match="2 masks came for 1 image"):
        pictures("0..1", 2)


@pytest.mark.parametrize(("kind", "words"), [("none", "image input is empty"), ("nan", "NaN")])
def test_pictures_that_are_none(pictures, kind, words):
    with pytest.raises(NodeFailedError, match=words) as caught:
        pictures(kind)
    assert caught.value.data["exception_type"].startswith("lance_core.")


@pytest.fixture
def hurt(comfy, monkeypatch):
    """TestForeign's MODEL is Lance with a LoRA that has NaN in it."""
    import torch

    model = comfy.value(t2i(), "loader").clone()
    key = "diffusion_model.layers.1.mlp.down_proj.weight"
    shape = model.model.state_dict()[key].shape
    assert model.add_patches({key: ("diff", (torch.full(shape, float("nan")),))}, 1.0)
    comfy.nodes["TestForeign"] = TestForeign
    monkeypatch.setattr(TestForeign, "make", lambda self: (model, None, None, None, None))


@pytest.mark.parametrize("sampler", [lance, ksampler])
def test_nan_is_told_and_what_is_at_fault(comfy, hurt, sampler):
    """Any sampler names the LoRA, so that no node after it makes a black picture."""
    bad = with_foreign(sampler(t2i()), {"sampler.model": 0})
    for decoder in (None, "LanceVAEDecode", "VAEDecode"):
        if decoder:
            bad["decoded"] = node(decoder, vae=["loader", 2], samples=["sampler", 0])
        with pytest.raises(
            NodeFailedError, match="a LoRA on diffusion_model.layers.1.mlp.down_proj.weight has NaN"
        ):
            comfy.value(bad, "decoded" if decoder else "sampler")


class TestLatent:
    """A LATENT of a given shape, filled with a value."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"shape": ("STRING", {}), "value": ("FLOAT", {})}}

    def make(self, shape, value):
        import torch

        return ({"samples": torch.full(tuple(map(int, shape.split(","))), value)},)


TILED = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
DECODERS = {"LanceVAEDecode": {}, "VAEDecode": {}, "VAEDecodeTiled": TILED}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("shape", "value", "words"),
    [
        ("1,48,1,4,4", float("nan"), "latent has NaN or infinity.*decode to black"),
        ("1,48,1,8,8", float("inf"), "latent has NaN or infinity"),
        ("1,4,8,8", 1.0, r"shape \[1, 4, 8, 8\].*48 channels.*sampler that ran Lance"),
        ("1,16,3,8,8", 1.0, "48 channels.*sampler that ran Lance"),
        ("1,128,8,8", 0.0, "48 channels"),
        ("1,64,100", 0.0, r"shape \[1, 64, 100\]"),
    ],
)
def test_what_cannot_be_decoded(comfy, decoder, shape, value, words):
    comfy.nodes["TestLatent"] = TestLatent
    graph = {**t2i(), "other": node("TestLatent", shape=shape, value=value)}
    graph["decoded"] = node(decoder, vae=["loader", 2], samples=["other", 0], **DECODERS[decoder])
    with pytest.raises(NodeFailedError, match=words) as caught:
        comfy.value(graph, "decoded")
    assert caught.value.data["exception_type"].startswith("lance_core."), caught.value


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_latent_without_frames_is_a_picture(comfy, decoder):
    """48 channels and no time axis, as image nodes may leave it."""
    comfy.nodes["TestLatent"] = TestLatent
    graph = {**t2i(), "four": node("TestLatent", shape="1,48,4,4", value=0.5)}
    graph["five"] = node("TestLatent", shape="1,48,1,4,4", value=0.5)
    graph["flat"] = node(decoder, vae=["loader", 2], samples=["four", 0], **DECODERS[decoder])
    graph["whole"] = node(decoder, vae=["loader", 2], samples=["five", 0], **DECODERS[decoder])
    flat, whole = comfy.run(graph, [("flat", 0), ("whole", 0)]).values
    assert flat.reshape(whole.shape[-3:]).equal(whole.reshape(whole.shape[-3:]))


def test_the_loader_runs_again_when_a_missing_part_is_put_there(comfy, tmp_path, monkeypatch):
    """ "Put the ViT beside it and load again" has to work without a restart."""
    import shutil

    from graphs import GOLDEN

    root = tmp_path / "models"
    shutil.copytree(GOLDEN / "checkpoint" / CHECKPOINT, root / "Mine")
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(root)])
    checkpoints = module(comfy, "nodes.checkpoints")
    before = checkpoints.fingerprint("Mine")
    assert before == checkpoints.fingerprint("Mine")
    shutil.copytree(GOLDEN / "checkpoint" / "Qwen2.5-VL-ViT", root / "Qwen2.5-VL-ViT")
    with_vit = checkpoints.fingerprint("Mine")
    shutil.copy(GOLDEN / "checkpoint" / "Wan2.2_VAE.pth", root)
    with_vae = checkpoints.fingerprint("Mine")
    assert len({before, with_vit, with_vae}) == 3


def test_long_prompts_need_no_large_mask(comfy):
    """In stretches as whole, and no mask of every query against every key."""
    import torch

    compat = module(comfy, "nodes.comfy_compat")
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 50, 4, 8, generator=g), torch.randn(1, 60, 2, 8, generator=g)
    whole = compat.attention(q, k, k, True)
    sizes, full = [], torch.full
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "MASK_ELEMENTS", 700)
        patch.setattr(torch, "full", lambda size, *a, **o: sizes.append(size) or full(size, *a, **o))
        parts = compat.attention(q, k, k, True)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert len(sizes) == 10 and max(a * b for a, b in sizes) <= 700
