"""The golden requests as graphs: the same latents, pictures and answers as the released code gave."""

from __future__ import annotations

import graphs
import pytest
import torch
from graphs import MANIFEST, tensors

BOUND = 1e-4  # of the case's largest value


def normalised(latent):
    import comfy.latent_formats

    return comfy.latent_formats.Wan22().process_in(latent["samples"].float())[0].permute(1, 2, 3, 0)


def assert_near(latent, name):
    wanted = tensors(name)["latent"]
    error = (normalised(latent) - wanted).abs().max() / wanted.abs().max()
    assert error < BOUND


@pytest.mark.parametrize("name", graphs.GENERATION)
def test_lance_sampler(comfy, name):
    assert_near(comfy.value(graphs.sampled(name), "sampler"), name)


@pytest.mark.parametrize("name", graphs.GENERATION)
def test_sampler_custom_advanced(comfy, name):
    assert_near(comfy.value(graphs.custom(name), "sampler"), name)


@pytest.mark.parametrize("name", ["t2i", "t2v", "i2v"])
def test_decoded_frames(comfy, name):
    graph = graphs.sampled(name)
    graph["decode"] = graphs.node("LanceVAEDecode", vae=["loader", 2], samples=["sampler", 0])
    result = comfy.run(graph, [("decode", 0), ("decode", 1)])
    images, video = result.values
    wanted = tensors(name)["pixels"].float()
    kept = images[[0, -1]] if wanted.shape[1] == 2 else images[:1]
    assert (kept.permute(3, 0, 1, 2) * 2 - 1 - wanted).abs().max() < 1e-3
    components = video.get_components()
    assert float(components.frame_rate) == 12
    assert torch.equal(components.images, images)


@pytest.mark.parametrize("name", graphs.QUESTIONS)
def test_answers(comfy, name):
    from_core = _decode(tensors(name)["answer_ids"].tolist(), MANIFEST[name]["checkpoint"])
    result = comfy.run(graphs.question(name), [("answer", 0)])
    assert result.values[0] == from_core
    assert result.ui["answer"]["text"] == [from_core]


def _decode(ids, checkpoint):
    import sys

    root = str(graphs.GOLDEN.parents[1])
    sys.path.append(root)
    try:
        from lance_core.inputs.tokenizer import Tokenizer
    finally:
        sys.path.remove(root)
    tokenizer = Tokenizer.from_folder(graphs.GOLDEN / "checkpoint" / checkpoint)
    return tokenizer.decode([i for i in ids if i != tokenizer.im_end])
