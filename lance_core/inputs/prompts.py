"""The trained templates: a system prompt, references and a caption as one sequence, its spans known because
it was built here.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import RequestError
from ..model.sequence import Role, Segment, Sequence, TargetSegment, TextSegment
from .tasks import SYSTEM_PROMPTS
from .tokenizer import Tokenizer

__all__ = ["SYSTEM_PROMPTS", "check_text_tokens", "generation", "question"]

# Text tokens of one sequence. Attention's memory grows with them, and the model never saw longer texts.
MAX_TEXT_TOKENS = 32768


def _assemble(
    tokenizer: Tokenizer,
    system: str,
    visuals: Iterable[Segment],
    caption: str,
    role: Role,
    target: TargetSegment | None,
) -> Sequence:
    """<|im_start|>system … user … visuals, caption … assistant, then the target. Each text is tokenised on
    its own.
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
    check_text_tokens(context, "prompt and instruction have", "prompt")
    return Sequence(context, target, t.vision_start, t.vision_end, t.pad)


def check_text_tokens(context: Iterable[Segment], whose: str, shorten: str) -> None:
    """Refuse a context with more than MAX_TEXT_TOKENS tokens of text.

    Raises:
        RequestError: it has.
    """
    tokens = sum(s.length for s in context if isinstance(s, TextSegment))
    _check_length(whose, tokens, MAX_TEXT_TOKENS, shorten)


def _check_length(whose: str, tokens: int, most: int, shorten: str) -> None:
    if tokens > most:
        raise RequestError(
            f"The text is too long: {whose} {tokens:,} tokens together, at most {most:,} are possible. "
            f"Shorten the {shorten} by {tokens - most:,} tokens."
        )


def negative(tokenizer: Tokenizer, text: str | None, sequence: Sequence) -> tuple[int, ...] | None:
    """Token ids of a negative prompt, which takes the caption's place in `sequence`; None for the trained
    unconditional sequence, which an empty text stands for, too. Raises as `generation`.
    """
    if not text or not text.strip():
        return None
    ids = tuple(tokenizer.encode(text))
    others = sum(
        s.length for s in sequence.context if isinstance(s, TextSegment) and s.role is not Role.CAPTION
    )
    _check_length(
        "negative prompt and instruction have", others + len(ids), MAX_TEXT_TOKENS, "negative prompt"
    )
    return ids


def generation(
    tokenizer: Tokenizer, system: str, visuals: Iterable[Segment], caption: str, grid: tuple[int, int, int]
) -> Sequence:
    """The sequence of a generation task whose target has `grid` latent tokens (t, h, w).

    Raises:
        RequestError: the texts have more than MAX_TEXT_TOKENS tokens, or cannot be encoded.
    """
    return _assemble(tokenizer, system, visuals, caption, Role.CAPTION, TargetSegment(grid))


def question(tokenizer: Tokenizer, system: str, visuals: Iterable[Segment], text: str) -> Sequence:
    """The sequence of an understanding task, ending where the answer begins. Raises as `generation`."""
    return _assemble(tokenizer, system, visuals, text, Role.TEMPLATE, None)
