"""The text of a conversation around its pictures: one turn as the weights were trained, more turns as
Qwen2.5-VL's chat template lays them out.

    <|im_start|>system\\n{SYSTEM}<|im_end|>\\n
    <|im_start|>user\\n{pictures}{QUESTION}<|im_end|>\\n<|im_start|>assistant\\n{ANSWER}<|im_end|>\\n
    <|im_start|>user\\n…

The system text comes once, before the first turn. Every text is tokenised on its own, so what a user types is
never a control token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..model.sequence import Role, Segment, TextSegment
from ..model.sequence import Sequence as TokenSequence
from .prompts import check_text_tokens, question
from .tokenizer import Tokenizer

PLAIN_SYSTEM = (
    "You are a helpful assistant."  # of Qwen2.5, which the model started from, for talk without pictures
)


def conversation(
    tokenizer: Tokenizer,
    system: str,
    turns: Sequence[tuple[Iterable[Segment], str, Sequence[int]]],
    visuals: Iterable[Segment],
    text: str,
) -> TokenSequence:
    """The sequence of a conversation and one more question, ending where its answer begins.

    turns: those before, each as (its pictures, its question, the ids of its answer without an end token).

    Raises:
        RequestError: the texts have more than MAX_TEXT_TOKENS tokens, or cannot be encoded.
    """
    if not turns:
        return question(tokenizer, system, visuals, text)
    seen, asked, _ = turns[0]
    first = question(tokenizer, system, seen, asked)
    context = list(first.context)
    for (_, _, answer), (seen, asked, _) in zip(turns, [*turns[1:], (visuals, text, ())], strict=True):
        context += _following(tokenizer, answer, seen, asked)
    check_text_tokens(context, "the conversation has", "conversation")
    return TokenSequence(tuple(context), None, first.start, first.end, first.pad)


def _following(t: Tokenizer, answer: Sequence[int], visuals: Iterable[Segment], text: str) -> list[Segment]:
    """An answer's end and the turn after it."""
    newline = t.encode("\n")
    opening = [*answer, t.im_end, *newline, t.im_start, *t.encode("user\n")]
    closing = [t.im_end, *newline, t.im_start, *t.encode("assistant\n")]
    return [
        TextSegment(Role.TEMPLATE, tuple(opening)),
        *visuals,
        TextSegment(Role.TEMPLATE, tuple(t.encode(text))),
        TextSegment(Role.TEMPLATE, tuple(closing)),
    ]
