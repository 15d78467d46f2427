"""The layers of Wan2.2's video VAE: causal in time, streamed chunk by chunk (see streaming.py), named as in
the released state dict. Whole videos, tiles, latent statistics and errors about a request are in wan.py.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import VAEConfig
from ..errors import CheckpointError
from .shortcuts import add_averaged, add_duplicated
from .streaming import ChannelNorm, Stream, causal_conv, doubled, each_frame, streaming_ops


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, causal 3x3x3; the input is added, through a pointwise convolution where the width
    changes.
    """

    def __init__(self, width_in: int, width_out: int, ops: Any, **place: Any) -> None:
        super().__init__()
        conv = {"kernel_size": 3, "padding": (0, 1, 1)} | place
        # Keys are positions in the released nn.Sequential; activations and dropout between them have no
        # tensors.
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(width_in, 3, **place),
                "2": ops.Conv3d(width_in, width_out, **conv),
                "3": ChannelNorm(width_out, 3, **place),
                "6": ops.Conv3d(width_out, width_out, **conv),
            }
        )
        self.shortcut = ops.Conv3d(width_in, width_out, 1, **place) if width_in != width_out else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        layer = self.residual
        h = causal_conv(layer["2"], x, stream, layer["0"])
        h = causal_conv(layer["6"], h, stream, layer["3"])
        return h.add_(x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nn.Module):
    """One head over all points of a frame; frames do not see each other."""

    def __init__(self, width: int, ops: Any, **place: Any) -> None:
        super().__init__()
        self.norm = ChannelNorm(width, 2, **place)
        self.to_qkv = ops.Conv2d(width, 3 * width, 1, **place)
        self.proj = ops.Conv2d(width, width, 1, **place)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return each_frame(self.attend, x).add_(x)

    def attend(self, x: Tensor) -> Tensor:
        """[n, c, h, w] to what is added to it."""
        q, k, v = rearrange(
            self.to_qkv(self.norm(x)), "n (three c) h w -> three n 1 (h w) c", three=3
        ).unbind()
        # Not ops.attention: a head as wide as the model (1024) is beyond flash kernels, and this is a sliver
        # of the cost.
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    """Halves space and, with `temporal`, time; a video's first frame keeps its own time step."""

    def __init__(self, width: int, temporal: bool, ops: Any, **place: Any) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), ops.Conv2d(width, width, 3, stride=2, **place)
        )
        self.time_conv = ops.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1), **place) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = each_frame(self.resample, x)
        if self.time_conv is None:
            return x
        if stream.first:
            stream.keep(self.time_conv, x)
            return x
        return causal_conv(self.time_conv, x, stream, context=1)


class Upsample(nn.Module):
    """Doubles space and, with `temporal`, time; a video's first frame stays one frame, and unseen by the
    doubling.
    """

    def __init__(self, width: int, temporal: bool, ops: Any, **place: Any) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": ops.DoublingConv2d(width, width, 3, padding=1, **place)})
        self.time_conv = ops.Conv3d(width, 2 * width, (3, 1, 1), **place) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None and not stream.first:
            x = rearrange(causal_conv(self.time_conv, x, stream), "b (two c) t h w -> b c (t two) h w", two=2)
        return doubled(self.resample["1"], x, stream)


class DownLevel(nn.Module):
    """One encoder level: residual blocks, then a step down unless it is the last; an averaged copy of the
    input is added.
    """

    def __init__(
        self, width_in: int, width_out: int, blocks: int, space: int, temporal: bool, ops: Any, **place: Any
    ) -> None:
        super().__init__()
        self.space, self.time = space, 2 if temporal else 1
        if width_in * self.time * space**2 % width_out:
            raise CheckpointError(
                f"VAE encoder widths {width_in} -> {width_out} do not divide into groups; expected Wan2.2's "
                "layout."
            )
        layers: list[nn.Module] = [
            ResidualBlock(width_out if i else width_in, width_out, ops, **place) for i in range(blocks)
        ]
        if space > 1:
            layers.append(Downsample(width_out, temporal, ops, **place))
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, stream)
        return add_averaged(y, x, self.time, self.space)


