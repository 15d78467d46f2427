"""Telling when memory has run out, on any device, and saying so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import RequestError

# How torch's CPU allocator puts it: a plain RuntimeError on Linux and on Windows.
CPU_WORDS = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator")
OUT_OF_MEMORY: type[Exception] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on whatever device."""
    if isinstance(error, OUT_OF_MEMORY | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in CPU_WORDS)


@contextmanager
def said_when_out_of_memory(what: str, way_out: str) -> Iterator[None]:
    """Turn running out of memory into a sentence: what was being done, and how it needs less.

    Raises:
        RequestError: memory ran out in the body.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
    else:
        return
    # Out here the exception is gone, and with it the frames that held the failed work's tensors.
    raise RequestError(f"memory ran out while {what}; {way_out} ({reason})")
