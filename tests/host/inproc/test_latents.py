"""Empty latents of stock nodes: the size in pixels that was typed is the size that comes out."""

from __future__ import annotations

import inspect

import pytest
import torch
from graphs import node
from inprocess import NodeFailedError
from small import ksampler, lance, samples, t2i, text

WIDE = {"width": 128, "height": 64, "batch_size": 1}
EMPTY = {  # node -> its inputs
    "EmptyLatentImage": WIDE,
    "EmptySD3LatentImage": WIDE,
    "EmptyHunyuanLatentVideo": {**WIDE, "length": 1},
    "EmptyHunyuanVideo15Latent": {**WIDE, "length": 1},
    "EmptyFlux2LatentImage": WIDE,
    "EmptyLTXVLatentVideo": {**WIDE, "length": 1},
    "EmptyCosmosLatentVideo": {**WIDE, "length": 1},
    "EmptyHunyuanImageLatent": WIDE,
}


def tagged(comfy) -> bool:
    """Whether this ComfyUI says what an empty latent's cells stand for."""
    import comfy.sample

    return "downscale_ratio_spacial" in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters


def graph_of(name):
    graph = t2i()
    graph["latent"] = node(name, **EMPTY[name])
    return graph


def there(comfy, name):
    if name not in comfy.nodes:
        pytest.skip("no such node in this ComfyUI")


@pytest.mark.parametrize("name", EMPTY)
def test_lance_sampler_keeps_the_size(comfy, name):
    """As KSampler does where ComfyUI tags them, and by the channels where it does not."""
    there(comfy, name)
    found = comfy.value(lance(graph_of(name), steps=1), "sampler")
    if tagged(comfy):
        as_stock = samples(comfy, ksampler(graph_of(name), steps=1))
        assert found["samples"].shape == as_stock.shape
        made = comfy.value(graph_of(name), "latent")
        if "downscale_ratio_spacial" in made:
            assert found["samples"].shape == (1, 48, 1, 4, 8), made
    else:
        assert found["samples"].shape == (1, 48, 1, 4, 8)
    assert set(found) == {"samples"}  # the tag is of what came in


def test_the_same_picture_as_from_our_own(comfy):
    own = samples(comfy, lance(t2i(width=128, height=64)))
    for name in ("EmptyLatentImage", "EmptySD3LatentImage"):
        assert torch.equal(samples(comfy, lance(graph_of(name))), own)


def test_batches_and_odd_sizes(comfy):
    graph = t2i()
    graph["latent"] = node("EmptyLatentImage", width=120, height=72, batch_size=2)  # 15 by 9 cells of 8
    assert samples(comfy, lance(graph, steps=1)).shape == (2, 48, 1, 4, 8)


def test_videos(comfy):
    graph = t2i()
    graph["loader"]["inputs"]["checkpoint"] = "Lance_3B_Video"
    graph["text"] = text("a boat", target="video")
    graph["latent"] = node("EmptyHunyuanLatentVideo", **WIDE, length=9)
    assert samples(comfy, lance(graph, steps=1)).shape == (1, 48, 3, 4, 8)


def test_a_size_that_cannot_be_told(comfy):
    """Where nothing tags it and the channels are no known model's."""
    if tagged(comfy):
        pytest.skip("this ComfyUI tags empty latents")

    class TestEmpty:
        RETURN_TYPES = ("LATENT",)
        FUNCTION = "make"
        CATEGORY = "testing"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def make(self):
            return ({"samples": torch.zeros(1, 24, 8, 16)},)

    comfy.nodes["TestEmpty"] = TestEmpty
    with pytest.raises(NodeFailedError, match="24 channels and Lance's have 48.*Empty Lance Latent"):
        samples(comfy, lance({**t2i(), "latent": node("TestEmpty")}))


@pytest.mark.parametrize("spatial", [8, 16, 32, None])
def test_tags_and_channels_by_themselves(comfy, spatial):
    """The repair alone, as a ComfyUI with tags and one without would have it."""
    from small import module

    compat, model = module(comfy, "nodes.comfy_compat"), comfy.value(t2i(), "loader")
    import comfy.sample

    latent = {"samples": torch.zeros(1, 16, 8, 16), "downscale_ratio_spacial": spatial}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.sample, "fix_empty_latent_channels", lambda model, samples: samples)
        assert compat.fix_empty_latent(model, latent).shape == (1, 16, 4, 8)  # by its channels
        filled = {"samples": torch.ones(1, 16, 8, 16)}
        assert compat.fix_empty_latent(model, filled).shape == (1, 16, 8, 16)
    if tagged(comfy):
        ratio = 1 if spatial is None else spatial / 16
        assert compat.fix_empty_latent(model, latent).shape == (1, 48, 1, round(8 * ratio), round(16 * ratio))


# -- the clip of the video workflows -------------------------------------------------------------------------


def test_the_example_clip_is_offered_once(comfy, base, tmp_path, monkeypatch):
    """It is in the input folder from the start; one that a person has put there is left alone."""
    import folder_paths
    from small import module

    clip = module(comfy, "nodes.example_clip")
    assert (base / "input" / "lance_example.mp4").read_bytes() == clip.CLIP.read_bytes()
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "lance_example.mp4").write_bytes(b"mine")
    clip.offer()
    assert (tmp_path / "lance_example.mp4").read_bytes() == b"mine"
    (tmp_path / "lance_example.mp4").unlink()
    clip.offer()
    assert [path.name for path in tmp_path.iterdir()] == ["lance_example.mp4"]


def test_an_input_folder_that_cannot_be_written_stops_nothing(comfy, tmp_path, monkeypatch, caplog):
    import folder_paths
    from small import module

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "absent"))
    module(comfy, "nodes.example_clip").offer()
    assert "example clip was not put into" in caplog.text