class UpLevel(nn.Module):
    """One decoder level: residual blocks, then, unless it is the last, a step up and a repeated copy of the
    input.
    """

    def __init__(
        self, width_in: int, width_out: int, blocks: int, space: int, temporal: bool, ops: Any, **place: Any
    ) -> None:
        super().__init__()
        self.space, self.time = space, 2 if temporal else 1
        layers: list[nn.Module] = [
            ResidualBlock(width_out if i else width_in, width_out, ops, **place) for i in range(blocks)
        ]
        if space > 1:
            if width_out * self.time * space**2 % width_in:
                raise CheckpointError(
                    f"VAE decoder widths {width_in} -> {width_out} do not divide into groups; expected "
                    "Wan2.2's layout."
                )
            layers.append(Upsample(width_out, temporal, ops, **place))
        self.upsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = x
        for layer in self.upsamples:
            y = layer(y, stream)
        return add_duplicated(y, x, self.time, self.space) if self.space > 1 else y


def middle(width: int, ops: Any, **place: Any) -> nn.ModuleList:
    """The coarsest level's two residual blocks with attention between them."""
    return nn.ModuleList(
        [
            ResidualBlock(width, width, ops, **place),
            SpatialAttention(width, ops, **place),
            ResidualBlock(width, width, ops, **place),
        ]
    )


def head(width: int, channels: int, ops: Any, **place: Any) -> nn.ModuleDict:
    """The last norm and convolution of either side."""
    conv = ops.Conv3d(width, channels, 3, padding=(0, 1, 1), **place)
    return nn.ModuleDict({"0": ChannelNorm(width, 3, **place), "2": conv})


class Encoder(nn.Module):
    """Patchified frames [b, 3 patch^2, t, H/patch, W/patch] to mean and log-variance, [b, 2 latent, t', h,
    w].
    """

    def __init__(self, config: VAEConfig, ops: Any, **place: Any) -> None:
        super().__init__()
        ops = streaming_ops(ops)
        widths = config.encoder_widths
        self.conv1 = ops.Conv3d(3 * config.patch**2, widths[0], 3, padding=(0, 1, 1), **place)
        self.downsamples = nn.ModuleList(
            DownLevel(a, b, config.encoder_blocks, space, temporal, ops, **place)
            for a, b, (space, temporal) in zip((widths[0], *widths), widths, down_steps(config), strict=False)
        )
        self.middle = middle(widths[-1], ops, **place)
        self.head = head(widths[-1], 2 * config.latent_channels, ops, **place)

    def reduce(self, x: Tensor, stream: Stream) -> Tensor:
        """The levels: [b, 3 patch^2, t, H/patch, W/patch] -> features [b, width, t', h, w]."""
        x = causal_conv(self.conv1, x, stream)
        for layer in self.downsamples:
            x = layer(x, stream)
        return x

    def leave(self, x: Tensor, stream: Stream) -> Tensor:
        """Features to moments, at the latent's size; every point sees its whole frame."""
        for layer in self.middle:
            x = layer(x, stream)
        return causal_conv(self.head["2"], x, stream, self.head["0"])


class Decoder(nn.Module):
    """Latent frames [b, latent, t, h, w] to patchified frames [b, 3 patch^2, t', H/patch, W/patch]."""

    def __init__(self, config: VAEConfig, ops: Any, **place: Any) -> None:
        super().__init__()
        ops = streaming_ops(ops)
        widths = config.decoder_widths[::-1]
        self.conv1 = ops.Conv3d(config.latent_channels, widths[0], 3, padding=(0, 1, 1), **place)
        self.middle = middle(widths[0], ops, **place)
        self.upsamples = nn.ModuleList(
            UpLevel(a, b, config.decoder_blocks + 1, space, temporal, ops, **place)
            for a, b, (space, temporal) in zip((widths[0], *widths), widths, up_steps(config), strict=False)
        )
        self.head = head(widths[-1], 3 * config.patch**2, ops, **place)

    def enter(self, x: Tensor, stream: Stream) -> Tensor:
        """Latent to features [b, width, t, h, w], at the latent's size; every point sees its whole frame."""
        x = causal_conv(self.conv1, x, stream)
        for layer in self.middle:
            x = layer(x, stream)
        return x

    def expand(self, x: Tensor, stream: Stream) -> Tensor:
        """The levels, local in space: features to [b, 3 patch^2, t', H/patch, W/patch]."""
        for layer in self.upsamples:
            x = layer(x, stream)
        return causal_conv(self.head["2"], x, stream, self.head["0"])


def down_steps(config: VAEConfig) -> tuple[tuple[int, bool], ...]:
    """(space factor, halves time) of each encoder level; the last keeps its size."""
    return (*((2, temporal) for temporal in config.temporal), (1, False))


def up_steps(config: VAEConfig) -> tuple[tuple[int, bool], ...]:
    """(space factor, doubles time) of each decoder level, coarsest first; the last keeps its size."""
    return (*((2, temporal) for temporal in reversed(config.temporal)), (1, False))
