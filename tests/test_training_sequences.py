"""By default training runs what inference runs: same tokens, same places, same arithmetic; and samples that
do not fit are refused.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import training_cases as cases

from lance_core import RequestError
from lance_core.inputs import preprocess, prompts
from lance_core.inputs.media import load_image, read_clip
from lance_core.inputs.sizes import bucket
from lance_core.inputs.tasks import TASKS
from lance_core.model.dual_expert import DualExpert, Plan, Row
from lance_core.model.sequence import Branch, Kind, Role, VisualSegment
from lance_core.training import generation_sample, loss, system_prompt
from lance_core.vae.wan import normalize_latent


@pytest.fixture(scope="module")
def experts():
    return cases.load_experts(trainable=False)


@pytest.fixture(scope="module")
def model(experts):
    return DualExpert(experts.config, experts.und, experts.gen)


@pytest.mark.parametrize("name", ["t2i", "t2i_no_text", "i2i", "i2i_no_text", "i2i_other_size", "ff2v"])
def test_the_velocity_is_that_of_inference(name, experts, model):
    made = cases.batch(name)
    sample, noise, time = made.samples[0], made.noise[0], made.times[0]
    if sample.caption_dropped:  # recorded without one; inference knows what it leaves out
        sample = replace(sample, sequence=_with_caption(sample.sequence))
    plan = Plan.of(sample.sequence, experts.tokens_per_second, guided=True)
    frames = torch.full((len(sample.latent),), time)
    frames[list(sample.clean_frames)] = 0
    at = frames[:, None, None, None]
    branch = Branch.UNCONDITIONAL if sample.caption_dropped else Branch.CONDITIONAL
    with torch.inference_mode():
        prepared = model.prefill(plan)
        x = (1 - at) * sample.latent + at * noise
        v = model.velocity([Row(prepared, branch)], x[None], frames[None])[0]
    expected = (v - (noise - sample.latent)).square().mean(-1)[frames > 0].flatten()
    with torch.no_grad():
        found = loss(experts, [sample], [noise], [time])
        released = loss(experts, [sample], [noise], [time], as_released=True)
    assert (found.mse - expected).abs().max() <= 2e-5 * expected.max()
    if sample.caption_dropped:
        assert (released.mse - expected).abs().max() > 1e-3 * expected.max()


def _with_caption(sequence):
    words = tuple(cases.checkpoint().tokenizer.encode("A red boat."))
    return sequence.with_caption(words)


def test_an_answer_is_that_of_inference(experts, model):
    made = cases.batch("i2t")
    sample = made.samples[0]
    with torch.inference_mode():
        _, logits, _ = model.read(sample.sequence, experts.tokens_per_second, 1)
    first = torch.nn.functional.cross_entropy(logits[: experts.vocabulary], torch.tensor(sample.answer[0]))
    with torch.no_grad():
        found = loss(experts, made.samples, [None], [None])
        released = loss(experts, made.samples, [None], [None], as_released=True)
    assert abs(float(found.ce[0] - first)) <= 1e-5 * float(first)
    assert abs(float(released.ce[0] - first)) > 1e-3 * float(first)


def test_the_released_text_to_image_instruction():
    task = TASKS["t2i"]
    assert system_prompt(task) == task.default_system_prompt != system_prompt(task, as_released=True)
    assert all(system_prompt(t) == system_prompt(t, True) for t in TASKS.values() if t.name != "t2i")


def test_packed_samples_do_not_meet(experts):
    made = cases.batch("packed_all_six")
    with torch.no_grad():
        together = loss(experts, made.samples, made.noise, made.times)
        alone = [
            loss(experts, *([one] for one in each))
            for each in zip(made.samples, made.noise, made.times, strict=True)
        ]
    for kind in ("ce", "mse"):
        joined = torch.cat([getattr(one, kind) for one in alone])
        assert torch.allclose(getattr(together, kind), joined, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["i2i", "v2v", "i2t", "v2t", "t2i"])
def test_latents_and_embeddings_from_the_media(name, opened):
    """Recorded at sides no preset has: the bucket that gives the recorded grid is taken."""
    case, data = cases.CASES[name], cases.tensors(name)
    components = opened("Lance_3B_Video").components
    folder = cases.FOLDER / "inputs"
    source = "photo.png" if name in ("i2i", "i2t", "t2i") else "clip.mp4"
    clip = load_image(folder / source)[None] if source.endswith("png") else _clip(folder / source, name)
    wide, tall = clip.shape[2], clip.shape[1]
    with torch.inference_mode():
        if "latents" in data:
            t, h, w = case["latent_shapes"][0]
            side = next(s for s in (48, 64, 96) if bucket(wide, tall, s) == (w * 16, h * 16))
            pixels = preprocess.to_signed(preprocess.resize_frames(clip, bucket(wide, tall, side)))
            latent = normalize_latent(components.vae.encode(pixels).float())[0].permute(1, 2, 3, 0)
            found, expected = latent.reshape(-1, 48), data["latents"][: t * h * w]
            assert (found - expected).abs().max() <= 5e-5 * expected.abs().max()
        if "vit_embeds" in data:
            _, h, w = case["grids"][0][0]
            sides = ((s, bucket(wide, tall, s)) for s in (56, 84, 112))
            size = next(b for s, b in sides if (b[0] // 28, b[1] // 28) == (w // 2, h // 2))
            frames = preprocess.resize_frames(clip, size)
            top, left = (size[1] - h * 14) // 2, (size[0] - w * 14) // 2
            patches, grid = preprocess.patchify(
                frames[:, top : top + h * 14, left : left + w * 14], components.vit.config
            )
            assert list(grid) == case["grids"][0][0]
            found, expected = components.vit(patches, [grid]), data["vit_embeds"]
            if "vit_patches_sum" in data:
                assert torch.allclose(patches.double().sum(1), data["vit_patches_sum"], rtol=0, atol=1e-9)
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def _clip(path, name):
    if name == "v2t":  # two seconds at most, over the whole clip
        return read_clip(path, pick=lambda n, fps: preprocess.frame_indices(n, fps, max_seconds=2))[0]
    return read_clip(path)[0]


def test_samples_that_do_not_fit_are_refused(experts):
    made = cases.batch("t2i")
    sample, noise = made.samples[0], made.noise[0]
    with pytest.raises(RequestError, match="no samples"):
        loss(experts, [], [], [])
    with pytest.raises(RequestError, match="1 samples came with 0 noises"):
        loss(experts, [sample], [], [0.5])
    with pytest.raises(RequestError, match=r"noise 0 has shape \[1, 5, 6, 48\]"):
        loss(experts, [sample], [noise[:, :, :6]], [0.5])
    for time in (None, 1.5, float("nan")):
        with pytest.raises(RequestError, match="time 0 is"):
            loss(experts, [sample], [noise], [time])
    with pytest.raises(RequestError, match="nothing to learn"):
        loss(experts, [replace(sample, latent=None)], [None], [None])
    with pytest.raises(RequestError, match="only the understanding expert"):
        loss(replace(experts, gen=None), [sample], [noise], [0.5])
    other = generation_sample(cases.checkpoint().tokenizer, "a", [], "b", torch.zeros(1, 2, 2, 48))
    with pytest.raises(RequestError, match=r"block of \(1, 2, 2\) latent cells and a latent"):
        loss(experts, [replace(other, latent=torch.zeros(1, 2, 3, 48))], [torch.zeros(1, 2, 3, 48)], [0.5])
    clean = VisualSegment(Kind.CLEAN, Role.SOURCE, (1, 1, 1), torch.zeros(1, 1, 1, 48))
    question = prompts.question(cases.checkpoint().tokenizer, "a", [clean], "b")
    assert question.target is None
