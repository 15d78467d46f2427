"""One interleaved sequence of text and visual segments, in order.

Visual segments store their two marker tokens first, then the visual tokens. Attention inside such a block is
all to all, so order does not matter once rope is applied, and the split between the experts is a slice at
index 2. Positions are in rope.py, embeddings in dual_expert.py, text in prompts.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from ..config import Grid

MARKERS = 2  # start and end marker of a visual segment


class Kind(Enum):
    """What a segment is made of; decides its expert and whether attention inside is causal."""

    TEXT = "text"  # understanding expert, causal
    VIT = "vit"  # embeddings of a picture or clip: understanding expert, all to all
    CLEAN = "clean"  # latents of a reference at timestep 0: generation expert, all to all
    TARGET = "target"  # the noisy latents: generation expert, all to all


class Role(Enum):
    """Why a segment is there; decides rope offsets and what the unconditional branch leaves out."""

    TEMPLATE = "template"
    CAPTION = "caption"
    SOURCE = "source"  # of an edit
    SUBJECT = "subject"  # reference of a subject task
    QUESTION = "question"  # the picture or clip an understanding task asks about
    TARGET = "target"


class Branch(Enum):
    """The two passes of classifier-free guidance, in the order they are planned and stored."""

    CONDITIONAL = "conditional"
    UNCONDITIONAL = "unconditional"


@dataclass(frozen=True, eq=False)
class TextSegment:
    """Text tokens."""

    kind: ClassVar[Kind] = Kind.TEXT
    role: Role
    ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class VisualSegment:
    """A picture or clip in the context: two markers, then its visual tokens.

    kind: VIT or CLEAN.
    grid: (t, h, w) visual tokens, merged ViT patches or latent cells.
    data: ViT embeddings [t * h * w, hidden], or normalised latents [t, h, w, 48].
    """

    kind: Kind
    role: Role
    grid: Grid
    data: Tensor = field(repr=False)

    @property
    def visual(self) -> int:
        """Number of visual tokens, markers not counted."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def length(self) -> int:
        """Number of tokens, markers included."""
        return self.visual + MARKERS

    def cut(self, axis: int, indices: Iterable[int]) -> VisualSegment:
        """A clean latent's cells at `indices` of an axis: 0 time, 1 row, 2 column."""
        chosen = torch.tensor(list(indices), device=self.data.device)
        data = self.data.index_select(axis, chosen)
        t, h, w = data.shape[:3]
        return replace(self, grid=(t, h, w), data=data)


@dataclass(frozen=True, eq=False)
class TargetSegment:
    """The noisy latents that are denoised: two markers, then `grid` (t, h, w) latent cells."""

    kind: ClassVar[Kind] = Kind.TARGET
    role: ClassVar[Role] = Role.TARGET
    grid: Grid

    @property
    def visual(self) -> int:
        """Number of latent tokens, markers not counted."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def length(self) -> int:
        """Number of tokens, markers included."""
        return self.visual + MARKERS


Segment: TypeAlias = TextSegment | VisualSegment  # what a context is made of


def is_clean(segment: Segment | TargetSegment) -> TypeGuard[VisualSegment]:
    """Whether a segment is a reference's clean latent."""
    return segment.kind is Kind.CLEAN


def clean_latents(segments: Iterable[Segment]) -> list[VisualSegment]:
    """The references' clean latents among segments, in order."""
    return [s for s in segments if is_clean(s)]


@dataclass(frozen=True, eq=False)
class Sequence:
    """Context segments and, for generation, the target after them.

    start, end, pad: ids of the marker tokens and of the pad that stands for a visual token.
    """

    context: tuple[Segment, ...]
    target: TargetSegment | None
    start: int
    end: int
    pad: int

    @property
    def segments(self) -> tuple[Segment | TargetSegment, ...]:
        """The context, and the target where there is one."""
        return self.context if self.target is None else (*self.context, self.target)

    @property
    def caption(self) -> int:
        """Index of the first caption segment; everything before it is the same with and without guidance."""
        return next((i for i, s in enumerate(self.context) if s.role is Role.CAPTION), len(self.context))

    def without_caption(self) -> Sequence:
        """The unconditional sequence: the same less the caption."""
        return replace(self, context=tuple(s for s in self.context if s.role is not Role.CAPTION))

    def with_caption(self, ids: Iterable[int]) -> Sequence:
        """The same with another caption (a negative prompt) in place of this one."""
        caption = TextSegment(Role.CAPTION, tuple(ids))
        return replace(self, context=tuple(caption if s.role is Role.CAPTION else s for s in self.context))

    def token_ids(self) -> list[int]:
        """Every token in reading order, pads in place."""
        ids: list[int] = []
        for segment in self.segments:
            if isinstance(segment, TextSegment):
                ids += segment.ids
            else:
                ids += (self.start, *[self.pad] * segment.visual, self.end)
        return ids

    @property
    def source(self) -> int | None:
        """Index of the source latent's segment whose grid the target shares, if there is one."""
        if self.target is None:
            return None
        matches = (i for i, s in enumerate(self.context) if s.kind is Kind.CLEAN and s.role is Role.SOURCE)
        return next((i for i in matches if self.context[i].length == self.target.length), None)


class Placed(NamedTuple):
    """A context segment and its rope positions, int64 [3, length]."""

    segment: Segment
    position: Tensor


def merge_text(placed: Iterable[Placed]) -> list[Placed]:
    """The segments as passes run them: neighbouring text as one, every visual segment alone, empty text left
    out.
    """
    merged: list[Placed] = []
    for segment, position in placed:
        if segment.length == 0:
            continue
        last = merged[-1].segment if merged else None
        if isinstance(segment, TextSegment) and isinstance(last, TextSegment):
            joined = torch.cat([merged[-1].position, position], dim=1)
            merged[-1] = Placed(TextSegment(last.role, last.ids + segment.ids), joined)
        else:
            merged.append(Placed(segment, position))
    return merged
