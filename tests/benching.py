"""The benchmark's command lines over the tiny checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from lance_core.bench import run as bench_run

CHECKPOINT = Path(__file__).parent / "golden" / "checkpoint" / "Lance_3B_Video"
QUICK = ("--model", str(CHECKPOINT), "--device", "cpu", "--repeat", "1", "--context", "7")


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_run.add_arguments(parser)
    return parser.parse_args(words)


def tiny(*words: str) -> argparse.Namespace:
    return options(*QUICK, "--size", "64x48", *words)


def suite(*words: str) -> argparse.Namespace:
    return options(*QUICK, "--suite", *words)
