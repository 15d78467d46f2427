"""Everything that is the caller's or the file's fault, as types a caller can tell apart.

Messages say what came, what was expected and what to do. Bugs of ours are not wrapped: they surface as
themselves.
"""

from typing import Any

LONGEST = 499  # characters of a message
WORD = 60  # characters that a word of a long message keeps


def _shortened(message: str) -> str:
    """The message in at most LONGEST characters: long words lose their middle, then the message does."""
    while len(message) > LONGEST:
        word = max(message.split(), key=len, default="")
        if len(word) <= WORD:
            end = LONGEST // 3
            return f"{message[: LONGEST - end - 3]} … {message[-end:]}"
        keep = max(WORD, len(word) - (len(message) - LONGEST))
        message = message.replace(word, f"{word[: keep // 2]}…{word[len(word) - (keep - 1 - keep // 2) :]}")
    return message


class LanceError(Exception):
    """Base of every error this package raises on purpose.

    All are called lance_core.NAME, which they can be had as: inside ComfyUI, which shows an exception's
    module to its users, the real one is a path of files. Of a message over `LONGEST` characters (a path, or a
    name out of a damaged file, can be of any length) the longest words are cut in their middle.
    """

    __module__ = "lance_core"

    def __init__(self, message: str = "", *args: Any) -> None:
        super().__init__(_shortened(message), *args)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__module__ = "lance_core"


class RequestError(LanceError):
    """A request that cannot be carried out: unknown task or option, size out of range, too many or too few
    media.
    """


class MediaError(LanceError):
    """An image or video that cannot be read, is empty, or has a shape nothing can be made of."""


class CheckpointError(LanceError):
    """A model file that is missing, damaged, incomplete, of another model, or of the wrong shape."""


class NumericsError(LanceError):
    """NaN or infinity appeared; the message names the stage and the usual cause."""
