"""What a caller gives, checked: numbers, text, choices and functions. What does not fit is a RequestError.

Nothing here needs torch. Numbers may be of any type that means the same number (numpy's, a tensor of one
element); what comes back is Python's own, so that a request is always JSON-ready.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

from .errors import RequestError

SHOWN = 80  # characters of a value that a message repeats


def shown(value: Any) -> str:
    """A value as a message can show it: its repr, cut to `SHOWN` characters, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits to print, or an object whose repr fails
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def whole(what: str, value: Any, low: int, high: int, expected: str | None = None) -> int:
    """A whole number in low..high; a float or a tensor that is one is taken as it.

    expected: how to say the range.

    Raises:
        RequestError: anything else.
    """
    number: int | None = None
    try:
        number = None if isinstance(value, bool | str | bytes) else operator.index(value)
    except Exception:  # not an integer; foreign types raise what they like
        given = _float(value)
        if given is not None and math.isfinite(given) and given == int(given):
            number = int(given)
    if number is None or not low <= number <= high:
        expected = expected or f"a whole number from {low} to {high}"
        raise RequestError(f"{what} is {shown(value)}, expected {expected}")
    return int(number)


def real(
    what: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    expected: str | None = None,
) -> float:
    """A finite number in low..high and, if given, greater than `above`. expected: how to say the range.

    Raises:
        RequestError: anything else.
    """
    number = _float(value)
    fits = number is not None and math.isfinite(number) and low <= number <= high
    if number is not None and fits and (above is None or number > above):
        return number
    if expected is None:
        least = f"above {above:g}" if above is not None else f"from {low:g}" if low > -math.inf else ""
        most = f"{'to' if above is None else 'and at most'} {high:g}" if high < math.inf else ""
        expected = " ".join(word for word in ("a number", least, most) if word)
    raise RequestError(f"{what} is {shown(value)}, expected {expected}")


def interval(what: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """Two numbers (first, second) with low <= first <= second <= high.

    Raises:
        RequestError: anything else.
    """
    try:
        first, second = (_float(one) for one in value)
    except Exception:  # not iterable, or not two
        first = second = None
    if first is None or second is None or not low <= first <= second <= high:
        raise RequestError(
            f"{what} is {shown(value)}, expected two numbers (low, high) with "
            f"{low:g} <= low <= high <= {high:g}"
        )
    return first, second


def choice(what: str, value: Any, options: Iterable[str]) -> str:
    """One of some names.

    Raises:
        RequestError: anything else.
    """
    known = list(options)
    if not isinstance(value, str) or value not in known:
        raise RequestError(f"{what} is {shown(value)}, expected one of {', '.join(known)}")
    return value


def text(what: str, value: Any) -> str:
    """Text that can be encoded; it may be empty.

    Raises:
        RequestError: another type, or half a character (a lone surrogate, as broken JSON and bytes that are
            not UTF-8 give).
    """
    if not isinstance(value, str):
        raise RequestError(f"{what} is {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} has half a character in it, U+{ord(value[error.start]):04X} at place {error.start + 1}: "
            "the text was cut or decoded wrongly before it came here; write it as UTF-8"
        ) from None
    return value


def function(what: str, value: Any, arguments: str) -> Callable[..., Any] | None:
    """A callable that takes these arguments by position, or None.

    arguments: their names, "step, total". A callable that does not tell its signature is taken as it is.

    Raises:
        RequestError: anything else.
    """
    if value is not None and not callable(value):
        raise RequestError(f"{what} is {shown(value)}, expected a function ({arguments}) or None")
    try:
        signature = None if value is None else inspect.signature(value)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(*arguments.split(", "))
        except TypeError as error:
            raise RequestError(
                f"{what} is called with ({arguments}), which {shown(value)} does not take: {error}"
            ) from None
    return value


def _float(value: Any) -> float | None:
    """The number a value is; None where it is none, or beyond what a float holds."""
    if value is None or isinstance(value, bool | str | bytes | bytearray):
        return None
    try:
        return float(value)
    except Exception:  # foreign types raise what they like
        return None
