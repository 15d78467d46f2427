"""A second CUDA stream, so that small work bound by memory overlaps large work bound by arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import RequestError


class SideStream:
    """Work on a CUDA stream of its own and of higher priority: `start` one task, later take its `result`.

    Between the two, the main stream must not write what the task reads, nor touch what it writes. Results may
    be kept: their memory goes back to this stream, whose next task waits for the main stream.

    Raises:
        RequestError: the device is no CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RequestError(
                f"overlap runs on two streams of a CUDA device, and the device is {device}; leave it off"
            )
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.pending: tuple[Callable[[], Any], Any] | None = None

    def start(self, work: Callable[[], Any]) -> None:
        """Queue `work` behind all that the main stream has queued so far."""
        if self.pending is not None:  # left by an error: its memory may only be used again behind it
            self.result()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            self.pending = work, work()  # with what it reads, which no new tensor may replace while it runs

    def result(self) -> Any:
        """What the task started last returned; what the main stream queues from now on waits for it.

        Raises:
            RuntimeError: none was started.
        """
        if self.pending is None:
            raise RuntimeError("result() without start()")
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        (_, found), self.pending = self.pending, None
        return found
