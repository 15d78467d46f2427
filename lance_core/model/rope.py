"""Three-axis rotary positions with modality offsets, and the cos/sin tables made from them once per pass.

Positions are int64 [3, n] (time, row, column) in a segment's storage order: markers first; scaled ones
(`GridScale`) are float32.
Frequencies are rounded to bfloat16, at every compute dtype: these are the ones the weights were trained with.
Source: Qwen2.5-VL's mrope (arXiv 2502.13923, section 2.1.2) and the released Lance inference code's offsets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import LLMConfig
from .sequence import MARKERS, Kind, Role, Segment, Sequence, TargetSegment, TextSegment

VIT_OFFSET = 1000  # where the time axis of ViT tokens starts
SUBJECT_OFFSET = 2000  # where the time axis of subject latents starts
ROPE_CHUNK = 8192  # tokens rotated at once
CPU_ROPE_CHUNK = 512  # the same on a CPU, whose caches should hold their float32 copies; measured


class GridScale(NamedTuple):
    """Positions of latent cells stretched and moved: cell i of an axis stands at shift + i * scale instead of
    at i. Axes are time, row, column; both are in latent cells.
    """

    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def apply(self, grid: Tensor, tokens_per_second: float) -> Tensor:
        """Positions [3, n] counted from the grid's first cell -> float32 of the same shape. A latent frame
        takes `tokens_per_second` positions of the time axis.
        """
        frames = torch.tensor([tokens_per_second, 1.0, 1.0])
        scale, shift = (torch.tensor(part)[:, None] for part in (self.scale, self.shift))
        return grid * scale + shift * frames[:, None]


def _lay_out(segments: tuple[Segment | TargetSegment, ...], tokens_per_second: float) -> list[Tensor]:
    """Positions before any offset: text counts up on all axes, grids span theirs, text goes on after the
    largest.
    """
    position, out = 0, []
    for segment in segments:
        if isinstance(segment, TextSegment):
            out.append(torch.arange(position, position + segment.length).expand(3, -1))
            position += segment.length
            continue
        t, h, w = segment.grid
        frames = (torch.arange(t) * tokens_per_second).long()
        grid = (
            torch.stack(torch.meshgrid(frames, torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)
            + position
            + 1
        )
        end = int(grid.max()) + 1
        out.append(torch.cat([torch.tensor([position, end]).expand(3, -1), grid], dim=1))
        position = end + 1
    return out


def positions(
    sequence: Sequence,
    tokens_per_second: float,
    scale: GridScale | None = None,
    as_trained: bool = False,
) -> list[Tensor]:
    """Positions of every segment, target last; offsets applied when there is a target.

    Understanding has none: the released inference code leaves the offsets out there. as_trained: with them,
    as the released training code lays understanding samples out. scale: of the cells of the target and of
    what it is an edit of; nothing else moves.
    """
    segments = sequence.segments
    out = _lay_out(segments, tokens_per_second)
    if sequence.target is None and not as_trained:
        return out
    for offset, wanted in ((VIT_OFFSET, (Kind.VIT, None)), (SUBJECT_OFFSET, (Kind.CLEAN, Role.SUBJECT))):
        chosen = [i for i, s in enumerate(segments) if s.kind is wanted[0] and wanted[1] in (None, s.role)]
        if chosen:
            shift = torch.tensor([offset - int(out[chosen[0]][0, 0]), 0, 0])[:, None]
            for i in chosen:
                out[i] = out[i] + shift
    if scale is not None:
        edited = [i for i, s in enumerate(segments) if s.kind is Kind.CLEAN and s.role is Role.SOURCE]
        for i in (*edited, -1):
            out[i] = _scaled(out[i], scale, tokens_per_second)
    if sequence.source is not None:
        out[-1] = out[sequence.source]
    return out


def _scaled(position: Tensor, scale: GridScale, tokens_per_second: float) -> Tensor:
    """A visual segment's positions with its cells scaled; its markers stay."""
    markers, grid = position[:, :MARKERS], position[:, MARKERS:]
    first = grid[:, :1]
    return torch.cat([markers.float(), first + scale.apply(grid - first, tokens_per_second)], dim=1)


def unconditional_positions(
    sequence: Sequence, tokens_per_second: float, scale: GridScale | None = None
) -> list[Tensor]:
    """Positions of `sequence.without_caption()`: the context keeps its conditional ones, a gap where the
    caption was; only the target is placed afresh, as if the caption had never been there."""
    kept = [
        p
        for s, p in zip(sequence.segments, positions(sequence, tokens_per_second, scale), strict=True)
        if s.role is not Role.CAPTION
    ]
    return [*kept[:-1], positions(sequence.without_caption(), tokens_per_second, scale)[-1]]


def trained_frequencies(theta: float, width: int) -> Tensor:
    """Rope frequencies as the weights know them: float32 [width / 2], each rounded to bfloat16.

    The released code keeps 1 / theta^(2i/d) in a module buffer, which FSDP rounds in training
    (`buffer_dtype=bfloat16`) and `model.to(bfloat16)` at inference. At the released sizes the exact ones
    differ by up to 0.37 %, which at the time offset of 1000 is 1.15 rad: exact frequencies are wrong
    frequencies. The order of operations is the released one, as it decides what is rounded.
    """
    exact = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return exact.bfloat16().float()


def tables(
    position: Tensor, config: LLMConfig, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 [n, head_dim], of positions [3, n].

    The head's frequencies are split among the three axes by `mrope_section` and repeated for both halves.
    Angles, cos and sin are float32; only the frequencies are rounded (`trained_frequencies`).
    """
    frequencies = trained_frequencies(config.rope_theta, config.head_dim)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(config.mrope_section))
    angles = position.float()[axis].T * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(device), angles.sin().to(device)


def rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write heads x [b, n, heads, width], rotated by cos/sin [b or 1, n, width], to `out`, shaped like x and
    free of it.

    Half-rotation style, in float32. Long sequences go through in chunks, so that the float32 copies of a
    video's queries never exist at once; compiled, there are no such copies.
    """
    if torch.compiler.is_compiling():
        out.copy_(torch.cat(_halves(x, cos, sin), dim=-1))
        return
    half, chunk = x.shape[-1] // 2, CPU_ROPE_CHUNK if x.is_cpu else ROPE_CHUNK
    for begin in range(0, x.shape[1], chunk):
        one = slice(begin, begin + chunk)
        out[:, one, :, :half], out[:, one, :, half:] = _halves(x[:, one], cos[:, one], sin[:, one])


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of the rotated heads, float32. The tables repeat themselves after half the width."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = (table.unsqueeze(-2)[..., : low.shape[-1]] for table in (cos, sin))
    return torch.addcmul(low * cos, high, sin, value=-1), torch.addcmul(high * cos, low, sin)
