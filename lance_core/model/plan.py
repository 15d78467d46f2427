"""A request on its way to denoising: planned, then prepared."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from torch import Tensor

from ..config import Grid
from . import rope
from .kv_cache import Context
from .sequence import Branch, Placed, Sequence


@dataclass(frozen=True, eq=False)
class Plan:
    """A planned request: which segments run against which cached prefix, and where. Nothing is computed yet.

    prefix: segments both branches share; rests: each branch's own; targets: positions of each branch's target
    block, empty for understanding.
    """

    sequence: Sequence
    prefix: list[Placed]
    rests: dict[Branch, list[Placed]]
    targets: dict[Branch, Tensor]

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        tokens_per_second: float,
        guided: bool,
        negative: SequenceOf[int] | None = None,
        scale: rope.GridScale | None = None,
    ) -> Plan:
        """Conditional and, if guided, unconditional branch of `sequence`; `negative` ids take the caption's
        place. scale: see `rope.positions`.
        """
        split = sequence.caption
        branches = [(sequence, rope.positions(sequence, tokens_per_second, scale))]
        if guided and negative:
            other = sequence.with_caption(negative)
            branches.append((other, rope.positions(other, tokens_per_second, scale)))
        elif guided:
            without = rope.unconditional_positions(sequence, tokens_per_second, scale)
            branches.append((sequence.without_caption(), without))
        named = dict(zip(Branch, branches, strict=False))
        placed = {
            b: [Placed(*pair) for pair in zip(s.context, p, strict=False)] for b, (s, p) in named.items()
        }
        targets = {b: p[-1] for b, (_, p) in named.items()} if sequence.target else {}
        rests = {b: segments[split:] for b, segments in placed.items()}
        return cls(sequence, placed[Branch.CONDITIONAL][:split], rests, targets)

    @property
    def lengths(self) -> tuple[int, tuple[int, ...]]:
        """Tokens of the prefix and of each branch's rest, in `Branch`'s order."""
        prefix, *rests = (sum(s.length for s, _ in part) for part in (self.prefix, *self.rests.values()))
        return prefix, tuple(rests)

    @property
    def grid(self) -> Grid:
        """Latent cells (t, h, w) of the target.

        Raises:
            ValueError: an understanding plan, which has none.
        """
        if self.sequence.target is None:
            raise ValueError("the plan of an understanding sequence has no target to denoise")
        return self.sequence.target.grid


@dataclass(eq=False)
class Prepared:
    """A planned request with its context computed, the prefix and the branches in `ready`.

    rope: per branch cos and sin of the target [1, tokens, width].
    markers: embeddings of the target's two marker tokens [1, 2, hidden].
    table: latent position table [tokens, hidden].
    """

    plan: Plan
    context: Context
    rope: dict[Branch, tuple[Tensor, Tensor]]
    markers: Tensor
    table: Tensor
    ready: set[Branch] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Row:
    """What one row of a velocity call runs against: a branch of a prepared request."""

    prepared: Prepared
    branch: Branch
