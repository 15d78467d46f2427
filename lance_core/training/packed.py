"""Several samples as one pass: two streams of tokens, and the blocks that attention runs over.

The understanding stream holds text, every visual block's two markers and ViT embeddings; the generation
stream holds latent tokens. Both are in the order of the samples and their segments, markers first.
Attention works in sequence order, all streams together: there, "everything before block j and block j itself"
is one slice, so a block attends without a mask, and samples that are packed together never meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RequestError
from ..model.sequence import MARKERS, Kind, TargetSegment, TextSegment, VisualSegment
from .sample import Sample, placed


class Block(NamedTuple):
    """Queries `start` to `stop` (sequence order) see keys `first` to `stop`; causal inside if text."""

    first: int
    start: int
    stop: int
    causal: bool


class LatentBlock(NamedTuple):
    """A clean or target block of the generation stream.

    sample: its number. data: [t, h, w, 48]. clean_frames: those at t = 0; None means all, a reference.
    """

    sample: int
    data: Tensor
    clean_frames: tuple[int, ...] | None

    @property
    def noisy_tokens(self) -> Tensor:
        """bool [t * h * w]: tokens that have a loss."""
        t, h, w = self.data.shape[:3]
        frames = torch.full((t,), self.clean_frames is not None)
        frames[list(self.clean_frames or ())] = False
        return frames.repeat_interleave(h * w)


@dataclass(frozen=True, eq=False)
class Packed:
    """Samples laid out for a pass.

    ids: [u] tokens of the understanding stream, pads where ViT embeddings go; vit_places, vit_embeds: which
        rows those are, and what goes there [v, hidden].
    latents: the generation stream's blocks.
    position: [3, u + g] rope positions, understanding stream first.
    order: [u + g] the token of [understanding | generation] at each place of the sequence order.
    blocks: of attention.
    predicts: [k] rows of the understanding stream after which a token of an answer comes; labels: [k] that
        token; answer_lengths: [k] of the answer it is in.
    """

    ids: Tensor
    vit_places: Tensor
    vit_embeds: Tensor | None
    latents: list[LatentBlock]
    position: Tensor
    order: Tensor
    blocks: list[Block]
    predicts: Tensor
    labels: Tensor
    answer_lengths: Tensor

    @cached_property
    def noisy_tokens(self) -> Tensor:
        """[m] rows of the generation stream that have a loss."""
        noisy = [block.noisy_tokens for block in self.latents]
        return torch.cat(noisy).nonzero()[:, 0] if noisy else torch.empty(0, dtype=torch.long)

    @classmethod
    def of(cls, samples: Sequence[Sample], tokens_per_second: float, as_released: bool = False) -> Packed:
        """Lay samples end to end.

        Raises:
            RequestError: no samples, or one without anything to learn.
        """
        if not samples:
            raise RequestError("no samples came; at least one is needed for a loss")
        layout = _Layout(tokens_per_second, as_released)
        for number, sample in enumerate(samples):
            if not sum(sample.loss_tokens):
                raise RequestError(f"sample {number} has neither a target nor an answer: nothing to learn")
            layout.add(number, sample)
        return layout.packed()


class _Layout:
    """What `Packed.of` collects."""

    def __init__(self, tokens_per_second: float, as_released: bool) -> None:
        self.rate, self.as_released = tokens_per_second, as_released
        self.ids: list[int] = []
        self.vit: list[tuple[int, Tensor]] = []
        self.latents: list[LatentBlock] = []
        self.gen_tokens = 0
        self.places: tuple[list[Tensor], list[Tensor]] = ([], [])  # of both streams
        self.order: list[Tensor] = []  # generation tokens as -1 - their number, until u is known
        self.length = 0
        self.blocks: list[Block] = []
        self.answers: list[tuple[int, tuple[int, ...]]] = []

    def add(self, number: int, sample: Sample) -> None:
        first = self.length
        for segment, position in placed(sample, self.rate, self.as_released):
            if isinstance(segment, TextSegment):
                self._understand(list(segment.ids), position)
            else:
                self._visual(number, sample, segment, position)
            causal = isinstance(segment, TextSegment)
            start, self.length = self.length, self.length + segment.length
            last = self.blocks[-1] if self.blocks else None
            if causal and last and last.causal and last.stop == start and last.first == first:
                self.blocks[-1] = last._replace(stop=self.length)
            else:
                self.blocks.append(Block(first, start, self.length, causal))
        if sample.answer:
            self.answers.append((len(self.ids) - len(sample.answer), sample.answer))

    def _understand(self, ids: list[int], position: Tensor) -> None:
        self.order.append(torch.arange(len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.places[0].append(position)

    def _visual(
        self, number: int, sample: Sample, segment: VisualSegment | TargetSegment, position: Tensor
    ) -> None:
        start, end, pad = sample.sequence.start, sample.sequence.end, sample.sequence.pad
        if isinstance(segment, VisualSegment) and segment.kind is Kind.VIT:
            self.vit.append((len(self.ids) + MARKERS, segment.data))
            self._understand([start, end, *[pad] * segment.visual], position)
            return
        self._understand([start, end], position[:, :MARKERS])
        data = segment.data if isinstance(segment, VisualSegment) else sample.latent
        if data is None or data.shape[:3] != segment.grid:
            shape = None if data is None else list(data.shape)
            raise RequestError(
                f"sample {number} has a block of {segment.grid} latent cells and a latent of shape {shape}"
            )
        clean = sample.clean_frames if isinstance(segment, TargetSegment) else None
        self.latents.append(LatentBlock(number, data, clean))
        self.order.append(-1 - torch.arange(self.gen_tokens, self.gen_tokens + segment.visual))
        self.gen_tokens += segment.visual
        self.places[1].append(position[:, MARKERS:])

    def packed(self) -> Packed:
        """The finished layout."""
        order = torch.cat(self.order)
        order = torch.where(order < 0, len(self.ids) - 1 - order, order)
        vit_places = [torch.arange(start, start + len(data)) for start, data in self.vit]
        predicts = [torch.arange(at - 1, at - 1 + len(ids)) for at, ids in self.answers]
        nothing = torch.empty(0, dtype=torch.long)
        return Packed(
            ids=torch.tensor(self.ids),
            vit_places=torch.cat(vit_places) if vit_places else nothing,
            vit_embeds=torch.cat([data for _, data in self.vit]) if self.vit else None,
            latents=self.latents,
            position=torch.cat([*self.places[0], *self.places[1]], dim=1),
            order=order,
            blocks=self.blocks,
            predicts=torch.cat(predicts) if predicts else nothing,
            labels=torch.tensor([i for _, ids in self.answers for i in ids], dtype=torch.long),
            answer_lengths=torch.tensor([len(ids) for _, ids in self.answers for _ in ids]),
        )
