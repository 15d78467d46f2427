"""Context windows: ComfyUI cuts the latent into pieces for the model and blends what comes out."""

from __future__ import annotations

import pytest
import torch
from graphs import node
from small import CHECKPOINT, MODEL, VIDEO_CHECKPOINT, away, i2v, ksampler, lance, module, samples, text

FRAMES = 33  # nine latent frames


def t2v(frames: int = FRAMES, side: int = 64):
    return {
        "loader": node("LanceLoader", checkpoint=VIDEO_CHECKPOINT, weight_dtype="default"),
        "text": text("the shapes drift apart", target="video"),
        "latent": node(
            "EmptyLanceLatent",
            size="custom",
            aspect="1:1",
            width=side,
            height=side,
            frames=frames,
            batch_size=1,
        ),
    }


def windows(comfy, graph, length: int, overlap: int, schedule: str = "standard_static", **more):
    """`graph` with the model in windows of so many latent frames as "windows". Newer ComfyUIs let a window
    begin with one frame more; here only where it is asked for.
    """
    inputs = {
        "context_length": length,
        "context_overlap": overlap,
        "context_schedule": schedule,
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "dim": 2,
        "freenoise": False,
        "cond_retain_index_list": "",
        "split_conds_to_windows": False,
        "latent_retain_index_list": "",
        "causal_window_fix": False,
    }
    known = {i.id for i in comfy.nodes["ContextWindowsManual"].define_schema().inputs}
    given = {k: v for k, v in {**inputs, **more}.items() if k in known}
    return {**graph, "windows": node("ContextWindowsManual", model=MODEL, **given)}


def anchors(comfy) -> bool:
    """Whether this ComfyUI lets windows begin with one frame more."""
    known = {i.id for i in comfy.nodes["ContextWindowsManual"].define_schema().inputs}
    return "causal_window_fix" in known


def denoised(comfy, model, graph, noise, steps: int = 3):
    """Samples of `graph`'s positive prompt from a given noise, without guidance."""
    sampling = module(comfy, "nodes.sampling")
    positive, negative = comfy.run(graph, [("text", 0), ("text", 1)]).values
    guider = sampling.IntervalGuider(model, sampling.Guidance(1.0, (0.0, 1.0), "none", 0.0))
    guider.set_conds(positive, negative)
    times = sampling.sigmas(steps, 3.5, 1.0)
    sampler = sampling.comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, times, seed=7).clone()


@pytest.fixture
def noise():
    return torch.randn(1, 48, 9, 4, 4, generator=torch.Generator().manual_seed(3))


def test_one_window_over_everything_changes_nothing(comfy):
    graph = windows(comfy, t2v(), 9, 2)
    assert torch.equal(samples(comfy, lance(graph, model=["windows", 0])), samples(comfy, lance(t2v())))


def test_windows_without_overlap_are_videos_of_their_own(comfy, noise):
    graph = windows(comfy, t2v(), 5, 0, "batched")
    plain, cut = comfy.value(graph, "loader"), comfy.value(graph, "windows")
    found = denoised(comfy, cut, graph, noise)
    for part in (slice(0, 5), slice(5, 9)):
        alone = denoised(comfy, plain, graph, noise[:, :, part])
        assert away(found[:, :, part], alone) < 1e-5
    assert away(found, denoised(comfy, plain, graph, noise)) > 1e-3


def test_seams_are_the_weighted_mean_of_both_windows(comfy, noise):
    graph = windows(comfy, t2v(), 5, 1)
    plain, cut = comfy.value(graph, "loader"), comfy.value(graph, "windows")
    found = denoised(comfy, cut, graph, noise, steps=1)
    first = denoised(comfy, plain, graph, noise[:, :, :5], steps=1)
    second = denoised(comfy, plain, graph, noise[:, :, 4:], steps=1)
    assert away(found[:, :, :4], first[:, :, :4]) < 1e-5
    assert away(found[:, :, 5:], second[:, :, 1:]) < 1e-5
    # Frame 4 has weight 1 in both: the end of one pyramid and the beginning of the other.
    assert away(found[:, :, 4], (first[:, :, 4] + second[:, :, 0]) / 2) < 1e-5
    assert away(first[:, :, 4], second[:, :, 0]) > 1e-3


@pytest.mark.parametrize("schedule", ["standard_uniform", "looped_uniform", "standard_static"])
def test_a_windows_lead_in_is_dropped(comfy, noise, schedule):
    """With all that newer ComfyUIs do by default, and a context for each window length and no more."""
    graph = windows(comfy, t2v(), 4, 2, schedule, causal_window_fix=True)
    model, made = comfy.value(graph, "windows"), []
    context = module(comfy, "lance_core.model.kv_cache").Context
    init = context.__init__
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(context, "__init__", lambda self, *a, **k: made.append(1) or init(self, *a, **k))
        found = denoised(comfy, model, graph, noise)
    assert found.shape == noise.shape and bool(torch.isfinite(found).all())
    assert len(made) <= (2 if anchors(comfy) else 1)


