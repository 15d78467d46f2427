"""The layers of Wan2.2's video VAE: causal in time, streamed chunk by chunk, named as in the released state
dict.

Every module here works on one chunk of frames, [b, channels, t, h, w], and finds what came before it in the
`Stream` it is handed. No module keeps state of its own, so two passes may share the weights and an abandoned
one leaves nothing behind. Whole videos, tiles, latent statistics and errors about a request are vae.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import VAEConfig
from ..errors import CheckpointError

CONTEXT = 2  # frames a causal kernel of 3 looks back
NORM_SLICE = 1 << 19  # numbers
FEW_POINTS = 300  # in a frame, for every byte of a number; measured on a CPU
# points of a frame from which a doubling's folded kernel saves more than folding costs; measured on a CPU
FOLD_FROM = 1024


def layout(x: Tensor) -> torch.memory_format:
    """How activations of x's shape lie in memory on its device: a point's channels side by side where kernels
    like that.

    cuDNN's half-precision kernels want it, and otherwise reorder every input and output. On a CPU it is
    faster, too, but not
    for few points: weights take longer to reorder. Those stay as they come, as a host may hand over new ones
    at any call.
    """
    if x.is_cpu:
        suits = x.shape[-2] * x.shape[-1] >= FEW_POINTS * x.element_size()
    else:  # other backends would reorder everything
        suits = x.device.type in ("cuda", "meta") and torch.version.hip is None
    if not suits:
        return torch.contiguous_format
    return torch.channels_last_3d if x.ndim == 5 else torch.channels_last


class Stream:
    """The past of one pass over time: for each causal convolution, the last frames it was given.

    `first` and `last` tell where in the video the current chunk stands. The first frame is special throughout
    Wan's VAE: it is a latent frame by itself, so the layers that change the frame rate let it through. After
    the last
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
    """RMS norm over the channels (axis 1) at each point, times `gamma` ([c, 1, 1, 1] for video, [c, 1, 1] for
    frames).
    """

    def __init__(self, width: int, axes: int, device=None, dtype=None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * axes, device=device, dtype=dtype))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalised x, written to `out` if given. The norm is float32, the product rounded once to x's
        dtype.
        """
        out = torch.empty_like(x) if out is None else out
        if not x.is_cpu or x.dtype == torch.float32:
            torch.mul(x, _inverse_rms(x), out=out)
            return out.mul_(self.gamma.to(device=x.device, dtype=x.dtype))
        # A CPU calculates with unlike dtypes by way of float32 copies of everything: here one, of what fits
        # into its caches.
        gamma = self.gamma.to(device=x.device, dtype=torch.float32)
        rows = max(1, NORM_SLICE * x.shape[-2] // x.numel())
        for part, place in zip(x.split(rows, dim=-2), out.split(rows, dim=-2), strict=True):
            wide = part.float()
            place.copy_(wide.mul_(_inverse_rms(wide)).mul_(gamma))
        return out


def _inverse_rms(x: Tensor) -> Tensor:
    """One over the root mean square of the channels (axis 1), float32; finite for zeros."""
    return math.sqrt(x.shape[1]) / torch.linalg.vector_norm(
        x, dim=1, keepdim=True, dtype=torch.float32
    ).clamp_min_(1e-12)


def causal_conv(
    conv: nn.Module, x: Tensor, stream: Stream, norm: ChannelNorm | None = None, context: int = CONTEXT
) -> Tensor:
    """`conv` over x preceded by its last `context` frames, zeros before the video; with `norm`, over
    silu(norm(x)).

    The normalised frames are written straight behind the remembered ones, so the chunk is never concatenated.
    """
    b, c, t, h, w = x.shape
    past = stream.take(conv)
    known = 0 if past is None else past.shape[2]
    before = context if known or t > 1 else 0  # a frame alone needs no zeros: see `_causal`
    frames = torch.empty(b, c, before + t, h, w, dtype=x.dtype, device=x.device, memory_format=layout(x))
    frames[:, :, : before - known] = 0
    if past is not None:
        frames[:, :, before - known : before] = past
    del past
    new = frames[:, :, before:]
    if norm is None:
        new.copy_(x)
    else:
        F.silu(norm(x, out=new), inplace=True)
    stream.keep(conv, frames[:, :, -context:])
    return conv(frames)


@cache
def _causal(ops: type) -> SimpleNamespace:
    """`ops` with convolutions that know this VAE's shortcuts. A host casts, patches and streams their weights
    as ever.
    """

    class Conv3d(ops.Conv3d):
        """Before one frame alone it takes zeros, and spares them: the kernel's last slice does, a third of
        the work.
        """

        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args, **kwargs) -> Tensor:
            if x.shape[2] > 1 or weight.shape[2] == 1:
                return super()._conv_forward(x, weight, bias, *args, **kwargs)
            return F.conv2d(
                x.squeeze(2), weight[:, :, -1], bias, self.stride[1:], self.padding[1:]
            ).unsqueeze(2)

    class DoublingConv2d(ops.Conv2d):
        """3x3 over frames enlarged twice, every point to 2x2."""

        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args, **kwargs) -> Tensor:
            if x.shape[-2] * x.shape[-1] >= FOLD_FROM:
                return doubling_conv(x, weight, bias)
            return super()._conv_forward(
                F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, bias, *args, **kwargs
            )

    return SimpleNamespace(Conv2d=ops.Conv2d, Conv3d=Conv3d, DoublingConv2d=DoublingConv2d)


def doubling_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, c, h, w] enlarged twice, every point to 2x2, then a padded 3x3 convolution; [n, out, 2 h, 2 w].

    Of three neighbours in an enlarged row two are the same point. So each of the four results at a point is a
    2x2 kernel over x itself, whose taps are sums of the 3x3 one's: 4/9 of the work, and nothing enlarged in
    memory.
    """
    n, _, h, w = x.shape
    kernel = _fold(_fold(weight.permute(2, 3, 0, 1).contiguous()).transpose(0, 1))
    kernel = rearrange(kernel, "(q l) (p k) o i -> (p q o) k l i", p=2, q=2).permute(0, 3, 1, 2)
    corners = F.conv2d(
        x, kernel, None if bias is None else bias.repeat(4), padding=1
    )  # of the points: one more than those
    result = torch.empty(
        n, len(weight), 2 * h, 2 * w, dtype=x.dtype, device=x.device, memory_format=layout(x)
    )
    for (p, q), part in zip(product(range(2), repeat=2), corners.chunk(4, dim=1), strict=True):
        result[..., p::2, q::2] = part[..., p : p + h, q : q + w]
    return result


