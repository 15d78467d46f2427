"""The command `bench`: what it measures is lance_core.bench's."""

from __future__ import annotations

import argparse
from typing import Any

from .common import Bars, check_target


def add_commands(commands: Any) -> None:
    """The one."""
    from ..bench import run as bench

    speed = commands.add_parser("bench", help="measure speed and memory on this machine")
    bench.add_arguments(speed)
    speed.set_defaults(run=run)


def run(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Measure, and say what was found."""
    from ..bench import run as bench

    for target in (getattr(args, name, None) for name in ("output", "markdown", "plot")):
        if target:
            check_target(target)
    result = bench.run(args, bars)
    if not args.json:
        print(bench.report(result))
    return result
