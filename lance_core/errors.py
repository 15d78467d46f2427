"""Everything that is the caller's or the file's fault, as types a caller can tell apart.

Messages say what came, what was expected and what to do. Bugs of ours are not wrapped: they surface as
themselves.
"""

from typing import Any

LONGEST = 499  # characters of a message


class LanceError(Exception):
    """Base of every error this package raises on purpose.

    All are called lance_core.NAME, which they can be had as: inside ComfyUI, which shows an exception's
    module to its users, the real one is a path of files. A message over `LONGEST` characters (a name out
    of a damaged file can be of any length) loses its middle: it begins with what came and ends with what
    to do.
    """

    __module__ = "lance_core"

    def __init__(self, message: str = "", *args: Any) -> None:
        if len(message) > LONGEST:
            end = LONGEST // 3
            message = f"{message[: LONGEST - end - 3]} … {message[-end:]}"
        super().__init__(message, *args)

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
