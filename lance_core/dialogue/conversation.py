"""What was said so far, with the keys and values it left; and how it is read on without computing them again.

A conversation is never changed: each answer makes a new one, so several questions may follow the same one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..model import rope
from ..model.dual_expert import DualExpert
from ..model.kv_cache import Context
from ..model.sequence import Placed, Segment, TextSegment, VisualSegment
from ..model.sequence import Sequence as TokenSequence


@dataclass(frozen=True, eq=False)
class Turn:
    """A question and its answer. visuals: ViT embeddings of its pictures and clips; names: their files.

    ids: the answer's tokens without the end token.
    """

    question: str
    answer: str
    visuals: tuple[VisualSegment, ...] = field(default=(), repr=False)
    names: tuple[str, ...] = ()
    ids: tuple[int, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The turn as `history=` takes it again."""
        images = {"images": list(self.names)} if self.names else {}
        return {"question": self.question, **images, "answer": self.answer}


@dataclass(frozen=True, eq=False)
class Kept:
    """Keys and values of a conversation's first `tokens` tokens, and whose they are: `model`, its
    understanding expert (held weakly), under `version` (which changes where its weights are patched).
    """

    context: Context
    model: weakref.ref
    version: Any = None

    @property
    def tokens(self) -> int:
        """How many tokens are computed."""
        return self.context.prefix.filled

    def fits(self, model: DualExpert, version: Any) -> bool:
        """Whether the keys and values are what `model` would compute."""
        return self.model() is model.und and self.version == version


@dataclass(frozen=True, eq=False)
class Conversation(Sequence[Turn]):
    """Turns in order, and what keeps them from being computed again.

    system: its instruction. as_trained: see `rope.positions`.
    """

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    as_trained: bool = False
    kept: Kept | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.turns)

    def __getitem__(self, index: Any) -> Any:
        return self.turns[index]

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.turns)

    def to_json(self) -> list[dict[str, Any]]:
        """The turns as `history=` takes them again; pictures that came from memory are left out."""
        return [turn.to_json() for turn in self.turns]

    @property
    def triples(self) -> list[tuple[Sequence[Segment], str, Sequence[int]]]:
        """The turns as `turns.conversation` takes them."""
        return [(turn.visuals, turn.question, turn.ids) for turn in self.turns]


def place(sequence: TokenSequence, tokens_per_second: float, as_trained: bool) -> list[Placed]:
    """The segments of an understanding sequence with their positions."""
    positions = rope.positions(sequence, tokens_per_second, as_trained=as_trained)
    return [Placed(*pair) for pair in zip(sequence.context, positions, strict=True)]


def read(
    model: DualExpert, sequence: TokenSequence, placed: list[Placed], room: int, kept: Kept | None = None
) -> tuple[Context, Tensor, int]:
    """Run an understanding sequence. What `kept` holds of it is copied, not computed.

    Returns: its context with `room` free tokens, the next token's logits, and its position; see
    `DualExpert.read`.

    Raises:
        ValueError: nothing is left to run.
    """
    context = model.new_context(sum(s.length for s, _ in placed) + room)
    done = 0 if kept is None else kept.tokens
    if kept is not None:
        context.copy_prefix(kept.context, done)
    hidden = model.extend(context, context.prefix, after(placed, done), model.markers(sequence))
    if hidden is None:
        raise ValueError("an understanding prompt without tokens")
    # The prompt ends with text, whose positions go on; those of pictures may have been moved beyond it.
    return context, model.logits(hidden), int(placed[-1].position[0, -1]) + 1


def after(placed: list[Placed], tokens: int) -> list[Placed]:
    """What comes after the first `tokens` tokens.

    Raises:
        ValueError: they end inside a picture, which attends to all of itself.
    """
    out: list[Placed] = []
    for segment, position in placed:
        skipped, tokens = min(tokens, segment.length), max(tokens - segment.length, 0)
        if skipped == 0:
            out.append(Placed(segment, position))
        elif skipped < segment.length:
            if not isinstance(segment, TextSegment):
                raise ValueError("a context ends inside a picture")
            out.append(Placed(TextSegment(segment.role, segment.ids[skipped:]), position[:, skipped:]))
    return out
