"""Every shortcut of the VAE against the plain way, forced: layouts, folded kernels, lone frames, norms in
slices, shortcuts in place.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lance_core.config import VAEConfig
from lance_core.model.ops import TorchOps
from lance_core.vae import streaming
from lance_core.vae.layers import ResidualBlock
from lance_core.vae.shortcuts import add_averaged, add_duplicated
from lance_core.vae.streaming import ChannelNorm, Stream, causal_conv, doubling_conv, fold
from lance_core.vae.wan import WanVAE

CONFIG = VAEConfig((8, 16, 16), (12, 24, 24), 1, 1, (False, True))
ALWAYS, NEVER = 0, 1 << 40  # points
LAYOUTS = {"channels last": ALWAYS, "plain": NEVER}
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1, 1), (1, 5, 3), (2, 3, 8), (4, 7, 5)]  # frames, height, width


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights under which values neither die out nor explode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.2
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale + name.endswith("gamma"))
    return model


def cast(model: WanVAE, dtype: torch.dtype, ops: type = TorchOps) -> WanVAE:
    twin = WanVAE(model.config, ops, dtype=dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def drift(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@pytest.fixture(scope="module")
def model() -> WanVAE:
    return fill(WanVAE(CONFIG))


def force(monkeypatch, few: int = NEVER, fold: int = NEVER, slices: int = 1 << 19) -> None:
    """The plain ways, but for what is given."""
    monkeypatch.setattr(streaming, "FEW_POINTS", few)
    monkeypatch.setattr(streaming, "FOLD_FROM", fold)
    monkeypatch.setattr(streaming, "NORM_SLICE", slices)


# Whole passes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "ways", [{"few": ALWAYS}, {"fold": ALWAYS}, {"few": ALWAYS, "fold": ALWAYS, "slices": 100}], ids=str
)
def test_passes_equal_the_plain_way(model, monkeypatch, size, ways):
    frames, h, w = size
    latent = noise(2, 48, *size)
    pixels = noise(2, 3, 2 * frames - 1, 8 * h, 8 * w)
    force(monkeypatch)
    plain = model.decode(latent), model.encode(pixels)
    force(monkeypatch, **ways)
    for got, expected in zip((model.decode(latent), model.encode(pixels)), plain, strict=True):
        assert (got - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [(1, 7, 9), (3, 6, 5)])
def test_bfloat16_drifts_no_further_than_the_plain_way(model, monkeypatch, size):
    latent, pixels = noise(1, 48, *size), noise(1, 3, 2 * size[0] - 1, 8 * size[1], 8 * size[2])
    half = cast(model, torch.bfloat16)
    force(monkeypatch)
    exact = model.decode(latent), model.encode(pixels)

    def drifts() -> list[float]:
        results = half.decode(latent.bfloat16()), half.encode(pixels.bfloat16())
        return [drift(*pair) for pair in zip(results, exact, strict=True)]

    plain = drifts()
    force(monkeypatch, few=ALWAYS, fold=ALWAYS, slices=1000)
    for got, allowed in zip(drifts(), plain, strict=True):
        assert 1e-4 < got < 1.15 * allowed


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="other CPU convolutions know one layout only"
)
@pytest.mark.parametrize(
    ("config", "batch", "size"),
    [
        (CONFIG, 2, (3, 5, 6)),
        (VAEConfig((64, 64), (64, 64), 1, 1, (True,)), 1, (1, 18, 18)),
    ],  # smaller ones oneDNN leaves to others
    ids=["chunks", "picture"],
)
def test_activations_keep_their_layout(config, batch, size, monkeypatch):
    """No convolution inside is handed the other layout, which it would have to reorder."""
    force(monkeypatch, few=ALWAYS)
    model, seen = fill(WanVAE(config)), []

    def look(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        last = torch.channels_last_3d if args[0].ndim == 5 else torch.channels_last
        seen.append(args[0].is_contiguous(memory_format=last))

    for half in (model.encoder, model.decoder):
        for module in half.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                module.register_forward_pre_hook(look)
    frames, h, w = size
    space, time = config.spatial_ratio, config.temporal_ratio
    model.decode(noise(batch, 48, *size))
    model.encode(noise(batch, 3, time * (frames - 1) + 1, space * h, space * w))
    assert len(seen) > 20 * frames and all(seen)


def test_nothing_is_concatenated(model, monkeypatch):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    force(monkeypatch, few=ALWAYS)
    with Names():
        model.decode(noise(1, 48, 3, 4, 4))
        model.encode(noise(1, 3, 5, 32, 32))
    assert "convolution" in names and not names & {"cat", "stack"}


def test_weights_may_come_in_any_layout(model, monkeypatch):
    force(monkeypatch, few=ALWAYS, fold=ALWAYS)
    twin = cast(model, torch.float32)
    for module in twin.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            last = torch.channels_last_3d if module.weight.ndim == 5 else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=last)
    latent = noise(1, 48, 2, 5, 6)
    assert torch.allclose(twin.decode(latent), model.decode(latent), atol=1e-5)


def test_a_host_may_cast_weights(model, monkeypatch):
    """As ComfyUI's layers do: weights are kept in one dtype and handed to the convolution in another."""

    def casting(layer: type) -> type:
        class Casting(layer):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

        return Casting

    class Ops(TorchOps):
        Conv2d, Conv3d = casting(torch.nn.Conv2d), casting(torch.nn.Conv3d)

    force(monkeypatch, fold=30)  # both ways of doubling
    kept = cast(model, torch.float16, Ops)
    rounded = cast(kept, torch.float32)
    for size in ((1, 4, 5), (3, 4, 5)):
        latent = noise(1, 48, *size)
        assert torch.equal(kept.decode(latent), rounded.decode(latent))


