"""The VAE against the golden cases, and the properties a streamed, tiled, causal VAE must have."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from lance_core.config import RELEASED_VAE, VAEConfig, vae_config
from lance_core.errors import CheckpointError, RequestError
from lance_core.inputs.media import load_image, read_clip
from lance_core.inputs.preprocess import vae_frames
from lance_core.vae.wan import WanVAE, _spans, denormalize_latent, normalize_latent

GOLDEN = Path(__file__).parent / "golden"
CASES = {p.stem: p for p in sorted((GOLDEN / "cases").glob("*.safetensors")) if not p.stem.startswith("x2t")}
WEIGHTS = GOLDEN / "checkpoint" / "Wan2.2_VAE.pth"
SMALL = VAEConfig((4, 8, 8), (6, 12, 12), 1, 1, (True, False))  # three levels, one block, 2x time, 8x space


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def filled(config: VAEConfig, dtype: torch.dtype = torch.float32) -> WanVAE:
    """A VAE of random weights, scaled so that values neither die out nor explode."""
    model = WanVAE(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if not name.endswith("gamma"):
            fan_in = weight[0].numel() if weight.ndim > 1 else 100
            weight.data = (torch.randn(weight.shape, generator=generator) / fan_in**0.5).to(dtype)
    return model


def smooth(frames: int, height: int, width: int) -> torch.Tensor:
    """A slowly varying video [1, 3, frames, height, width] in -1..1."""
    t = torch.linspace(0, 1, frames)[:, None, None]
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return (
        0.7 * torch.stack([torch.sin(3 * (x + y) + t), torch.cos(2 * x - y + t), x * y - 0.5 + 0 * t])[None]
    )


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    state = torch.load(WEIGHTS, weights_only=True)
    model = WanVAE(vae_config(shapes_of(state), WEIGHTS.name))
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return model


# Golden cases


WITH_PIXELS = [name for name in CASES if name not in ("t2i_21x9", "video_crop")]


@pytest.mark.parametrize("name", WITH_PIXELS)
def test_decode_equals_golden(vae, name):
    case = load_file(CASES[name])
    latent = denormalize_latent(case["latent"], dim=-1)
    pixels = vae.decode(latent.permute(3, 0, 1, 2)[None])[0]
    expected = case["pixels"].float()
    assert pixels.shape[1] == 1 + 4 * (latent.shape[0] - 1)
    shown = pixels if expected.shape[1] == 1 else pixels[:, [0, -1]]
    assert (shown - expected).abs().max() < 1e-3


def first_reference(name: str) -> np.ndarray:
    """The case's first reference, resized to its latent's bucket: uint8 [T, H, W, 3]."""
    entry = json.loads((GOLDEN / "cases" / "manifest.json").read_text())[name]
    path = GOLDEN / "cases" / entry["request"]["interleave_array"][1]
    frames = read_clip(path)[0] if path.suffix == ".mp4" else load_image(path)[None]
    return vae_frames(frames, entry["resolution"])


@pytest.mark.parametrize(
    "name", ["i2v", "image_edit", "image_edit_channel_renorm", "subject_image", "subject_video", "video_edit"]
)
def test_encode_equals_golden(vae, name):
    case = load_file(CASES[name])
    expected = case["condition_latent_0"]
    pixels = torch.from_numpy(first_reference(name)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latent = normalize_latent(vae.encode(pixels))[0].permute(1, 2, 3, 0)
    assert latent.shape == expected.shape
    assert (latent - expected).abs().max() < 5e-5 * expected.abs().max()


def test_latent_statistics_undo_each_other():
    z = noise(2, 48, 1, 2, 3)
    there = normalize_latent(z)
    assert torch.allclose(denormalize_latent(there), z, atol=1e-6)
    assert torch.allclose(normalize_latent(z.movedim(1, -1), dim=-1).movedim(-1, 1), there)
    assert torch.allclose(there[0, 0], (z[0, 0] + 0.2289) / 0.4765)
    with pytest.raises(RequestError, match="48 channels on axis 1"):
        normalize_latent(z.movedim(1, -1))


# Causality and streaming


def test_encoding_does_not_look_ahead(vae):
    video = noise(1, 3, 13, 32, 48).clamp(-1, 1)
    other = torch.cat([video[:, :, :5], -video[:, :, 5:]], dim=2)
    a, b, short = vae.encode(video), vae.encode(other), vae.encode(video[:, :, :5])
    assert torch.equal(a[:, :, :2], b[:, :, :2])
    assert torch.equal(a[:, :, :2], short)
    assert (a[:, :, 2] - b[:, :, 2]).abs().max() > 1e-3


def test_decoding_does_not_look_ahead_but_remembers(vae):
    latent = noise(1, 48, 4, 3, 4)
    other = latent.clone()
    other[:, :, 1] += 1
    a, b = vae.decode(latent), vae.decode(other)
    assert torch.equal(a[:, :, :1], b[:, :, :1])
    assert torch.equal(a[:, :, :5], vae.decode(latent[:, :, :2]))
    assert (a[:, :, 9:] - b[:, :, 9:]).abs().max() > 1e-3  # two chunks later: the cache reached it


def test_encoder_remembers_across_chunks(vae):
    video = noise(1, 3, 9, 32, 32)
    other = video.clone()
    other[:, :, 0] *= -1
    assert (vae.encode(video)[:, :, 2] - vae.encode(other)[:, :, 2]).abs().max() > 1e-4


def test_first_frame_is_an_image(vae):
    video = noise(1, 3, 5, 32, 32)
    assert torch.equal(vae.encode(video)[:, :, :1], vae.encode(video[:, :, :1]))
    latent = noise(1, 48, 3, 2, 3)
    assert torch.equal(vae.decode(latent)[:, :, :1], vae.decode(latent[:, :, :1]))


def test_batch_equals_singles(vae):
    video, latent = noise(2, 3, 5, 32, 48), noise(2, 48, 2, 3, 2)
    for one in range(2):
        assert torch.allclose(vae.encode(video)[one], vae.encode(video[one : one + 1])[0], atol=1e-5)
        assert torch.allclose(vae.decode(latent)[one], vae.decode(latent[one : one + 1])[0], atol=1e-5)


def test_pixels_are_clamped(vae):
    pixels = vae.decode(20 * noise(1, 48, 1, 2, 2))
    assert pixels.min() == -1 and pixels.max() == 1


def peak_bytes(work) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [
        (e.start_ns(), e.nbytes())
        for e in recorded.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    return int(np.cumsum([size for _, size in sorted(events, key=lambda event: event[0])]).max())


# A batch of two keeps torch's CPU kernels from unfolding small convolutions; see vae_memory.py.
MEMORY = VAEConfig((16, 32, 64, 64), (24, 48, 96, 96), 2, 2, (False, True, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("tile", [None, 8])
def test_memory_estimates_hold(dtype, frames, tile):
    model = filled(MEMORY, dtype)
    latent = noise(2, 48, frames, 8, 14).to(dtype)
    pixels = noise(2, 3, 4 * frames - 3, 128, 224).to(dtype)
    for work, x, estimate in (
        (model.decode, latent, model.memory_estimate_decode(latent.shape, dtype, tile)),
        (model.encode, pixels, model.memory_estimate_encode(pixels.shape, dtype, tile)),
    ):
        measured = peak_bytes(lambda work=work, x=x: work(x, tile=tile))
        assert measured <= estimate <= 2.5 * measured, (
            f"{work.__name__}: measured {measured}, estimated {estimate}"
        )


def test_longer_video_costs_only_its_result():
    model = filled(MEMORY)
    # The past is complete after the third latent frame, and dropped in the last one.
    latents = [noise(2, 48, frames, 6, 8) for frames in (4, 7)]
    short, long = (peak_bytes(lambda latent=latent: model.decode(latent)) for latent in latents)
    assert long - short <= 1.05 * 4 * 2 * 3 * 12 * 96 * 128


# Progress, interruption, out of memory


def test_progress_counts_every_step(vae):
    seen, checks = [], []
    vae.encode(
        noise(1, 3, 9, 32, 32), progress=lambda *at: seen.append(at), check=lambda: checks.append(len(seen))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert checks == [0, 1, 2]
    seen.clear()
    vae.decode(noise(1, 48, 2, 8, 12), progress=lambda *at: seen.append(at), tile=8, overlap=2)
    assert seen == [(i, 6) for i in range(1, 7)]  # two tiles and the stage before them, two frames each


@pytest.mark.parametrize("hook", ["progress", "check"])
def test_interrupted_call_leaves_nothing(vae, hook):
    class Stop(Exception):
        pass

    def stop(done: int = 0, total: int = 0) -> None:
        raise Stop

    video, latent = noise(1, 3, 9, 32, 32), noise(1, 48, 3, 2, 2)
    expected = vae.encode(video), vae.decode(latent)
    with pytest.raises(Stop):
        vae.encode(noise(1, 3, 9, 32, 32, seed=1), **{hook: stop})
    with pytest.raises(Stop):
        vae.decode(noise(1, 48, 3, 2, 2, seed=1), **{hook: stop})
    assert torch.equal(vae.encode(video), expected[0])
    assert torch.equal(vae.decode(latent), expected[1])


def test_calls_may_interleave(vae):
    latent, inner = noise(1, 48, 3, 2, 2), noise(1, 48, 2, 3, 3, seed=1)
    expected = vae.decode(latent)
    assert torch.equal(vae.decode(latent, progress=lambda *_: vae.decode(inner)), expected)


def exhaust_once(monkeypatch, owner, name: str, at_call: int) -> None:
    """Make a method run out of memory on one call, and check on the next that nothing of it is left."""
    real, calls, made = getattr(owner, name), [], []

    def method(x, stream):
        calls.append(None)
        if len(calls) == at_call:
            raise torch.OutOfMemoryError("no memory left")
        if len(calls) > at_call:
            assert not any(ref() is not None for ref in made), "the failed pass still holds memory"
            made.clear()
        y = real(x, stream)
        if len(calls) < at_call:
            made.append(weakref.ref(stream))
        return y

    monkeypatch.setattr(owner, name, method)


def test_out_of_memory_falls_back_to_tiles(vae, monkeypatch, caplog):
    latent = vae.encode(smooth(5, 20 * 16, 12 * 16))
    expected = vae.decode(latent, tile=10)
    gc.disable()  # what is freed must be freed by itself, not by a collector that may come late
    try:
        exhaust_once(monkeypatch, vae.decoder, "expand", at_call=2)
        assert torch.equal(vae.decode(latent), expected)
    finally:
        gc.enable()
    assert "tiles of 10" in caplog.text


def test_encode_out_of_memory_falls_back_to_tiles(vae, monkeypatch, caplog):
    pixels = smooth(5, 16 * 16, 20 * 16)
    expected = vae.encode(pixels, tile=10)
    exhaust_once(monkeypatch, vae.encoder, "leave", at_call=2)
    assert torch.equal(vae.encode(pixels), expected)
    assert "tiles of 10" in caplog.text


def test_out_of_memory_in_tiles_is_raised(vae, monkeypatch):
    def exhausted(x, stream):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(vae.decoder, "expand", exhausted)
    for shape, tile in (((1, 48, 1, 24, 24), None), ((1, 48, 1, 24, 24), 8), ((1, 48, 1, 4, 4), None)):
        with pytest.raises(torch.OutOfMemoryError):
            vae.decode(noise(*shape), tile=tile)


# Tiles


@pytest.mark.parametrize(("frames", "tile"), [(1, 32), (1, 24), (5, 24)])
def test_tiled_decode_is_close_on_smooth_content(vae, frames, tile):
    latent = vae.encode(smooth(frames, 640, 400) if frames == 1 else smooth(frames, 448, 192))
    whole, tiled = vae.decode(latent), vae.decode(latent, tile=tile)
    assert 0 < (tiled - whole).abs().max() < 1 / 127.5  # one level of 255 over -1..1


def test_tiled_encode_is_close_on_smooth_content(vae):
    pixels = smooth(5, 576, 192)
    whole, tiled = vae.encode(pixels), vae.encode(pixels, tile=32)
    assert 0 < (tiled - whole).abs().max() < 0.005 * whole.abs().max()


def test_one_tile_is_the_whole(vae):
    latent = noise(1, 48, 2, 5, 7)
    assert torch.allclose(vae.decode(latent, tile=7), vae.decode(latent), atol=1e-6)


def test_tiles_cover_and_weights_sum_to_one():
    for length in range(1, 66):
        for tile in (1, 2, 5, 8, 13, 16, 24, 32):
            for overlap in {0, 1, tile // 4, tile // 2}:
                if overlap > tile // 2:
                    continue
                spans = _spans(length, tile, overlap)
                total = torch.zeros(length * 4)
                for span in spans:
                    assert 0 <= span.start < span.stop <= length and span.stop - span.start <= tile
                    total[span.cells(4)] += span.weights(4)
                assert torch.allclose(total, torch.ones_like(total), atol=1e-5), (length, tile, overlap)


# Configurations and shapes


@pytest.mark.parametrize(
    "config",
    [SMALL, VAEConfig((8, 8), (8, 8), 2, 0, (True,)), VAEConfig((4, 8, 8), (4, 8, 16), 3, 2, (False, False))],
)
def test_other_sizes(config):
    model = filled(config)
    assert vae_config(shapes_of(model.state_dict()), "test") == config
    space, time = config.spatial_ratio, config.temporal_ratio
    video = noise(1, 3, 1 + 2 * time, 2 * space, 3 * space)
    latent = model.encode(video)
    assert latent.shape == (1, 48, 3, 2, 3)
    assert model.decode(latent).shape == video.shape
    assert latent.isfinite().all() and latent.std() > 1e-3


def test_released_layout():
    with torch.device("meta"):
        model = WanVAE(RELEASED_VAE)
    state = shapes_of(model.state_dict())
    assert vae_config(state, "released") == RELEASED_VAE
    assert set(state) == set(
        torch.load(WEIGHTS, weights_only=True)
    )  # the tiny checkpoint has the released names
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(
        2.82e9 / 4, rel=0.01
    )  # MODEL.md: 2.82 GB in float32


def test_layers_come_from_ops():
    made = []

    class Ops:
        class Conv2d(torch.nn.Conv2d):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made.append(self)

        class Conv3d(torch.nn.Conv3d):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made.append(self)

    model = WanVAE(SMALL, ops=Ops, dtype=torch.bfloat16)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)]
    assert convs and {id(m) for m in convs} == {id(m) for m in made}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_undividable_widths_are_refused():
    with pytest.raises(CheckpointError, match="do not divide"):
        WanVAE(VAEConfig((4, 6, 7), (4, 8, 8), 1, 1, (False, False)))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision_is_near(vae, dtype, bound):
    half = WanVAE(vae.config, dtype=dtype)
    half.load_state_dict({name: tensor.to(dtype) for name, tensor in vae.state_dict().items()})
    latent = noise(1, 48, 2, 3, 3)
    whole, got = vae.decode(latent), half.decode(latent.to(dtype))
    assert got.dtype == torch.float32
    assert (got - whole).pow(2).mean().sqrt() < bound * whole.std()


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 2, 32, 32),
        (1, 3, 1, 32, 40),
        (1, 3, 1, 24, 32),
        (3, 1, 32, 32),
        (1, 4, 1, 32, 32),
        (1, 3, 0, 32, 32),
    ],
)
def test_bad_pixels_are_refused(vae, shape):
    with pytest.raises(RequestError, match=r"got .*\[.*expected .*16"):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(48, 1, 2, 2), (1, 16, 1, 2, 2), (1, 1, 2, 2, 48), (0, 48, 1, 2, 2)])
def test_bad_latents_are_refused(vae, shape):
    with pytest.raises(RequestError, match=r"expected .*48"):
        vae.decode(torch.zeros(shape))


def test_integers_are_refused(vae):
    with pytest.raises(RequestError, match="uint8"):
        vae.encode(torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (-1, None), (8, 5), (8, -1)])
def test_bad_tiles_are_refused(vae, tile, overlap):
    with pytest.raises(RequestError, match="tiles of"):
        vae.decode(torch.zeros(1, 48, 1, 8, 8), tile=tile, overlap=overlap)
