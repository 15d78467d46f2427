"""The trained templates: a system prompt, references and a caption as one sequence, its spans known because
it was built here.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..model.sequence import Role, Segment, Sequence, TargetSegment, TextSegment
from .tasks import SYSTEM_PROMPTS
from .tokenizer import Tokenizer

__all__ = ["SYSTEM_PROMPTS", "generation", "question"]


def _assemble(
    tokenizer: Tokenizer,
    system: str,
    visuals: Iterable[Segment],
    caption: str,
    role: Role,
    target: TargetSegment | None,
) -> Sequence:
    """<|im_start|>system … user … visuals, caption … assistant, then the target. Pieces are tokenised on
    their own.
    """
    t = tokenizer
    newline = t.encode("\n")
    opening = [
        t.im_start,
        *t.encode(f"system\n{system}"),
        t.im_end,
        *newline,
        t.im_start,
        *t.encode("user\n"),
    ]
    closing = [t.im_end, *newline, t.im_start, *t.encode("assistant\n")]
    context = (
        TextSegment(Role.TEMPLATE, tuple(opening)),
        *visuals,
        TextSegment(role, tuple(t.encode(caption))),
        TextSegment(Role.TEMPLATE, tuple(closing)),
    )
    return Sequence(context, target, t.vision_start, t.vision_end, t.pad)


def generation(
    tokenizer: Tokenizer, system: str, visuals: Iterable[Segment], caption: str, grid: tuple[int, int, int]
) -> Sequence:
    """The sequence of a generation task whose target has `grid` latent tokens (t, h, w)."""
    return _assemble(tokenizer, system, visuals, caption, Role.CAPTION, TargetSegment(grid))


def question(tokenizer: Tokenizer, system: str, visuals: Iterable[Segment], text: str) -> Sequence:
    """The sequence of an understanding task, ending where the answer begins."""
    return _assemble(tokenizer, system, visuals, text, Role.TEMPLATE, None)