# Causal convolutions


def plain_block(block: ResidualBlock, x: torch.Tensor) -> torch.Tensor:
    """A residual block over a whole video at once, two frames of zeros before it."""

    def conv(norm: str, name: str, x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * block.residual[norm].gamma
        layer = block.residual[name]
        return F.conv3d(F.pad(F.silu(x), (0, 0, 0, 0, 2, 0)), layer.weight, layer.bias, padding=(0, 1, 1))

    return conv("3", "6", conv("0", "2", x)) + (x if block.shortcut is None else block.shortcut(x))


def causal_ops():
    return streaming.streaming_ops(TorchOps)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("chunks", [[1], [5], [1, 4], [1, 1, 1, 1], [1, 4, 4], [1, 2, 1, 3], [2, 3]], ids=str)
@pytest.mark.parametrize("widths", [(6, 6), (6, 10)], ids=str)
@torch.no_grad()
def test_chunks_equal_the_whole(name, chunks, widths, monkeypatch):
    force(monkeypatch, few=LAYOUTS[name])
    block = fill(ResidualBlock(*widths, causal_ops()))
    x = noise(2, widths[0], sum(chunks), 5, 3)
    stream = Stream()
    got = torch.cat([block(part, stream) for part in x.split(chunks, dim=2)], dim=2)
    assert torch.allclose(got, plain_block(block, x), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)], ids=str)
@torch.no_grad()
def test_a_lone_frame_is_one_after_zeros(dtype, kernel):
    conv = fill(causal_ops().Conv3d(6, 4, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))).to(dtype)
    frame = noise(2, 6, 1, 5, 7).to(dtype)
    zeros = conv(F.pad(frame, (0, 0, 0, 0, 2, 0)))
    assert drift(conv(frame), zeros) < (1e-6 if dtype == torch.float32 else 2e-3)
    assert drift(causal_conv(conv, frame, Stream()), zeros) < (1e-6 if dtype == torch.float32 else 2e-3)


@torch.no_grad()
def test_a_lone_frame_costs_a_third():
    block, stream = fill(ResidualBlock(6, 6, causal_ops())), Stream()
    costs = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            block(noise(1, 6, 1, 5, 3), stream)
        costs.append(counter.get_total_flops())
    assert costs[1] == 3 * costs[0] == 2 * 2 * 27 * 36 * 15


# Doubling


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (3, 4), (7, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("few", [ALWAYS, NEVER])
def test_doubling_equals_enlarging(size, bias, few, monkeypatch):
    force(monkeypatch, few=few)
    x, weight = noise(3, 5, *size).double(), noise(4, 5, 3, 3, seed=1).double()
    offset = noise(4, seed=2).double() if bias else None
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, offset, padding=1)
    assert torch.allclose(doubling_conv(x, fold(weight), offset), plain, rtol=0, atol=1e-12)


