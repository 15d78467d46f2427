"""Parse, run one command, and end with the right word and exit code whatever happens.

Exit codes: 0 done, 2 the request or a file is wrong, 130 cancelled (SIGINT), 141 nobody reads the output any
more (SIGPIPE), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import LanceError
from . import files, generate, longer, measure, scale, talk, training
from .common import Bars, prepare_output, to_json

ENDED = 128  # plus the signal's number


class Stopped(BaseException):
    """A signal asked the process to end. No Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def stop_on_signals() -> None:
    """SIGTERM ends as SIGINT does, by way of every `finally`; a second signal of the kind ends at once."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and background jobs want it
            signal.signal(number, stop)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="python -m lance_core", description="Lance: understand, generate and edit images and video."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for family in (generate, longer, talk, scale, files, training, measure):
        family.add_commands(commands)
    return top


def main(argv: Sequence[str] | None = None, emit: Callable[[str], None] = print) -> int:
    """Run one command; returns the exit code."""
    prepare_output()
    args = parser().parse_args(argv)
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    bars = Bars(not getattr(args, "quiet", False))
    try:
        code = _run(args, bars, emit)
        sys.stdout.flush()
    except (KeyboardInterrupt, Stopped) as stopped:
        bars.close()
        print("cancelled", file=sys.stderr)
        return ENDED + getattr(stopped, "number", signal.SIGINT)
    except BrokenPipeError:
        _drop_output()
        return ENDED + getattr(signal, "SIGPIPE", 13)
    except OSError as error:
        if error.filename is not None:  # not the output's: a bug, or a file whose error should have been ours
            raise
        bars.close()
        _drop_output()
        print(f"error: the output cannot be written ({error.strerror or error})", file=sys.stderr)
        return 2
    return code


def _run(args: argparse.Namespace, bars: Bars, emit: Callable[[str], None]) -> int:
    began = time.perf_counter()
    as_json = getattr(args, "json", False)
    try:
        result = args.run(args, bars)
    except LanceError as error:
        bars.close()
        print(f"error: {error}", file=sys.stderr)
        if as_json:
            emit(to_json({"error": str(error), "type": type(error).__name__}))
        return 2
    bars.close()
    if isinstance(result, int):  # processes of its own have done and said everything
        return result
    if as_json and result is not None:
        emit(to_json(result | {"seconds": round(time.perf_counter() - began, 3)}))
    return 0


def _drop_output() -> None:
    """Let what is still buffered go nowhere, so that closing stdout at the end does not fail once more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # no real file
        return
