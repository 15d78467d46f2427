"""One interleaved sequence as ordered segments whose spans are known because they were built, never searched
for.

Visual segments store their two marker tokens first, then the visual tokens: attention inside such a block is
all to all, so order does not matter once rope is applied, and "which expert" becomes a slice at index 2.
This module knows nothing of positions (rope.py), embeddings (model.py) or text (prompts.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import Tensor

MARKERS = 2  # start and end marker of a visual segment


class Kind(Enum):
    """What a segment is made of; decides its expert and whether attention inside is causal."""

    TEXT = "text"  # understanding expert, causal
    SEEN = "seen"  # ViT embeddings: understanding expert, all to all
    CLEAN = "clean"  # latents of a reference at timestep 0: generation expert, all to all
    TARGET = "target"  # the noisy latents: generation expert, all to all


class Role(Enum):
    """Why a segment is there; decides rope offsets and what the unconditional sequence leaves out."""

    TEMPLATE = "template"
    CAPTION = "caption"
    SOURCE = "source"  # of an edit
    SUBJECT = "subject"  # reference of a subject task
    QUESTION = "question"  # seen by an understanding task
    TARGET = "target"


@dataclass(frozen=True, eq=False)
class Segment:
    """One block.

    ids: text tokens (empty for visual segments).
    grid: (t, h, w) visual tokens: merged ViT patches or latent cells (None for text).
    data: ViT embeddings [n, hidden] or normalised latents [t, h, w, channels]; None for text and the target.
    """

    kind: Kind
    role: Role
    ids: tuple[int, ...] = ()
    grid: tuple[int, int, int] | None = None
    data: Tensor | None = field(default=None, repr=False)

    @property
    def visual(self) -> int:
        """Number of visual tokens, markers not counted."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def length(self) -> int:
        """Number of tokens, markers included."""
        return len(self.ids) if self.grid is None else self.visual + MARKERS


@dataclass(frozen=True, eq=False)
class Sequence:
    """Context segments and, for generation, the target after them.

    start, end, pad: ids of the marker tokens and of the pad that stands for a visual token.
    """

    context: tuple[Segment, ...]
    target: Segment | None
    start: int
    end: int
    pad: int

    @property
    def segments(self) -> tuple[Segment, ...]:
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
        caption = Segment(Kind.TEXT, Role.CAPTION, tuple(ids))
        return replace(self, context=tuple(caption if s.role is Role.CAPTION else s for s in self.context))

    def token_ids(self) -> list[int]:
        """Every token in reading order, pads in place."""
        ids: list[int] = []
        for segment in self.segments:
            ids += (
                segment.ids if segment.grid is None else (self.start, *[self.pad] * segment.visual, self.end)
            )
        return ids

    @property
    def source(self) -> int | None:
        """Index of the source latent's segment whose grid the target shares, if there is one."""
        if self.target is None:
            return None
        matches = (i for i, s in enumerate(self.context) if s.kind is Kind.CLEAN and s.role is Role.SOURCE)
        return next((i for i in matches if self.context[i].length == self.target.length), None)


def merge_text(segments: Iterable[Segment]) -> list[list[Segment]]:
    """Groups of segments that one pass can run: neighbouring text together, every visual block alone."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if segment.length == 0:
            continue
        if groups and segment.kind is Kind.TEXT and groups[-1][-1].kind is Kind.TEXT:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups
