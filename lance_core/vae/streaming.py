"""Convolutions that run over a video chunk by chunk: what a chunk needs of the past, norms, memory layout.

Every function works on one chunk of frames, [b, channels, t, h, w], and finds what came before it in the
`Stream` it is given. No module keeps state of its own, so two passes may share the weights, and an aborted
one leaves nothing behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..model import kernels

CONTEXT = 2  # frames a causal kernel of 3 looks back
NORM_SLICE = 1 << 19  # numbers
FEW_POINTS = 300  # in a frame, for every byte of a number; measured on a CPU
# points of a frame from which a doubling's folded kernel saves more than folding costs; measured on a CPU
FOLD_FROM = 1024


def layout(x: Tensor) -> torch.memory_format:
    """The memory layout for activations of x's shape on its device: channels last where that is faster.

    cuDNN's half-precision kernels want it, and otherwise reorder every input and output. On a CPU it is
    faster, too, but not for few points, where reordering the weights takes longer. Weights stay as they come,
    because ComfyUI may hand over new ones at any call.
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

    `first` and `last` say where in the video the current chunk is. The first frame is special throughout
    Wan's VAE: it is a latent frame by itself, so the layers that change the frame rate pass it through. After
    the last chunk nothing is kept: a single image costs no cache at all.

    folded: kernels of the doubling convolutions, folded at their first chunk (`doubling_conv`).
    """

    def __init__(self) -> None:
        self.first = True
        self.last = False
        self.folded: dict[nn.Module, Tensor] = {}
        self._past: dict[nn.Module, Tensor] = {}

    def take(self, conv: nn.Module) -> Tensor | None:
        """The frames kept for `conv`, and no longer kept here, so that they can be freed after use."""
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

    def forward(self, x: Tensor, out: Tensor | None = None, silu: bool = False) -> Tensor:
        """Normalised x, through SiLU if asked for, written to `out` if given. The norm is float32, the
        product rounded once to x's dtype.
        """
        out = torch.empty_like(x) if out is None else out
        if kernels.usable(x) and kernels.channel_norm_silu(x, self.gamma.to(x.device), out, silu):
            return out
        self._plain(x, out)
        return F.silu(out, inplace=True) if silu else out

    def _plain(self, x: Tensor, out: Tensor) -> Tensor:
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
    conv: nn.Module, x: Tensor, stream: Stream, norm: nn.Module | None = None, context: int = CONTEXT
) -> Tensor:
    """`conv` over x preceded by its last `context` frames, zeros before the video; with `norm`, over
    silu(norm(x)).

    The normalised frames are written straight behind the remembered ones, so the chunk is never concatenated.
    """
    b, c, t, h, w = x.shape
    past = stream.take(conv)
    known = 0 if past is None else past.shape[2]
    before = context if known or t > 1 else 0  # a frame alone needs no zeros: see `streaming_ops`
    frames = torch.empty(b, c, before + t, h, w, dtype=x.dtype, device=x.device, memory_format=layout(x))
    frames[:, :, : before - known] = 0
    if past is not None:
        frames[:, :, before - known : before] = past
    del past
    new = frames[:, :, before:]
    if norm is None:
        new.copy_(x)
    else:
        norm(x, out=new, silu=True)
    stream.keep(conv, frames[:, :, -context:])
    return conv(frames)


# The pass that is being run: a convolution's class is ComfyUI's, which knows nothing of a stream.
_FOLDED: ContextVar[dict[nn.Module, Tensor]] = ContextVar("folded")


def doubled(conv: nn.Module, x: Tensor, stream: Stream) -> Tensor:
    """A DoublingConv2d on every frame of [b, c, t, h, w]."""
    token = _FOLDED.set({} if stream.first and stream.last else stream.folded)
    try:
        return each_frame(conv, x)
    finally:
        _FOLDED.reset(token)


@cache
def streaming_ops(ops: Any) -> SimpleNamespace:
    """`ops` with convolutions that know this VAE's special cases. As subclasses of `ops`' own, they leave
    casting, patching and streaming of weights to ComfyUI.
    """

    class Conv3d(ops.Conv3d):
        """Before a single frame are only zeros, so the kernel's last slice is enough: a third of the work."""

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
                folded = _FOLDED.get()
                kernel = folded.get(self)
                if kernel is None:
                    kernel = folded[self] = fold(weight)
                return doubling_conv(x, kernel, bias)
            return super()._conv_forward(
                F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, bias, *args, **kwargs
            )

    return SimpleNamespace(Conv2d=ops.Conv2d, Conv3d=Conv3d, DoublingConv2d=DoublingConv2d)


def fold(weight: Tensor) -> Tensor:
    """A 3x3 kernel over an enlarged picture as four 2x2 ones over the plain one: [4 out, in, 2, 2]."""
    kernel = _fold(_fold(weight.permute(2, 3, 0, 1).contiguous()).transpose(0, 1))
    return rearrange(kernel, "(q l) (p k) o i -> (p q o) k l i", p=2, q=2).permute(0, 3, 1, 2)


def doubling_conv(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """[n, c, h, w] enlarged twice, every point to 2x2, then a padded 3x3 convolution; [n, out, 2 h, 2 w].

    Of three neighbours in an enlarged row two are the same point. So each of the four results at a point is a
    2x2 kernel over x itself, whose taps are sums of the 3x3 one's (`fold`): 4/9 of the work, and nothing
    enlarged in memory.
    """
    n, _, h, w = x.shape
    corners = F.conv2d(
        x, kernel, None if bias is None else bias.repeat(4), padding=1
    )  # of the points: one more than those
    result = torch.empty(
        n, len(kernel) // 4, 2 * h, 2 * w, dtype=x.dtype, device=x.device, memory_format=layout(x)
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
