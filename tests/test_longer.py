"""Keyframes, going on from a clip, and windows: what is kept, what is joined, and what is refused."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch

from lance_core import RequestError, Windows
from lance_core.cli.main import main
from lance_core.drawing import extend, keyframes
from lance_core.inputs import media, preprocess
from lance_core.model.dual_expert import DualExpert
from lance_core.model.sampler import schedule
from lance_core.model.sequence import Branch

SMALL = {"width": 48, "height": 32, "steps": 2}
PHOTO = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)


def clip(frames: int, width: int = 48, height: int = 32, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


# -- keyframes -----------------------------------------------------------------------------------------------


def test_the_first_frame_as_a_keyframe_is_image_to_video(video_lance):
    """Bit for bit, where the picture has the size that is made."""
    wide = preprocess.vae_size(48, 32, "video_192p")
    photo = preprocess.crop_resize(PHOTO, wide)
    size = {"width": wide[0], "height": wide[1], "num_frames": 5, "steps": 1, "resolution": "video_192p"}
    trained = video_lance.generate("i2v", "it moves", image=photo, **size)
    ours = video_lance.generate("t2v", "it moves", keyframes={0: photo}, **size)
    assert torch.equal(trained.latent, ours.latent)


def test_a_keyframe_is_the_last_latent_of_a_still_clip(video_lance):
    run = video_lance.generate("t2v", "waves", keyframes={-1: OTHER, 2: PHOTO}, num_frames=13, **SMALL)
    parts = video_lance.components
    with torch.inference_mode():
        for at, picture in ((3, OTHER), (1, PHOTO)):
            still = np.stack([preprocess.crop_resize(picture, (48, 32))] * (4 * at + 1))
            latents = parts.encode_frames(still)
            assert len(latents) == at + 1 and torch.equal(run.latent[at], latents[at])
    free = video_lance.generate("t2v", "waves", num_frames=13, **SMALL)
    assert not torch.allclose(run.latent[2], free.latent[2])  # the frames between them follow
    assert run.request["keyframes"] == [1, 3]


def test_kept_frames_stand_at_time_0_in_every_pass(video_lance, recorded):
    run = recorded(
        video_lance,
        "i2v",
        "go",
        image=PHOTO,
        keyframes={-1: OTHER},
        num_frames=9,
        steps=2,
        resolution="video_192p",
    )
    for rows, x, t, _ in run.velocities:
        assert len(rows) in (1, 2) and torch.equal(t == 0, torch.tensor([[True, False, True]] * len(rows)))
        assert all(torch.equal(row[[0, 2]], run.result.latent[[0, 2]]) for row in x)


@pytest.mark.parametrize(
    ("frame", "at"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (-1, 3), (-4, 3), (-5, 2), (12, 3)]
)
def test_which_latent_frame_a_number_means(frame, at):
    from lance_core.inputs.tasks import TASKS

    assert list(keyframes.resolve(TASKS["t2v"], {frame: PHOTO}, 13)) == [at]


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("t2v", {"keyframes": {13: PHOTO}}, "keyframe is 13"),
        ("t2v", {"keyframes": {-14: PHOTO}}, "keyframe is -14"),
        ("t2v", {"keyframes": {1: PHOTO, 2: PHOTO}}, "two pictures are given for frame 2"),
        ("i2v", {"keyframes": {0: PHOTO}, "image": PHOTO}, "i2v's picture is the first"),
        ("t2v", {"keyframes": [PHOTO]}, "expected a mapping"),
        ("t2i", {"keyframes": {0: PHOTO}, "num_frames": None}, "t2i takes no keyframes"),
    ],
)
def test_wrong_keyframes(video_lance, task, options, words):
    with pytest.raises(RequestError, match=words):
        video_lance.generate(task, "a", **({"num_frames": 13} | options))


# -- going on ------------------------------------------------------------------------------------------------


def test_a_part_is_image_to_video_from_the_last_frame(video_lance):
    old = clip(6)
    whole = video_lance.extend((old, 12.0), "it goes on", num_frames=8, hold_colours=False, seed=5, **SMALL)
    assert (whole.width, whole.height, whole.old, whole.count, whole.fps) == (48, 32, 6, 14, 12)
    frames = np.stack(list(whole))
    assert frames.shape == (14, 32, 48, 3) and np.array_equal(frames[:6], old)
    part = video_lance.generate(
        "t2v", "it goes on", keyframes={0: old[-1]}, num_frames=9, seed=5, **SMALL
    ).frames.numpy()
    assert np.array_equal(frames[6:], np.rint(part[1:] * 255).astype(np.uint8))


def test_more_frames_kept_are_the_latents_of_the_end(video_lance, monkeypatch):
    kept, seen = [], extend.draw_latent

    def note(components, asked):
        kept.append(asked.request.kept)
        return seen(components, asked)

    monkeypatch.setattr(extend, "draw_latent", note)
    old = clip(12)
    frames = list(video_lance.extend((old, 12.0), "on", num_frames=8, overlap=2, **SMALL))
    assert len(frames) == 20 and list(kept[0]) == [0, 1]
    with torch.inference_mode():
        tail = video_lance.components.encode_frames(old[-5:])
    assert torch.equal(torch.stack(list(kept[0].values())), tail)
    kept.clear()
    assert len(list(video_lance.extend((old[:3], 12.0), "on", num_frames=4, overlap=5, **SMALL))) == 7
    assert list(kept[0]) == [0]  # a short clip has no more


def test_parts_go_on_from_each_other_with_a_prompt_each(video_lance, monkeypatch):
    asked, draw = [], extend.draw_latent
    monkeypatch.setattr(extend, "draw_latent", lambda c, a: (asked.append(a), draw(c, a))[1])
    frames = np.stack(
        list(video_lance.extend((clip(3), 12.0), ["one", "two"], num_frames=4, seed=9, **SMALL))
    )
    assert [(a.request.prompt, a.seed, a.frames) for a in asked] == [("one", 9, 5), ("two", 10, 5)]
    with torch.inference_mode():
        second = video_lance.components.encode_frames(frames[6:7])
    assert torch.equal(asked[1].request.kept[0], second[0])


def test_the_clip_is_shown_at_12_a_second_and_the_models_size(video_lance):
    fast = np.repeat(clip(12), 2, axis=0)
    frames = np.stack(list(video_lance.extend((fast, 24.0), "on", num_frames=4, steps=1)))
    assert np.array_equal(frames[:12], fast[::2]) and len(frames) == 16
    odd = video_lance.extend((clip(3, 50, 34), 12.0), "on", num_frames=4, steps=1, resolution="video_192p")
    assert (odd.width, odd.height) == preprocess.vae_size(50, 34, "video_192p")


def test_colours_are_held():
    rng = np.random.default_rng(0)
    wanted = rng.uniform(0.2, 0.6, (1, 32, 32, 3)).astype(np.float32)
    drifted = np.clip(wanted * 0.9 + np.array([0.05, 0.0, -0.02], np.float32), 0, 1)
    got = extend.matched(np.concatenate([drifted, drifted]), drifted, wanted)
    assert np.abs(got[1] - wanted[0]).max() < 1e-3 < np.abs(drifted - wanted).max()
    flat = np.full((1, 4, 4, 3), 0.5, np.float32)
    assert np.allclose(extend.matched(flat, flat, flat + 0.1), 0.6)


@pytest.mark.parametrize(("new", "most", "parts"), [(48, 120, [48]), (124, 120, [64, 60]), (4, 120, [4])])
def test_how_long_parts_are(new, most, parts):
    assert extend.lengths(new, most) == parts
    assert all(
        sum(extend.lengths(n, 104)) == n and max(extend.lengths(n, 104)) <= 104 for n in range(4, 999, 4)
    )


def test_a_long_video_is_made_in_constant_memory(video_lance, monkeypatch):
    """Frames are made as they are asked for, and those given are not held."""
    parts = []

    def part(components, request, tail, hold):
        parts.append(request.num_frames)
        return np.zeros((request.num_frames - len(tail), 256, 256, 3), np.uint8)

    monkeypatch.setattr(extend, "_part", part)
    frames = video_lance.extend((clip(1, 256, 256), 12.0), "on", num_frames=720)
    tracemalloc.start()
    count = 0
    for count, _ in enumerate(frames, 1):
        if count == 2:
            assert len(parts) == 1  # the others are not made yet
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 721 == frames.count and len(parts) == 6
    assert peak < 4 * 120 * 256 * 256 * 3 < 720 * 256 * 256 * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 3}, "num_frames is 3"),
        ({"overlap": 0}, "overlap is 0"),
        ({"batch_size": 2}, "does not take 'batch_size'"),
        ({"frames": 2}, "does not take 'frames'"),
        ({"width": 48}, "both or neither"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_what_extend_refuses_at_once(video_lance, options, words):
    with pytest.raises(RequestError, match=words):
        video_lance.extend((clip(3), 12.0), "on", **options)
    with pytest.raises(RequestError, match="no prompt"):
        video_lance.extend((clip(3), 12.0), [])


# -- windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "frames", "spans"),
    [
        (Windows(), 31, [(0, 31)]),
        (Windows(), 32, [(0, 31), (1, 32)]),
        (Windows(), 61, [(0, 31), (23, 54), (30, 61)]),
        (Windows(21, 8), 14, [(0, 6), (4, 10), (8, 14)]),
    ],
)
def test_the_windows_of_a_video(window, frames, spans):
    assert window.spans(frames) == spans
    covered = np.zeros(frames)
    for start, stop in spans:
        covered[start:stop] += 1
        assert stop - start == min(window.size, frames)
    assert covered.min() >= 1


def test_blends_are_positive_and_symmetric():
    for blend in ("pyramid", "flat"):
        weights = Windows(41, 12, blend).weights(99)
        assert weights.shape == (11,) and weights.min() > 0 and torch.equal(weights, weights.flip(0))
    assert Windows(41, 12).weights(99).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 3, 2, 1]


def test_a_video_in_windows_step_by_step(video_lance, monkeypatch):
    """Against the blend written out: each window alone through the model, then the mean by weights."""
    windows = Windows(9, 4, "flat")  # three latent frames, one shared: [0, 3), [2, 5)
    calls, velocity = [], DualExpert.velocity

    def note(self, rows, x, t):
        out = velocity(self, rows, x, t)
        calls.append(([r.branch for r in rows], x.clone(), out))
        return out

    monkeypatch.setattr(DualExpert, "velocity", note)
    made = video_lance.generate("t2v", "waves", num_frames=17, windows=windows, cfg=1.0, shift=1.0, **SMALL)
    assert made.latent.shape[0] == 5 and made.frames.shape[0] == 17
    assert [c[0] for c in calls] == [[Branch.CONDITIONAL]] * 4 and all(c[1].shape[1] == 3 for c in calls)
    times = schedule(2, 1.0)
    x = torch.cat([calls[0][1], calls[1][1][:, 1:]], dim=1)
    for step in range(2):
        (_, a, va), (_, b, vb) = calls[2 * step : 2 * step + 2]
        torch.testing.assert_close(torch.cat([a, b[:, 1:]], dim=1), x)
        v = torch.cat([va[:, :2], (va[:, 2:] + vb[:, :1]) / 2, vb[:, 1:]], dim=1)
        x = x - v * (times[step] - times[step + 1])
    torch.testing.assert_close(made.latent, x[0], atol=1e-5, rtol=1e-4)
    assert made.request["windows"] == {"length": 9, "overlap": 4, "blend": "flat"}


def test_what_fits_one_window_is_as_without(video_lance):
    plain = video_lance.generate("t2v", "waves", num_frames=9, **SMALL)
    assert torch.equal(
        plain.latent, video_lance.generate("t2v", "waves", num_frames=9, windows=Windows(), **SMALL).latent
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Windows(125), "length is 125"),
        (lambda: Windows(21, 24), "overlap by 24"),
        (lambda: Windows(21, 3), "overlap is 3"),
        (lambda: Windows(blend="soft"), "blend is 'soft'"),
    ],
)
def test_wrong_windows(make, words):
    with pytest.raises(RequestError, match=words):
        make()


def test_windows_where_they_do_not_belong(video_lance):
    with pytest.raises(RequestError, match="windows is 5"):
        video_lance.generate("t2v", "a", windows=5)
    with pytest.raises(RequestError, match="video_edit"):
        video_lance.generate("video_edit", "a", video=clip(5), windows=Windows())
    with pytest.raises(RequestError, match="num_frames is 1445"):
        video_lance.generate("t2v", "a", num_frames=1445, windows=Windows())


# -- the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def run(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    where = str(golden / "checkpoint" / "Lance_3B_Video")

    def run_(command, *args):
        code = main([command, *args, "-m", where, "--dtype", "fp32", "--json", "-q", "--steps", "1"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run_


SIZE = ("--width", "48", "--height", "32")


def test_extend_writes_old_and_new(run):
    media.save_video("old.mp4", clip(6), 12)
    code, result = run("extend", "old.mp4", "it goes on", "--frames", "9", "-o", "whole.mp4")
    frames, fps = media.load_video("whole.mp4")
    assert code == 0 and (len(frames), fps) == (6 + 8, 12) and frames.shape[1:3] == (32, 48)
    old = media.load_video("old.mp4")[0]
    assert np.abs(frames[:6].astype(int) - old).mean() < 12  # twice through a lossy codec
    saved = media.read_metadata("whole.mp4")
    assert (saved["task"], saved["prompt"], saved["num_frames"], saved["old_frames"]) == (
        "extend",
        "it goes on",
        14,
        6,
    )
    assert result["files"][0]["file"] == "whole.mp4"
    code, result = run("extend", "old.mp4", "on", "-o", "x.png")
    assert code == 2 and "extend writes videos" in result["error"]


def test_then_makes_one_video(run, tmp_path):
    code, result = run(
        "t2v", "waves", *SIZE, "--frames", "5", "-o", "w.mp4", "--then", "rain", "--then", "sun"
    )
    assert code == 0 and [p.name for p in tmp_path.iterdir()] == ["w.mp4"]
    assert len(media.load_video("w.mp4")[0]) == 13 == result["files"][0]["num_frames"]
    assert media.read_metadata("w.mp4")["turns"] == ["waves", "rain", "sun"]


def test_more_frames_than_the_model_knows(run):
    code, result = run("t2v", "waves", "--width", "32", "--height", "16", "--frames", "141", "-o", "w.mp4")
    assert code == 0 and len(media.load_video("w.mp4")[0]) == 141
    assert result["files"][0]["windows"]["length"] == 121
    code, result = run("t2v", "waves", *SIZE, "--frames", "141", "--window", "130", "-o", "w.mp4")
    assert code == 2 and "window's length is 130" in result["error"]


def test_keyframes_on_the_command_line(run):
    media.save_image("last.png", OTHER)
    code, result = run("t2v", "waves", *SIZE, "--frames", "9", "--keyframe", "-1", "last.png", "-o", "w.mp4")
    assert code == 0 and result["files"][0]["keyframes"] == [2]
    code, result = run("t2v", "waves", *SIZE, "--keyframe", "end", "last.png", "-o", "w.mp4")
    assert code == 2 and "--keyframe end" in result["error"]
