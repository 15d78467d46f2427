"""How much memory a pass of the VAE needs at its peak, from the configuration alone.

Counted in elements of the compute dtype, without the weights and without the input:

    the past: 2 frames of every causal convolution's input (none for a single latent frame)
    + the most that is alive at once, over all layers: the level's input, kept for its shortcut; the block's
      input; the convolution's input behind its past, twice, because libraries reorder it; its weights,
      reordered; its output
    + attention scores, in case the library materialises them
    all of it times 9/8, for the allocator's rounding
    + the result, and when tiled the features between the two stages.

Only the last line grows with the number of frames. On a CPU torch may unfold a small float32 convolution into
a matrix of 27 times its input; that is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import VAEConfig
from .layers import down_steps, up_steps
from .streaming import CONTEXT, FOLD_FROM


def decode_bytes(
    config: VAEConfig, latent_shape: Sequence[int], dtype: torch.dtype, tile: int | None = None
) -> int:
    """Peak bytes to decode a latent [b, 48, t, h, w], whole or in tiles of `tile` cells a side."""
    b, channels, frames, h, w = latent_shape
    widths = config.decoder_widths[::-1]
    count = _Count(past=frames > 1)
    cells, wide, t = b * h * w, widths[0], 1
    count.conv(channels, wide, t, cells, held=channels * cells)
    count.middle(wide, cells, h * w)
    points = cells if tile is None else b * min(h, tile) * min(w, tile)
    for width, (space, temporal) in zip(widths, up_steps(config), strict=True):
        entering = wide * t * points
        count.blocks(wide, width, config.decoder_blocks + 1, t, points, held=entering)
        if temporal and frames > 1:
            count.conv(width, 2 * width, t, points, held=entering + 2 * width * t * points, area=1)
            t *= 2
        if space > 1:
            folded = 2 * 16 * width**2 * (points >= FOLD_FROM)  # the kernel, its reordered copy
            # Folded: one result for every corner and their places; plain: enlarged, reordered and convolved.
            count.peak(entering + width * t * (1 + 3 * space**2) * points + folded)
        points, wide = points * space**2, width
    count.conv(wide, 3 * config.patch**2, t, points, held=wide * t * points)
    pixels = cells * config.spatial_ratio**2 * (1 + config.temporal_ratio * (frames - 1))
    features = 0 if tile is None else widths[0] * cells * frames * dtype.itemsize
    return count.bytes(dtype) + features + 4 * 3 * pixels


def encode_bytes(
    config: VAEConfig, pixel_shape: Sequence[int], dtype: torch.dtype, tile: int | None = None
) -> int:
    """Peak bytes to encode pixels [b, 3, T, H, W], whole or in tiles of `tile` latent cells a side."""
    b, _, frames, height, width = pixel_shape
    scale, time = config.spatial_ratio, config.temporal_ratio
    h, w, latents = height // scale, width // scale, 1 + (frames - 1) // time
    count = _Count(past=latents > 1)
    cells, t = b * h * w, time if latents > 1 else 1
    points = (cells if tile is None else b * min(h, tile) * min(w, tile)) * (scale // config.patch) ** 2
    channels, wide = 3 * config.patch**2, config.encoder_widths[0]
    count.conv(channels, wide, t, points, held=channels * t * points)
    for width_out, (space, temporal) in zip(config.encoder_widths, down_steps(config), strict=True):
        entering = wide * t * points
        count.blocks(wide, width_out, config.encoder_blocks, t, points, held=entering)
        below = points // space**2
        if space > 1:
            count.peak(entering + width_out * t * (3 * points + below))  # whole, padded, reordered, strided
        if temporal:
            count.conv(width_out, width_out, t, below, held=entering + width_out * t * below, area=1)
            t = -(-t // 2)
        points, wide = below, width_out
    count.middle(wide, cells, h * w)
    count.conv(wide, 2 * config.latent_channels, 1, cells, held=wide * cells)
    features = 0 if tile is None else wide * cells * latents * 4
    return count.bytes(dtype) + features + 4 * config.latent_channels * cells * latents


class _Count:
    """Elements remembered from chunk to chunk, and the most that is alive within one."""

    def __init__(self, past: bool) -> None:
        self.past = past
        self.remembered = self.alive = self.scores = 0

    def peak(self, elements: int) -> None:
        self.alive = max(self.alive, elements)

    def conv(self, width_in: int, width_out: int, t: int, points: int, held: int, area: int = 9) -> None:
        """A causal convolution: its past, its input behind it and as much workspace, its output, and what is
        `held` meanwhile.
        """
        context = CONTEXT * self.past
        self.remembered += context * width_in * points
        weights = area * (1 + context) * width_in * width_out
        self.peak(held + 2 * width_in * (t + context) * points + width_out * t * points + weights)

    def blocks(self, width_in: int, width_out: int, count: int, t: int, points: int, held: int) -> None:
        for wide in (width_in, *[width_out] * (count - 1)):
            self.conv(wide, width_out, t, points, held + wide * t * points)
            self.conv(width_out, width_out, t, points, held + (wide + width_out) * t * points)

    def middle(self, width: int, points: int, side: int) -> None:
        """Two residual blocks and an attention over the `side` points of one frame, its queries and scores in
        float32.
        """
        self.blocks(width, width, 2, 1, points, held=width * points)
        self.peak(16 * width * points)
        self.scores = 3 * 4 * side * points

    def bytes(self, dtype: torch.dtype) -> int:
        return ((self.remembered + self.alive) * dtype.itemsize + self.scores) * 9 // 8
