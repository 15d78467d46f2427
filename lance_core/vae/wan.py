"""Wan2.2's video VAE: pixels to latents and back, streamed over time, tiled over space when asked to or out
of memory.

It works in the dtype and on the device of its input; results are float32 there. Latents here are the VAE's
own; `normalize_latent` and `denormalize_latent` convert to and from the unit-variance ones the rest of Lance
uses. The layers are in layers.py, the memory a pass needs in memory.py; loading, devices, resizing and 8-bit
pixels are elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Grid, VAEConfig
from ..errors import RequestError
from ..model.ops import TorchOps
from ..model.out_of_memory import is_out_of_memory
from .layers import Decoder, Encoder
from .memory import decode_bytes, encode_bytes
from .shortcuts import patchify, unpatchify
from .streaming import Stream

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Check = Callable[[], None]
# (source, latent frame, past) -> that frame's part of the result
Step = Callable[[Tensor, int, Stream], Tensor]

TILE, OVERLAP = 32, 12  # latent cells
SMALLEST_TILE = 8  # below it a tile is mostly border

# Statistics of each latent channel over Wan2.2's training data, as published with its weights.
# fmt: off
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


def normalize_latent(z: Tensor, dim: int = 1) -> Tensor:
    """VAE latent -> model latent, (z - mean) / std per channel; `dim` is the axis of the 48 channels."""
    mean, std = _statistics(z, dim)
    return (z - mean) / std


def denormalize_latent(z: Tensor, dim: int = 1) -> Tensor:
    """Model latent -> VAE latent, z * std + mean per channel; `dim` is the axis of the 48 channels."""
    mean, std = _statistics(z, dim)
    return z * std + mean


def _statistics(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    channels = len(LATENT_MEAN)
    if not -z.ndim <= dim < z.ndim or z.shape[dim] != channels:
        raise RequestError(
            f"got a latent of shape {list(z.shape)}, expected {channels} channels on axis {dim}; say which "
            "axis with dim=."
        )
    shape = [1] * z.ndim
    shape[dim] = channels
    return z.new_tensor(LATENT_MEAN).view(shape), z.new_tensor(LATENT_STD).view(shape)


class WanVAE(nn.Module):
    """The VAE a checkpoint describes; tensor names are those of the released Wan2.2_VAE.pth.

    `ops` supplies Conv2d and Conv3d (see ops.py). Calls keep no state on the module: they may be interrupted
    by an exception at any point, and run side by side.
    """

    def __init__(self, config: VAEConfig, ops: Any = TorchOps, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.config = config
        place = {"device": device, "dtype": dtype}
        channels = config.latent_channels
        self.encoder = Encoder(config, ops, **place)
        self.conv1 = ops.Conv3d(2 * channels, 2 * channels, 1, **place)
        self.conv2 = ops.Conv3d(channels, channels, 1, **place)
        self.decoder = Decoder(config, ops, **place)

    @torch.no_grad()
    def encode(
        self,
        pixels: Tensor,
        progress: Progress | None = None,
        check: Check | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """The posterior mean of a video or image, one latent frame at a time.

        Args:
            pixels: [b, 3, T, H, W] in -1..1, T = 4 k + 1, H and W multiples of 16 (of the config's ratios).
            progress: called with (done, total) after each step (a latent frame of the whole or of a tile);
                may raise to abort. When memory runs out the work starts over in tiles, and so does the count.
            check: called before each step; may raise to abort.
            tile, overlap: side of a tile and overlap of neighbours, in latent cells; without `tile`, frames
                are whole.

        Returns: [b, 48, 1 + (T - 1) / 4, H / 16, W / 16], float32, not normalised.

        Raises:
            RequestError: a shape or tiling it cannot work with.
        """
        space, time = self.config.spatial_ratio, self.config.temporal_ratio
        expected = (
            f"[batch, 3, frames, height, width] with frames = {time}k + 1, height and width "
            f"multiples of {space}"
        )
        _require(pixels, 3, expected)
        _, _, frames, height, width = pixels.shape
        if (frames - 1) % time or height % space or width % space:
            raise RequestError(
                f"got pixels of shape {list(pixels.shape)}, expected {expected}; crop or resize them first."
            )
        grid = (1 + (frames - 1) // time, height // space, width // space)
        return _run(self._encode, pixels, grid, tile, overlap, progress, check)

    @torch.no_grad()
    def decode(
        self,
        latent: Tensor,
        progress: Progress | None = None,
        check: Check | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """The pixels of a latent, one latent frame at a time.

        Args:
            latent: [b, 48, t, h, w], not normalised.
            progress, check, tile, overlap: as in `encode`.

        Returns: [b, 3, 4 (t - 1) + 1, 16 h, 16 w], float32, clamped to -1..1.

        Raises:
            RequestError: a shape or tiling it cannot work with.
        """
        channels = self.config.latent_channels
        _require(latent, channels, f"[batch, {channels}, frames, height, width] in latent cells")
        t, h, w = latent.shape[2:]
        return _run(self._decode, latent, (t, h, w), tile, overlap, progress, check)

    def memory_estimate_encode(
        self, pixel_shape: Sequence[int], dtype: torch.dtype, tile: int | None = None
    ) -> int:
        """Bytes that encoding pixels of this shape takes at its peak; see memory.py."""
        return encode_bytes(self.config, pixel_shape, dtype, tile)

    def memory_estimate_decode(
        self, latent_shape: Sequence[int], dtype: torch.dtype, tile: int | None = None
    ) -> int:
        """Bytes that decoding a latent of this shape takes at its peak; see memory.py."""
        return decode_bytes(self.config, latent_shape, dtype, tile)

    def _encode(self, pixels: Tensor, tile: int | None, overlap: int, meter: _Meter) -> Tensor:
        """`encode`, whole or in tiles. Only the levels are tiled: the middle must see whole frames, and is
        small.
        """
        config, encoder = self.config, self.encoder
        time, scale = config.temporal_ratio, config.spatial_ratio

        def reduce(x: Tensor, i: int, stream: Stream) -> Tensor:
            frames = x[:, :, 1 + time * (i - 1) : 1 + time * i] if i else x[:, :, :1]
            return encoder.reduce(patchify(frames, config.patch), stream)

        def leave(features: Tensor, i: int, stream: Stream) -> Tensor:
            moments = self.conv1(encoder.leave(features[:, :, i : i + 1].to(pixels.dtype), stream))
            return moments[:, : config.latent_channels]

        b, _, frames, height, width = pixels.shape
        shape = (b, config.latent_channels, 1 + (frames - 1) // time, height // scale, width // scale)
        result = pixels.new_empty(shape, dtype=torch.float32)
        if tile is None:
            _sweep(
                lambda x, i, stream: leave(reduce(x, i, stream), 0, stream), pixels, result, shape[2], meter
            )
            return result
        features = pixels.new_zeros(b, config.encoder_widths[-1], *shape[2:], dtype=torch.float32)
        _sweep_tiles(reduce, pixels, features, shape[2:], tile, overlap, meter)
        _sweep(leave, features, result, shape[2], meter)
        return result

    def _decode(self, latent: Tensor, tile: int | None, overlap: int, meter: _Meter) -> Tensor:
        """`decode`, whole or in tiles. Only the levels are tiled: the middle must see whole frames, and is
        small.
        """
        config, decoder = self.config, self.decoder
        time, scale = config.temporal_ratio, config.spatial_ratio

        def enter(x: Tensor, i: int, stream: Stream) -> Tensor:
            return decoder.enter(self.conv2(x[:, :, i : i + 1]), stream)

        def expand(features: Tensor, i: int, stream: Stream) -> Tensor:
            return unpatchify(decoder.expand(features[:, :, i : i + 1], stream), config.patch).clamp_(-1, 1)

        b, _, t, h, w = latent.shape
        result = latent.new_zeros(b, 3, 1 + time * (t - 1), h * scale, w * scale, dtype=torch.float32)
        if tile is None:
            _sweep(lambda x, i, stream: expand(enter(x, i, stream), 0, stream), latent, result, t, meter)
            return result
        features = latent.new_empty(b, config.decoder_widths[-1], t, h, w)
        _sweep(enter, latent, features, t, meter)
        _sweep_tiles(expand, features, result, (t, h, w), tile, overlap, meter)
        return result


class _Meter:
    """Reports progress and checks for an abort: both callbacks may raise to end the pass."""

    def __init__(self, progress: Progress | None, check: Check | None) -> None:
        self.progress, self.check = progress, check
        self.done = self.total = 0

    def steps(self, count: int) -> Iterator[int]:
        """0 .. count - 1, with the callbacks before and after each."""
        for i in range(count):
            if self.check is not None:
                self.check()
            yield i
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)


def _require(x: Tensor, channels: int, expected: str) -> None:
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape or not x.is_floating_point():
        fix = (
            "for a single image add an axis of one frame"
            if x.ndim == 4
            else "check the order of the axes and the dtype"
        )
        raise RequestError(
            f"got {x.dtype} of shape {list(x.shape)}, expected floating-point {expected}; {fix}."
        )


def _run(
    work: Callable[[Tensor, int | None, int, _Meter], Tensor],
    x: Tensor,
    grid: Grid,
    tile: int | None,
    overlap: int | None,
    progress: Progress | None,
    check: Check | None,
) -> Tensor:
    """`work`, whole or tiled as asked; whole and out of memory, once more in tiles. `grid`: the latent's
    frames, height, width.
    """
    frames, height, width = grid
    side = max(height, width)
    meter = _Meter(progress, check)
    if tile is None:
        meter.total = frames
        try:
            return work(x, None, 0, meter)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tile = min(TILE, (side + 1) // 2)
            if tile < SMALLEST_TILE:
                raise
        # Out here the exception is gone, and with it the frames that held the failed pass's tensors.
        log.warning(
            "Out of memory with %d x %d latent cells at once; starting over in tiles of %d.",
            height,
            width,
            tile,
        )
        meter = _Meter(progress, check)
    overlap = min(OVERLAP, tile // 2) if overlap is None else overlap
    if tile < 1 or not 0 <= overlap <= tile // 2:
        raise RequestError(
            f"got tiles of {tile} latent cells overlapping by {overlap}, expected an overlap from 0 to half "
            "the tile."
        )
    meter.total = frames * (1 + len(_spans(height, tile, overlap)) * len(_spans(width, tile, overlap)))
    return work(x, tile, overlap, meter)


def _sweep(
    step: Step, source: Tensor, result: Tensor, frames: int, meter: _Meter, weights: Tensor | None = None
) -> None:
    """Every latent frame's step in order, written into `result`; with `weights` [H, W], added to it."""
    stream = Stream()
    at = 0
    for i in meter.steps(frames):
        stream.first, stream.last = i == 0, i == frames - 1
        chunk = step(source, i, stream)
        place = result[:, :, at : at + chunk.shape[2]]
        if weights is None:
            place.copy_(chunk)
        else:
            place.addcmul_(chunk.to(place.dtype), weights)
        at += chunk.shape[2]
        del chunk  # so that it is freed before the next step


def _sweep_tiles(
    step: Step, source: Tensor, result: Tensor, grid: tuple[int, ...], tile: int, overlap: int, meter: _Meter
) -> None:
    """`_sweep` over overlapping tiles, blended into `result`. Tiles are the outer loop: only one tile's past
    is alive.
    """
    frames, height, width = grid
    into, out_of = (
        source.shape[-1] // width,
        result.shape[-1] // width,
    )  # points a side of one cell, read and written
    for rows, cols in product(_spans(height, tile, overlap), _spans(width, tile, overlap)):
        weights = rows.weights(out_of)[:, None] * cols.weights(out_of)
        part = source[..., rows.cells(into), cols.cells(into)]
        place = result[..., rows.cells(out_of), cols.cells(out_of)]
        _sweep(step, part, place, frames, meter, weights.to(result.device))


@dataclass(frozen=True)
class _Span:
    """One tile along one axis, in latent cells, with its neighbours' edges."""

    start: int
    stop: int
    before: int  # where the previous tile stops; -1: there is none
    after: int  # where the next tile starts; `stop`, if there is none

    def cells(self, scale: int) -> slice:
        return slice(self.start * scale, self.stop * scale)

    def weights(self, scale: int) -> Tensor:
        """[cells * scale], float32: neighbours fade into each other linearly over the middle quarter of what
        they share.

        Further out, one of them is close to its own border, which the picture does not have; its weight there
        is zero.
        """
        at = (torch.arange(self.start * scale, self.stop * scale) + 0.5) / scale
        return _rise(at, self.start, self.before) * (1 - _rise(at, self.after, self.stop))


def _rise(at: Tensor, start: int, stop: int) -> Tensor:
    """0 to 1 over the middle quarter of start..stop; a plain step where nothing is shared."""
    middle, width = (start + stop) / 2, (stop - start) / 4
    return ((at - middle) / max(width, 1e-3) + 0.5).clamp(0, 1)


def _spans(length: int, tile: int, overlap: int) -> list[_Span]:
    """Tiles covering `length` cells, neighbours sharing `overlap` (rounding gives or takes one); equal, and
    no larger than `tile`.
    """
    count = 1 if tile >= length else -(-(length - overlap) // (tile - overlap))
    tile = -(-(length + (count - 1) * overlap) // count)
    starts = [round(i * (length - tile) / max(count - 1, 1)) for i in range(count)]
    befores = [-1, *(start + tile for start in starts[:-1])]
    return [
        _Span(a, a + tile, before, after)
        for a, before, after in zip(starts, befores, [*starts[1:], length], strict=True)
    ]
