"""Rope frequencies as the weights were trained with them: rounded to bfloat16, whatever the model computes
in.

The released code keeps them in a module buffer, which its bfloat16 training and inference both round. At
released sizes exact float32 frequencies turn the heads of an edit's tokens by more than a radian too much or
too little.
"""

from __future__ import annotations

import pytest
import torch
from golden_cases import GOLDEN, MANIFEST, request_of
from safetensors.torch import load_file

import lance_core
from lance_core.config import RELEASED_LLM
from lance_core.model import rope, vit
from lance_core.model.sequence import Role

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(theta: float, width: int) -> torch.Tensor:
    return (1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)).float()


def test_released_frequencies_are_those_of_a_bfloat16_buffer():
    rounded = rope.trained_frequencies(RELEASED_LLM.rope_theta, RELEASED_LLM.head_dim)
    precise = exact(RELEASED_LLM.rope_theta, RELEASED_LLM.head_dim)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, rounded.bfloat16().float())
    off = (rounded - precise).abs() / precise
    assert int((off > 1e-6).sum()) == 63 and 3.6e-3 < off.max() < 3.8e-3


def test_tables_turn_by_float32_positions_times_rounded_frequencies():
    position = torch.tensor([[0, 1, 1000, 2001], [0, 1, 7, 63], [0, 1, 9, 72]])
    cos, sin = rope.tables(position, RELEASED_LLM)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (4, 128)
    frequencies = exact(1e6, 128).bfloat16().double()
    for token in range(4):
        for pair in (0, 5, 17, 40, 63):
            axis = 0 if pair < 16 else 1 if pair < 40 else 2
            angle = position[axis, token].double() * frequencies[pair]
            for column in (pair, pair + 64):
                assert abs(float(cos[token, column]) - float(angle.cos())) < 1e-4
                assert abs(float(sin[token, column]) - float(angle.sin())) < 1e-4
    unrounded = 1000 * exact(1e6, 128)
    assert (unrounded[:16] - 1000 * frequencies[:16]).abs().max() > 1, (
        "what this test is about: at the ViT's offset it is a radian"
    )


def test_vit_angles_are_rounded_three_times():
    places = torch.arange(0, 300, 7)
    angles = vit.rope_angles(places, torch.zeros_like(places), 80)
    frequencies = exact(10_000.0, 40).bfloat16()
    product = places.bfloat16()[:, None] * frequencies
    assert product.dtype == torch.bfloat16 and angles.dtype == torch.float32
    assert torch.equal(angles[:, :20], product.float()) and torch.equal(angles[:, 40:60], product.float())
    assert not angles[:, 20:40].any()
    assert (angles[:, :20] - places.float()[:, None] * frequencies.float()).abs().max() > 1e-3, (
        "the products are rounded, too"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_compute_dtype_turns_by_the_same_angles(golden, monkeypatch, dtype):
    """What the layers are handed: float32 tables of rounded frequencies, whatever the weights' dtype."""
    seen: list[torch.Tensor] = []
    tables = rope.tables

    def watched(position, config, device=None):
        cos, sin = tables(position, config, device)
        seen.append(torch.stack([position[0].double(), cos[:, 1].double(), sin[:, 1].double()]))
        return cos, sin

    monkeypatch.setattr(rope, "tables", watched)
    lance = lance_core.load(golden / "checkpoint" / "Lance_3B", dtype=dtype)
    lance.generate(
        "image_edit",
        "blue",
        image=torch.zeros(32, 32, 3, dtype=torch.uint8).numpy(),
        steps=1,
        resolution="image_256res",
    )
    llm = lance.config.llm
    frequency = float(exact(llm.rope_theta, llm.head_dim).bfloat16()[1])
    place, cos, sin = torch.cat(seen, dim=1)
    assert place.max() > 1000, "an edit's ViT block stands at time 1000"
    torch.testing.assert_close(
        torch.stack([cos, sin]),
        torch.stack([(place * frequency).cos(), (place * frequency).sin()]),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("wrong", ["language model", "vit products", "vit frequencies"])
def test_golden_cases_tell_rounded_from_exact(golden, recorded, monkeypatch, wrong):
    """The bounds are narrow enough: with exact frequencies, or with half of the ViT's rounding, golden cases
    fail.
    """
    case = MANIFEST["image_edit"]
    expected = load_file(GOLDEN / "cases" / "image_edit.safetensors")["velocity_step0_cond"]
    question = load_file(GOLDEN / "cases" / "x2t_image.safetensors")["vit_embeds"]
    if wrong == "language model":
        monkeypatch.setattr(rope, "trained_frequencies", lambda theta, width: exact(theta, width))
    elif wrong == "vit frequencies":
        monkeypatch.setattr(vit, "trained_frequencies", lambda theta, width: exact(theta, width))
    else:

        def unrounded(rows, cols, head_dim):
            half = (
                torch.stack([rows, cols], 1)[..., None]
                * rope.trained_frequencies(vit.ROPE_THETA, head_dim // 2)
            ).flatten(1)
            return torch.cat([half, half], dim=1)

        monkeypatch.setattr(vit, "rope_angles", unrounded)
    lance = lance_core.load(GOLDEN / "checkpoint" / case["checkpoint"], dtype=torch.float32)
    if wrong == "language model":
        task, text, options = request_of(case)
        _, _, _, velocity = recorded(lance, task, text, **options).velocities[0]
        got, bound = velocity[0].flatten(0, 2), 5e-5
    else:
        _, _, options = request_of(MANIFEST["x2t_image"])
        clip = lance_core.media.load_image(options["image"])[None]
        with torch.inference_mode():
            got, bound = (
                lance.components.vit_segment(clip, options["resolution"], Role.QUESTION).data,
                1e-5,
            )
        expected = question
    assert (got - expected).abs().max() > bound * expected.abs().max()