def _fold(taps: Tensor) -> Tensor:
    """The three taps of a row (axis 0) over an enlarged row as two over the plain one, for its even points
    and its odd.
    """
    a, b, c = taps
    return torch.stack([a, b + c, a + b, c])


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, causal 3x3x3; the input is added, through a pointwise convolution where the width
    changes.
    """

    def __init__(self, width_in: int, width_out: int, ops, **place) -> None:
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

    def __init__(self, width: int, ops, **place) -> None:
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

    def __init__(self, width: int, temporal: bool, ops, **place) -> None:
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

    def __init__(self, width: int, temporal: bool, ops, **place) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": ops.DoublingConv2d(width, width, 3, padding=1, **place)})
        self.time_conv = ops.Conv3d(width, 2 * width, (3, 1, 1), **place) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None and not stream.first:
            x = rearrange(causal_conv(self.time_conv, x, stream), "b (two c) t h w -> b c (t two) h w", two=2)
        return each_frame(self.resample["1"], x)


def each_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A two-dimensional layer on every frame of [b, c, t, h, w]."""
    if (
        x.shape[2] == 1
    ):  # torch tells the layout by strides, those of axes of length 1 included, and reshaping invents these
        return layer(x.squeeze(2)).unsqueeze(2)
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    return rearrange(
        layer(frames.contiguous(memory_format=layout(frames))), "(b t) c h w -> b c t h w", b=x.shape[0]
    )