def test_doubling_in_half_precision():
    x, weight, bias = (
        noise(2, 64, 9, 7).bfloat16(),
        (noise(32, 64, 3, 3, seed=1) / 24).bfloat16(),
        noise(32, seed=2).bfloat16(),
    )
    exact = F.conv2d(
        F.interpolate(x.float(), scale_factor=2, mode="nearest-exact"),
        weight.float(),
        bias.float(),
        padding=1,
    )
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, bias, padding=1)
    assert 1e-4 < drift(doubling_conv(x, fold(weight), bias), exact) < 1.5 * drift(plain, exact)


def test_doubling_costs_four_ninths():
    with FlopCounterMode(display=False) as counter:
        doubling_conv(noise(1, 8, 20, 30), fold(noise(8, 8, 3, 3)), None)
    assert counter.get_total_flops() == 2 * 64 * 4 * 4 * 21 * 31  # four kernels of four taps at every corner
    assert counter.get_total_flops() < 0.5 * 2 * 64 * 9 * 40 * 60


# Norm


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(2, 6, 1, 1, 1), (1, 6, 3, 5, 7), (2, 6, 5, 7)], ids=str)
@pytest.mark.parametrize("slices", [1, 50, 1 << 19])
@pytest.mark.parametrize("last", [True, False])
@torch.no_grad()
def test_norm_equals_the_formula(dtype, shape, slices, last, monkeypatch):
    force(monkeypatch, slices=slices)
    layer = fill(ChannelNorm(6, len(shape) - 2)).to(dtype)
    x = 10 * noise(*shape).to(dtype)
    x[:, :, ..., 0, 0] = 0
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)
    exact = F.normalize(x.double(), dim=1) * 6**0.5 * layer.gamma.double()
    room = torch.full((*shape[:-1], shape[-1] + 1), 7.0, dtype=dtype)
    bound = 4 * torch.finfo(dtype).eps * exact.abs().max()
    before = x.clone()
    for got in (layer(x), layer(x, out=room[..., 1:])):
        assert got.dtype == dtype and (got.double() - exact).abs().max() <= bound
    assert torch.equal(x, before) and room[..., 0].eq(7).all() and torch.equal(room[..., 1:], layer(x))


# Shortcuts between levels

RATIOS = [(1, 1), (1, 2), (2, 2), (3, 2), (2, 3)]  # time, space
WIDTHS = [(8, 8), (8, 16), (16, 8), (4, 8), (12, 9), (9, 12), (6, 4), (10, 6)]


def fits(width_in: int, width_out: int, cell: int) -> bool:
    return width_in * cell % width_out == 0


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratios", RATIOS, ids=str)
def test_averaged_shortcut(ratios, dtype, last):
    time, space = ratios
    tested = 0
    for width_in, width_out in WIDTHS:
        for t in {1, 2 * time} if fits(width_in, width_out, time * space**2) else ():
            x = noise(2, width_in, t, 2 * space, 3 * space).to(dtype)
            y = noise(2, width_out, -(-t // time), 2, 3, seed=1).to(dtype)
            folded = F.pad(x.double(), (0, 0, 0, 0, -t % time, 0))
            folded = rearrange(folded, "b c (t i) (h j) (w k) -> b (c i j k) t h w", i=time, j=space, k=space)
            exact = y.double() + reduce(folded, "b (o g) t h w -> b o t h w", "mean", o=width_out)
            if last:
                x, y = (z.contiguous(memory_format=torch.channels_last_3d) for z in (x, y))
            before = x.clone()
            got = add_averaged(y, x, time, space)
            assert got is y and torch.equal(x, before)
            assert (got.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
            tested += 1
    assert tested >= 4


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratios", RATIOS, ids=str)
def test_duplicated_shortcut(ratios, dtype, last):
    time, space = ratios
    cell, tested = time * space**2, 0
    for width_in, width_out in WIDTHS:
        for first in (True, False) if fits(width_out, width_in, cell) else ():
            t = 1 if first else 2
            x = noise(2, width_in, t, 2, 3).to(dtype)
            y = noise(2, width_out, 1 if first else t * time, 2 * space, 3 * space, seed=1).to(dtype)
            wide = x.repeat_interleave(width_out * cell // width_in, dim=1)
            wide = rearrange(wide, "b (c i j k) t h w -> b c (t i) (h j) (w k)", i=time, j=space, k=space)
            plain = y + (wide[:, :, time - 1 :] if first else wide)
            if last:
                x, y = (z.contiguous(memory_format=torch.channels_last_3d) for z in (x, y))
            got = add_duplicated(y, x, time, space)
            assert got is y and torch.equal(got, plain)
            tested += 1
    assert tested >= 4
