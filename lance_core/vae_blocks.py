"""The layers of Wan2.2's video VAE: causal in time, streamed chunk by chunk, named as in the released state dict.

Every module here works on one chunk of frames, [b, channels, t, h, w], and finds what came before it in the `Stream`
it is handed. No module keeps state of its own, so two passes may share the weights and an abandoned one leaves nothing
behind. Whole videos, tiles, latent statistics and errors about a request are vae.py's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from .config import VAEConfig
from .errors import CheckpointError

CONTEXT = 2  # frames a causal kernel of 3 looks back


class Stream:
    """The past of one pass over time: for each causal convolution, the last frames it was given.

    `first` and `last` tell where in the video the current chunk stands. The first frame is special throughout
    Wan's VAE: it is a latent frame by itself, so the layers that change the frame rate let it through. After the last
    chunk nobody looks back, so nothing is kept: a single image costs no cache at all.
    """

    def __init__(self) -> None:
        self.first = True
        self.last = False
        self._past: dict[nn.Module, Tensor] = {}

    def take(self, conv: nn.Module) -> Tensor | None:
        """The frames kept for `conv`, handed over: they can be freed as soon as they are used."""
        return self._past.pop(conv, None)

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        if not self.last:
            self._past[conv] = frames.clone()  # a view would keep the whole chunk alive


class ChannelNorm(nn.Module):
    """RMS norm over the channels (axis 1) at each point, times `gamma` ([c, 1, 1, 1] for video, [c, 1, 1] for frames)."""

    def __init__(self, width: int, axes: int, device=None, dtype=None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * axes, device=device, dtype=dtype))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalised x, written to `out` if given. The norm is float32, the product rounded once to x's dtype."""
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
        out = torch.empty_like(x) if out is None else out
        torch.mul(x, math.sqrt(x.shape[1]) / norm, out=out)
        return out.mul_(self.gamma.to(device=x.device, dtype=x.dtype))


def causal_conv(conv: nn.Module, x: Tensor, stream: Stream, norm: ChannelNorm | None = None, context: int = CONTEXT) -> Tensor:
    """`conv` over x preceded by its last `context` frames, zeros before the video; with `norm`, over silu(norm(x)).

    The normalised frames are written straight behind the remembered ones, so the chunk is never concatenated.
    """
    b, c, t, h, w = x.shape
    frames = x.new_empty(b, c, context + t, h, w)
    past = stream.take(conv)
    frames[:, :, :context] = 0 if past is None else past
    del past
    new = frames[:, :, context:]
    if norm is None:
        new.copy_(x)
    else:
        F.silu(norm(x, out=new), inplace=True)
    stream.keep(conv, frames[:, :, -context:])
    return conv(frames)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, causal 3x3x3; the input is added, through a pointwise convolution where the width changes."""

    def __init__(self, width_in: int, width_out: int, ops, **place) -> None:
        super().__init__()
        conv = {"kernel_size": 3, "padding": (0, 1, 1)} | place
        # Keys are positions in the released nn.Sequential; activations and dropout between them have no tensors.
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

    def __init__(self, width: int, ops, **place) -> None:
        super().__init__()
        self.norm = ChannelNorm(width, 2, **place)
        self.to_qkv = ops.Conv2d(width, 3 * width, 1, **place)
        self.proj = ops.Conv2d(width, width, 1, **place)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        b, _, _, h, w = x.shape
        qkv = self.to_qkv(self.norm(rearrange(x, "b c t h w -> (b t) c h w")))
        q, k, v = rearrange(qkv, "n (three c) h w -> three n 1 (h w) c", three=3).unbind()
        # Not ops.attention: a head as wide as the model (1024) is beyond flash kernels, and this is a sliver of the cost.
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=h, w=w))
        return x + rearrange(y, "(b t) c h w -> b c t h w", b=b)


class Downsample(nn.Module):
    """Halves space and, with `temporal`, time; a video's first frame keeps its own time step."""

    def __init__(self, width: int, temporal: bool, ops, **place) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), ops.Conv2d(width, width, 3, stride=2, **place))
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
    """Doubles space and, with `temporal`, time; a video's first frame stays one frame, and unseen by the doubling."""

    def __init__(self, width: int, temporal: bool, ops, **place) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), ops.Conv2d(width, width, 3, padding=1, **place))
        self.time_conv = ops.Conv3d(width, 2 * width, (3, 1, 1), **place) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None and not stream.first:
            x = rearrange(causal_conv(self.time_conv, x, stream), "b (two c) t h w -> b c (t two) h w", two=2)
        return each_frame(self.resample, x)


def each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A two-dimensional layer on every frame of [b, c, t, h, w]."""
    return rearrange(layer(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", b=x.shape[0])


def average_down(x: Tensor, width: int, time: int, space: int) -> Tensor:
    """x at the size and width of a coarser level, without parameters: cells folded into channels, channels averaged in groups.

    A first frame alone is averaged with zeros before it, as the weights were trained.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
    x = rearrange(x, "b c (t i) (h j) (w k) -> b (c i j k) t h w", i=time, j=space, k=space)
    return reduce(x, "b (o g) t h w -> b o t h w", "mean", o=width)