def test_beyond_121_frames(comfy):
    graph = t2v(frames=161, side=32)
    with pytest.raises(Exception, match="has 161 frames.*at most 121 at once.*Wan Context Windows"):
        samples(comfy, lance(graph, steps=1))
    inputs = {
        "context_length": 81,
        "context_overlap": 16,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "freenoise": True,
        "retain_first_frame": False,
        "split_conds_to_windows": False,
    }
    known = {i.id for i in comfy.nodes["WanContextWindowsManual"].define_schema().inputs}
    given = {k: v for k, v in inputs.items() if k in known}
    graph["windows"] = node("WanContextWindowsManual", model=MODEL, **given)
    for build in (lance, ksampler):
        made = samples(comfy, build(graph, model=["windows", 0], steps=2))
        assert made.shape == (1, 48, 41, 2, 2) and bool(torch.isfinite(made).all())
    graph["windows"]["inputs"]["context_length"] = 133
    with pytest.raises(Exception, match="context window has .* frames.*at most 121"):
        samples(comfy, lance(graph, model=["windows", 0], steps=1))


def seen_by_the_model(comfy, graph, **changes):
    """(x, timesteps) of every forward of the generation expert while the graph samples."""
    model = comfy.value(graph, "loader").model.diffusion_model
    forward, seen = model.forward, []

    def spy(x, timestep, *args, **kwargs):
        seen.append((x.clone(), timestep.clone()))
        return forward(x, timestep, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "forward", spy)
        made = samples(comfy, lance(graph, model=["windows", 0], cfg=1.0, steps=1, **changes))
    return made, seen


@pytest.mark.parametrize("retained", [False, True])
def test_a_pinned_first_frame_is_kept(comfy, retained):
    graph = windows(
        comfy,
        i2v(frames=FRAMES),
        4,
        1,
        causal_window_fix=True,
        cond_retain_index_list="0" if retained else "",
    )
    start = samples(comfy, graph, "latent")
    made, seen = seen_by_the_model(comfy, graph, seed=100 + retained)
    assert torch.equal(made[:, :, 0], start[:, :, 0])
    assert len(seen) == 3
    first = seen[0][0][:, :, 0]
    for i, (x, timestep) in enumerate(seen):
        lead_in = retained and anchors(comfy)
        clean = timestep[:, 0] == 0 if timestep.ndim == 2 else torch.zeros(1, dtype=torch.bool)
        assert bool(clean.all()) == (i == 0 or lead_in)
        assert timestep.ndim == 1 or bool((timestep[:, 1:] > 0).all())
        if i and lead_in:  # the frame in front of each window is the pinned one
            assert x.shape[2] == 5 and torch.equal(x[:, :, 0], first)
    other = windows(comfy, i2v(frames=FRAMES), 4, 1)
    assert away(made, samples(comfy, lance(other, model=["windows", 0], cfg=1.0, steps=1, seed=99))) > 1e-3


def test_an_edit_sees_its_windows_of_the_source(comfy, monkeypatch):
    graph = {
        "loader": node("LanceLoader", checkpoint=VIDEO_CHECKPOINT, weight_dtype="default"),
        "clip": node("LoadVideo", file="clip.mp4"),
        "vision": node(
            "LanceVisionEncode",
            lance=["loader", 1],
            vae=["loader", 2],
            role="edit source",
            resolution="video_192p",
            video=["clip", 0],
        ),
        "text": text("paint it blue", target="video", vision=["vision", 0]),
    }
    whole, encode = comfy.run(graph, [("vision", 1), ("text", 0)]).values
    frames = whole["samples"].shape[2]
    assert frames > 2
    graph = windows(comfy, graph, 2, 1)
    plans, encoded = [], type(encode[0][1]["lance"].encoded)
    plan = encoded.plan
    monkeypatch.setattr(encoded, "plan", lambda self, *a: plans.append(plan(self, *a)) or plans[-1])
    made = samples(comfy, lance(graph, model=["windows", 0], steps=1))
    assert made.shape == whole["samples"].shape and bool(torch.isfinite(made).all())
    assert len(plans) == frames - 1
    for i, planned in enumerate(plans):
        (source,) = [s for s in planned.sequence.context if s.kind.value == "clean"]
        (full,) = [s for s in encode[0][1]["lance"].encoded.sequence.context if s.kind.value == "clean"]
        assert torch.equal(source.data, full.data[i : i + 2])


def test_windows_of_a_batch_keep_each_results_first_frame(comfy):
    """dim 0, which Context Windows (Manual) begins with, cuts up the batch."""
    if not anchors(comfy):
        pytest.skip("this ComfyUI cannot sample a batch in windows: it compares its steps by shape")
    graph = i2v(batch=3)
    graph["second"] = node("LatentFromBatch", samples=["latent", 0], batch_index=0, length=3)
    plain = samples(comfy, lance(graph, cfg=1.0))
    graph = windows(comfy, graph, 2, 0, "batched", dim=0)
    assert away(samples(comfy, lance(graph, model=["windows", 0], cfg=1.0)), plain) < 1e-5


def test_windows_of_channels_are_refused(comfy):
    graph = windows(comfy, t2v(), 5, 1, dim=1)
    with pytest.raises(Exception, match="dim 1.*choose dim 2"):
        samples(comfy, lance(graph, model=["windows", 0]))


def test_pictures_take_no_windows_of_frames(comfy):
    graph = t2v()
    graph["loader"]["inputs"]["checkpoint"] = CHECKPOINT
    graph["text"] = text("a red fox")
    graph["latent"]["inputs"]["frames"] = 1
    plain = samples(comfy, lance(graph))
    graph = windows(comfy, graph, 4, 1)
    assert torch.equal(samples(comfy, lance(graph, model=["windows", 0])), plain)
