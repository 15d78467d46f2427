"""Every golden case end to end, from media files to latents, pixels and answers, within the bounds of
golden/README.md.
"""

from __future__ import annotations

import torch


def test_latent(drawn):
    expected = drawn.tensors["latent"]
    latent = drawn.result.latent
    assert latent.shape == expected.shape and latent.dtype == torch.float32
    assert (latent - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_pixels(drawn):
    frames = drawn.result.frames
    t, h, w = drawn.result.latent.shape[:3]
    assert frames.shape == (4 * t - 3, 16 * h, 16 * w, 3) and frames.dtype == torch.float32
    assert frames.min() >= 0 and frames.max() <= 1 and drawn.result.fps == 12
    if drawn.name in ("t2i_21x9", "video_crop"):  # recorded for their tokens; the VAE shows in the others
        assert "pixels" not in drawn.tensors
        return
    expected = drawn.tensors["pixels"].float()
    shown = frames[[0, -1]] if t > 1 else frames  # of a video, the first and the last frame were recorded
    assert (shown.permute(3, 0, 1, 2) * 2 - 1 - expected).abs().max() <= 1e-3


def test_answer(answered):
    assert answered.answer.token_ids == answered.tensors["answer_ids"].tolist()
    assert answered.answer.text == answered.case["answer"].removesuffix("<|im_end|>")


def test_logits(answered):
    expected = answered.tensors["logits"]
    logits = torch.stack(answered.logits)
    assert logits.shape == expected.shape  # only the tokeniser's rows of lm_head count
    assert (logits - expected).abs().max() <= 5e-5 * expected.abs().max()
    assert answered.below == answered.answer