def duplicate_up(x: Tensor, width: int, time: int, space: int, first: bool) -> Tensor:
    """x at the size and width of a finer level, without parameters: channels repeated, then unfolded into cells."""
    x = x.repeat_interleave(width * time * space * space // x.shape[1], dim=1)
    x = rearrange(x, "b (c i j k) t h w -> b c (t i) (h j) (w k)", i=time, j=space, k=space)
    return x[:, :, time - 1 :] if first else x


class DownLevel(nn.Module):
    """One encoder level: residual blocks, then a step down unless it is the last; an averaged copy of the input is added."""

    def __init__(self, width_in: int, width_out: int, blocks: int, space: int, temporal: bool, ops, **place) -> None:
        super().__init__()
        self.width, self.space, self.time = width_out, space, 2 if temporal else 1
        if width_in * self.time * space**2 % width_out:
            raise CheckpointError(f"VAE encoder widths {width_in} -> {width_out} do not divide into groups; expected Wan2.2's layout.")
        layers = [ResidualBlock(width_out if i else width_in, width_out, ops, **place) for i in range(blocks)]
        if space > 1:
            layers.append(Downsample(width_out, temporal, ops, **place))
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, stream)
        return y.add_(average_down(x, self.width, self.time, self.space))


class UpLevel(nn.Module):
    """One decoder level: residual blocks, then, unless it is the last, a step up and a repeated copy of the input."""

    def __init__(self, width_in: int, width_out: int, blocks: int, space: int, temporal: bool, ops, **place) -> None:
        super().__init__()
        self.width, self.space, self.time = width_out, space, 2 if temporal else 1
        layers = [ResidualBlock(width_out if i else width_in, width_out, ops, **place) for i in range(blocks)]
        if space > 1:
            if width_out * self.time * space**2 % width_in:
                raise CheckpointError(f"VAE decoder widths {width_in} -> {width_out} do not divide into groups; expected Wan2.2's layout.")
            layers.append(Upsample(width_out, temporal, ops, **place))
        self.upsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = x
        for layer in self.upsamples:
            y = layer(y, stream)
        return y.add_(duplicate_up(x, self.width, self.time, self.space, stream.first)) if self.space > 1 else y


def middle(width: int, ops, **place) -> nn.ModuleList:
    """The coarsest level's two residual blocks with attention between them."""
    return nn.ModuleList(
        [ResidualBlock(width, width, ops, **place), SpatialAttention(width, ops, **place), ResidualBlock(width, width, ops, **place)]
    )


def head(width: int, channels: int, ops, **place) -> nn.ModuleDict:
    """The last norm and convolution of either side."""
    conv = ops.Conv3d(width, channels, 3, padding=(0, 1, 1), **place)
    return nn.ModuleDict({"0": ChannelNorm(width, 3, **place), "2": conv})


class Encoder(nn.Module):
    """Patchified frames [b, 3 patch^2, t, H/patch, W/patch] to mean and log-variance, [b, 2 latent, t', h, w]."""

    def __init__(self, config: VAEConfig, ops, **place) -> None:
        super().__init__()
        widths = config.encoder_widths
        self.conv1 = ops.Conv3d(3 * config.patch**2, widths[0], 3, padding=(0, 1, 1), **place)
        self.downsamples = nn.ModuleList(
            DownLevel(a, b, config.encoder_blocks, space, temporal, ops, **place)
            for a, b, (space, temporal) in zip((widths[0], *widths), widths, down_steps(config), strict=False)
        )
        self.middle = middle(widths[-1], ops, **place)
        self.head = head(widths[-1], 2 * config.latent_channels, ops, **place)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.leave(self.reduce(x, stream), stream)

    def reduce(self, x: Tensor, stream: Stream) -> Tensor:
        """The levels, local in space: [b, 3 patch^2, t, H/patch, W/patch] to features [b, width, t', h, w]."""
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

    def __init__(self, config: VAEConfig, ops, **place) -> None:
        super().__init__()
        widths = config.decoder_widths[::-1]
        self.conv1 = ops.Conv3d(config.latent_channels, widths[0], 3, padding=(0, 1, 1), **place)
        self.middle = middle(widths[0], ops, **place)
        self.upsamples = nn.ModuleList(
            UpLevel(a, b, config.decoder_blocks + 1, space, temporal, ops, **place)
            for a, b, (space, temporal) in zip((widths[0], *widths), widths, up_steps(config), strict=False)
        )
        self.head = head(widths[-1], 3 * config.patch**2, ops, **place)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.expand(self.enter(x, stream), stream)

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


def patchify(x: Tensor, patch: int) -> Tensor:
    """[b, 3, t, H, W] to [b, 3 patch^2, t, H/patch, W/patch]; columns come before rows in the channel order."""
    return rearrange(x, "b c t (h q) (w r) -> b (c r q) t h w", q=patch, r=patch)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=patch, r=patch)
