"""`python -m lance_core bench`: runs one measurement, tells its result as text, Markdown and JSON.

Each subcommand is a module of its name with `run(args, progress)`, which measures, and `document(result)`,
which says what was found. Nothing here prints, and torch is imported only when something is measured or told.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .options import add_arguments

if TYPE_CHECKING:
    from .report import Block

__all__ = ["add_arguments", "markdown", "report", "run"]


def run(args: argparse.Namespace, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Measure what was asked for.

    Args:
        args: from a parser that `add_arguments` has filled.
        progress: (what, done, total).

    Returns: JSON-ready; also written to `args.output`, as Markdown to `args.markdown`, a suite drawn to
        `args.plot`.

    Raises:
        RequestError: an option out of range or that the device cannot do, memory or a program that is not
            there, or a file that cannot be written.
        CheckpointError: `--model` is no checkpoint.
    """
    plot = getattr(args, "plot", None)
    for path in (args.output, args.markdown, plot):
        if path and not Path(path).absolute().parent.is_dir():
            raise RequestError(f"{path} cannot be written: its folder does not exist")
    found = _module(args.bench).run(args, progress)
    result = json.loads(json.dumps(found))  # as a reader of the file will find it: lists, no tuples
    if args.output:
        _write(args.output, json.dumps(result, indent=1) + "\n")
    if args.markdown:
        _write(args.markdown, markdown(result) + "\n")
    if plot:
        import_module(".plot", __package__).draw(result, plot)
    return result


def report(result: dict[str, Any]) -> str:
    """The result of `run` for people."""
    return import_module(".report", __package__).text(_document(result))


def markdown(result: dict[str, Any]) -> str:
    """The result of `run` as Markdown."""
    return import_module(".report", __package__).markdown(_document(result))


def _document(result: dict[str, Any]) -> list[Block]:
    return _module(result.get("bench", "speed")).document(result)


def _module(name: str) -> Any:
    return import_module(f".{'speed' if name == 'suite' else name}", __package__)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None
