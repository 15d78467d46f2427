"""The VAE the way the released code runs it, over the weights of ours, to measure ours against.

What differs from ours: every chunk is joined to its past and then padded in all directions, each time into a
new tensor; norms and what lies between them and the convolution are float32, as autocast has it; images are
enlarged in float32; and each latent frame's result is appended to a copy of all before it. Nothing but the
benchmark and its tests uses this.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..vae.layers import DownLevel, ResidualBlock, SpatialAttention, UpLevel
from ..vae.shortcuts import patchify, unpatchify
from ..vae.streaming import CONTEXT, ChannelNorm
from ..vae.wan import WanVAE

Past = dict[nn.Module, Tensor]


class BaselineVAE:
    """`WanVAE.encode` and `WanVAE.decode` of whole pictures, with their results."""

    def __init__(self, vae: WanVAE) -> None:
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [b, 3, T, H, W] in -1..1 -> the posterior mean, float32 [b, 48, t, h, w]."""
        encoder: Any = self.vae.encoder
        x, time = patchify(pixels, self.vae.config.patch), self.vae.config.temporal_ratio
        past: Past = {}
        out: Tensor | None = None
        for i in range(1 + (pixels.shape[2] - 1) // time):
            chunk = x[:, :, 1 + time * (i - 1) : 1 + time * i] if i else x[:, :, :1]
            chunk = _conv(encoder.conv1, chunk, past)
            for level in encoder.downsamples:
                chunk = _down(level, chunk, past)
            chunk = _normed(encoder.head["2"], encoder.head["0"], _middle(encoder.middle, chunk, past), past)
            out = chunk if out is None else torch.cat([out, chunk], dim=2)
        conv = self.vae.conv1
        assert out is not None  # there is a frame at least
        return F.conv3d(out, conv.weight, conv.bias).chunk(2, dim=1)[0].float()

    def decode(self, latent: Tensor) -> Tensor:
        """Latent [b, 48, t, h, w] -> pixels, float32 [b, 3, T, H, W] in -1..1."""
        decoder: Any = self.vae.decoder
        x = F.conv3d(latent, self.vae.conv2.weight, self.vae.conv2.bias)
        past: Past = {}
        out: Tensor | None = None
        for i in range(latent.shape[2]):
            chunk = _middle(decoder.middle, _conv(decoder.conv1, x[:, :, i : i + 1], past), past)
            for level in decoder.upsamples:
                chunk = _up(level, chunk, past, first=i == 0)
            chunk = _normed(decoder.head["2"], decoder.head["0"], chunk, past)
            out = chunk if out is None else torch.cat([out, chunk], dim=2)
        assert out is not None
        return unpatchify(out, self.vae.config.patch).float().clamp_(-1, 1)


def _norm(norm: ChannelNorm, x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1) * math.sqrt(x.shape[1]) * norm.gamma


def _conv(conv: nn.Conv3d, x: Tensor, past: Past) -> Tensor:
    """A causal convolution over the past and x, which becomes the past in its turn."""
    before, kept = past.get(conv), x[:, :, -CONTEXT:].clone()
    if kept.shape[2] < CONTEXT and before is not None:
        kept = torch.cat([before[:, :, -1:], kept], dim=2)
    missing = CONTEXT
    if before is not None:
        x, missing = torch.cat([before, x], dim=2), CONTEXT - before.shape[2]
    past[conv] = kept
    h, w = (int(side) for side in conv.padding[1:])
    x = F.pad(x, (w, w, h, h, missing, 0))
    return F.conv3d(x.to(conv.weight.dtype), conv.weight, conv.bias)


def _normed(conv: nn.Conv3d, norm: ChannelNorm, x: Tensor, past: Past) -> Tensor:
    return _conv(conv, F.silu(_norm(norm, x)), past)


def _flat(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of frames, by its weights alone: our modules may know shorter ways."""
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)


def _residual(block: ResidualBlock, x: Tensor, past: Past) -> Tensor:
    layer: Any = block.residual
    short = x
    if block.shortcut is not None:
        short = F.conv3d(x, block.shortcut.weight, block.shortcut.bias)
    h = _normed(layer["2"], layer["0"], x, past)
    return _normed(layer["6"], layer["3"], h, past) + short


def _attention(block: SpatialAttention, x: Tensor) -> Tensor:
    b, _, _, h, w = x.shape
    frames = _norm(block.norm, _frames(x)).to(x.dtype)
    q, k, v = rearrange(_flat(block.to_qkv, frames), "n c h w -> n 1 (h w) c").contiguous().chunk(3, dim=-1)
    out = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=h, w=w)
    return _clip(_flat(block.proj, out.contiguous()), b) + x


def _middle(blocks: Any, x: Tensor, past: Past) -> Tensor:
    return _residual(blocks[2], _attention(blocks[1], _residual(blocks[0], x, past)), past)


def _frames(x: Tensor) -> Tensor:
    return rearrange(x, "b c t h w -> (b t) c h w")


def _clip(x: Tensor, b: int) -> Tensor:
    return rearrange(x, "(b t) c h w -> b c t h w", b=b)


def _down(level: DownLevel, x: Tensor, past: Past) -> Tensor:
    kept = x.clone()
    for layer in level.downsamples:
        x = _residual(layer, x, past) if isinstance(layer, ResidualBlock) else _shrink(layer, x, past)
    time, space = _time(level.downsamples), kept.shape[-1] // x.shape[-1]
    cells = F.pad(kept, (0, 0, 0, 0, -kept.shape[2] % time, 0))
    cells = rearrange(
        cells, "b c (t i) (h j) (w k) -> b (c i j k) t h w", i=time, j=space, k=space
    ).contiguous()
    return x + cells.unflatten(1, (x.shape[1], -1)).mean(dim=2)


def _time(layers: Any) -> int:
    """How many frames of a level's finer side go with one of its coarser."""
    return 2 if getattr(layers[-1], "time_conv", None) is not None else 1


def _shrink(layer: Any, x: Tensor, past: Past) -> Tensor:
    x = _clip(_flat(layer.resample.get_submodule("1"), F.pad(_frames(x), (0, 1, 0, 1))), x.shape[0])
    conv = layer.time_conv
    if conv is None:
        return x
    before = past.get(conv)
    past[conv] = (x if before is None else x[:, :, -1:]).clone()
    if before is None:
        return x
    return F.conv3d(torch.cat([before[:, :, -1:], x], dim=2), conv.weight, conv.bias, conv.stride)


def _up(level: UpLevel, x: Tensor, past: Past, first: bool) -> Tensor:
    y = x.clone()
    for layer in level.upsamples:
        y = _residual(layer, y, past) if isinstance(layer, ResidualBlock) else _enlarge(layer, y, past, first)
    time, space = _time(level.upsamples), y.shape[-1] // x.shape[-1]
    if space == 1:
        return y
    wide = x.repeat_interleave(y.shape[1] * time * space**2 // x.shape[1], dim=1)
    wide = rearrange(
        wide, "b (c i j k) t h w -> b c (t i) (h j) (w k)", i=time, j=space, k=space
    ).contiguous()
    return y + (wide[:, :, time - 1 :] if first else wide)


def _enlarge(layer: Any, x: Tensor, past: Past, first: bool) -> Tensor:
    if layer.time_conv is not None and not first:
        both = _conv(layer.time_conv, x, past).unflatten(1, (2, -1))
        x = torch.stack([both[:, 0], both[:, 1]], dim=3).flatten(2, 3)
    frames = F.interpolate(_frames(x).float(), scale_factor=2.0, mode="nearest-exact").to(x.dtype)
    return _clip(_flat(layer.resample.get_submodule("1"), frames), x.shape[0])