def add_averaged(y: Tensor, x: Tensor, time: int, space: int) -> Tensor:
    """y plus a finer level's x at y's size and width, without parameters; in place.

    Cells of time x space x space points are folded into x's channels, and those averaged in groups. A first
    frame alone is averaged with zeros before it, as the weights were trained.
    """
    cell = time * space * space
    group = x.shape[1] * cell // y.shape[1]
    shared = math.gcd(group, cell)
    places = _places(x, time, space)
    # Channels of y that are `cell / shared` apart read the same places, `group / shared` channels apart.
    for first in range(cell // shared):
        group_at = range(first * group, (first + 1) * group)
        parts = [
            place[:, at // cell :: group // shared].float()
            for at in group_at
            if (place := places[at % cell]) is not None
        ]
        if parts:
            y[:, first :: cell // shared] += (sum(parts[1:], parts[0]) / group).to(y.dtype)
    return y


def add_duplicated(y: Tensor, x: Tensor, time: int, space: int) -> Tensor:
    """y plus a coarser level's x at y's size and width, without parameters; in place.

    x's channels are repeated, then unfolded into cells of time x space x space points. A first frame alone is
    the last of its cells.
    """
    cell = time * space * space
    repeats = y.shape[1] * cell // x.shape[1]
    shared = math.gcd(repeats, cell)
    sources = [
        x[:, first :: cell // shared].contiguous(memory_format=layout(x)) for first in range(cell // shared)
    ]
    for at, place in enumerate(_places(y, time, space)):
        for first in range(repeats // shared) if place is not None else ():
            place[:, first :: repeats // shared] += sources[(first * cell + at) // repeats]
    return y


def _places(x: Tensor, time: int, space: int) -> list[Tensor | None]:
    """The views of x, one point of each cell in every one, in the order cells are folded; None where a first
    frame has none.
    """
    absent = -x.shape[2] % time
    return [
        None if i < absent else x[:, :, i - absent :: time, j::space, k::space]
        for i, j, k in product(range(time), range(space), range(space))
    ]


class DownLevel(nn.Module):
    """One encoder level: residual blocks, then a step down unless it is the last; an averaged copy of the
    input is added.
    """

    def __init__(
        self, width_in: int, width_out: int, blocks: int, space: int, temporal: bool, ops, **place
    ) -> None:
        super().__init__()
        self.space, self.time = space, 2 if temporal else 1
        if width_in * self.time * space**2 % width_out:
            raise CheckpointError(
                f"VAE encoder widths {width_in} -> {width_out} do not divide into groups; expected Wan2.2's "
                "layout."
            )
        layers = [ResidualBlock(width_out if i else width_in, width_out, ops, **place) for i in range(blocks)]
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
        self, width_in: int, width_out: int, blocks: int, space: int, temporal: bool, ops, **place
    ) -> None:
        super().__init__()
        self.space, self.time = space, 2 if temporal else 1
        layers = [ResidualBlock(width_out if i else width_in, width_out, ops, **place) for i in range(blocks)]
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


def middle(width: int, ops, **place) -> nn.ModuleList:
    """The coarsest level's two residual blocks with attention between them."""
    return nn.ModuleList(
        [
            ResidualBlock(width, width, ops, **place),
            SpatialAttention(width, ops, **place),
            ResidualBlock(width, width, ops, **place),
        ]
    )


def head(width: int, channels: int, ops, **place) -> nn.ModuleDict:
    """The last norm and convolution of either side."""
    conv = ops.Conv3d(width, channels, 3, padding=(0, 1, 1), **place)
    return nn.ModuleDict({"0": ChannelNorm(width, 3, **place), "2": conv})


class Encoder(nn.Module):
    """Patchified frames [b, 3 patch^2, t, H/patch, W/patch] to mean and log-variance, [b, 2 latent, t', h,
    w].
    """

    def __init__(self, config: VAEConfig, ops, **place) -> None:
        super().__init__()
        ops = _causal(ops)
        widths = config.encoder_widths
        self.conv1 = ops.Conv3d(3 * config.patch**2, widths[0], 3, padding=(0, 1, 1), **place)
        self.downsamples = nn.ModuleList(
            DownLevel(a, b, config.encoder_blocks, space, temporal, ops, **place)
            for a, b, (space, temporal) in zip((widths[0], *widths), widths, down_steps(config), strict=False)
        )
        self.middle = middle(widths[-1], ops, **place)
        self.head = head(widths[-1], 2 * config.latent_channels, ops, **place)

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
        ops = _causal(ops)
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


def patchify(x: Tensor, patch: int) -> Tensor:
    """[b, 3, t, H, W] to [b, 3 patch^2, t, H/patch, W/patch]; columns come before rows in the channel order."""
    return rearrange(x, "b c t (h q) (w r) -> b (c r q) t h w", q=patch, r=patch)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=patch, r=patch)
