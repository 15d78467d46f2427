"""What a caller gives as `history`: a conversation, or its turns in any of the usual forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .. import checks
from ..checks import shown
from ..errors import RequestError
from .conversation import Conversation, Turn

EXPECTED = (
    "expected an answer's `.history`, or a list of (question, answer) pairs, of {'question', 'answer', "
    "'images'} "
    "or of {'role', 'content'} messages, user and assistant in turn"
)


class Said(NamedTuple):
    """A turn that is not encoded yet."""

    question: str
    answer: str
    images: Any = None


def turns_of(history: Any) -> Conversation | list[Turn | Said]:
    """`history=` as a conversation with what it keeps, or as plain turns.

    Raises:
        RequestError: nothing that can be read as turns.
    """
    if history is None:
        return []
    if isinstance(history, Conversation):
        return history
    if isinstance(getattr(history, "history", None), Conversation):  # a whole answer
        return history.history
    if isinstance(history, str | bytes | Mapping) or not isinstance(history, Iterable):
        raise RequestError(f"history is {shown(history)}; {EXPECTED}")
    items = list(history)
    if items and all(isinstance(item, Mapping) and "role" in item for item in items):
        return _of_messages(items)
    return [_turn(i, item) for i, item in enumerate(items, 1)]


def _turn(number: int, item: Any) -> Turn | Said:
    if isinstance(item, Turn):
        return item
    if isinstance(item, Mapping) and {"question", "answer"} <= set(item) <= {"question", "answer", "images"}:
        said = Said(item["question"], item["answer"], item.get("images"))
    elif isinstance(item, list | tuple) and len(item) in (2, 3):
        said = Said(*item)
    else:
        raise RequestError(f"turn {number} of history is {shown(item)}; {EXPECTED}")
    checks.text(f"the question of turn {number}", said.question)
    checks.text(f"the answer of turn {number}", said.answer)
    return said


def _of_messages(items: list[Any]) -> list[Turn | Said]:
    roles = [item["role"] for item in items]
    if roles != ["user", "assistant"] * (len(items) // 2):
        raise RequestError(
            f"history has the roles {shown(roles)}; expected user and assistant in turn, ending with "
            f"assistant "
            "(an instruction goes into system_prompt)"
        )
    pairs = zip(items[::2], items[1::2], strict=True)
    return [
        _turn(n, {"question": u.get("content"), "answer": a.get("content"), "images": u.get("images")})
        for n, (u, a) in enumerate(pairs, 1)
    ]
