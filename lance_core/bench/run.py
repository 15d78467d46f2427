"""How fast the model is on this device, against what the device can do and what the released code's procedure
takes.

Everything is measured in one run with random weights: speed does not depend on them, and nothing has to be
downloaded. A decoder cut to fewer layers gives times for all of them only by extrapolation, which is always
labelled so. `--suite` runs bench_suite.py's list; without it the sizes asked for are measured. Returns
results and never prints.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint, Progress
from ..config import RELEASED_LLM, RELEASED_VAE, RELEASED_VIT, LanceConfig
from ..errors import RequestError
from ..inputs import tasks
from ..model.decoder import check_compiler
from ..model.side_stream import SideStream
from . import plot, suite
from .case import Case, case_of
from .device import Others, device_of, machine
from .measure import DECODER, MEASURES, Bench
from .report import markdown, report

__all__ = ["add_arguments", "markdown", "report", "run"]

FORMAT = 1  # of the JSON
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BUDGET = 10.0  # seconds of timed turns that a measure of the suite is given, two turns at least
OWN_SIZES = {
    "size": ["768x768"],
    "frames": [1],
    "batch": 1,
    "guidance": True,
    "edit": False,
    "baseline": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    skip = f"leave out some of {', '.join(MEASURES)}; of a suite, of {', '.join((*suite.NAMES, 'baseline'))}"
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument(
        "--model",
        default="released",
        help="`released`, or a checkpoint folder whose sizes to take; weights are random",
    )
    parser.add_argument(
        "--layers",
        type=int,
        help="cut the decoder to so many layers (default: all, or as many as memory holds)",
    )
    parser.add_argument(
        "--context", type=int, default=100, metavar="TOKENS", help="length of the caption or question"
    )
    parser.add_argument(
        "--repeat", type=int, default=5, help="timed runs of each measure, after warm-up; the median counts"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="as with the same option of the tasks; the baseline stays as it is",
    )
    parser.add_argument("--overlap", action="store_true", help="likewise")
    parser.add_argument("--profile", action="store_true", help="also say what ours spends its time on")
    parser.add_argument("--skip", nargs="+", default=[], metavar="WHAT", help=skip)
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON too")
    own = parser.add_argument_group("sizes of your own")
    own.add_argument(
        "--size",
        nargs="+",
        default=OWN_SIZES["size"],
        metavar="WxH",
        help="pixels; several are measured one after the other",
    )
    own.add_argument(
        "--frames", nargs="+", type=int, default=OWN_SIZES["frames"], help="video frames; several likewise"
    )
    own.add_argument("--batch", type=int, default=1)
    own.add_argument("--no-guidance", dest="guidance", action="store_false", help="no unconditional branch")
    own.add_argument(
        "--edit",
        action="store_true",
        help="an edit's context: ViT block and clean latent of the same size too",
    )
    own.add_argument(
        "--baseline", action="store_true", help="also time the released code's procedure, for the ratio"
    )
    group = parser.add_argument_group(
        "the suite: every kind of work, with the released procedure's ratio and how time grows"
    )
    group.add_argument(
        "--suite",
        nargs="?",
        const="auto",
        choices=(*suite.SUITES, "auto"),
        help=f"full: the sizes that have goals on a large GPU; small: cut to {suite.SMALL_LAYERS} layers "
        "and small sizes, about "
        "ten minutes on two CPU cores; auto: full on CUDA, else small",
    )
    group.add_argument(
        "--patience",
        type=float,
        default=300,
        metavar="SECONDS",
        help="skip rows that need longer; default: %(default)s",
    )
    group.add_argument(
        "--plot",
        metavar="FILE",
        help="draw it, as .png or whatever matplotlib writes (pip install '.[bench]')",
    )
    group.add_argument("--markdown", metavar="FILE", help="write it as Markdown")


def run(args: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    """Measure everything that was asked for.

    Args:
        args: from a parser that `add_arguments` has filled.
        progress: (what, done, total).

    Returns: JSON-ready; also written to `args.output`, and a suite's to `args.plot` and `args.markdown`.

    Raises:
        RequestError: an option out of range or that the device cannot do, memory that is not there, or
            matplotlib missing for a plot.
        CheckpointError: `--model` is neither `released` nor a checkpoint.
    """
    device, dtype = device_of(args.device), DTYPES.get(args.dtype)
    if dtype is None:
        raise RequestError(f"dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}")
    _check(args)
    options = (args.compile, SideStream(device) if args.overlap else None, args.profile)
    if args.compile:
        check_compiler(device)
    config, others = _config(args.model), Others()
    with torch.inference_mode():
        if args.suite:
            bench = Bench(
                config, device, dtype, args.repeat, "baseline" not in args.skip, progress, BUDGET, *options
            )
            found = suite.run(bench, args.suite, args.layers, args.skip, args.context, args.patience)
        else:
            found = _measure(
                args, Bench(config, device, dtype, args.repeat, args.baseline, progress, None, *options)
            )
    layers, measured, cut = found.pop("layers")
    result = {
        "format": FORMAT,
        "environment": machine(device, dtype) | {"others_cores": others.cores()},
        "model": {
            "name": args.model,
            "layers": layers,
            "layers_measured": measured,
            "cut": cut,
            "compiled": args.compile,
            "overlapped": args.overlap,
            "weights": "random",
            "llm": asdict(config.llm),
        },
        "repeat": args.repeat,
        **found,
    }
    result = json.loads(json.dumps(result))  # as a reader of the file will find it: lists, no tuples
    if args.output:
        _write(args.output, json.dumps(result, indent=1) + "\n")
    if args.markdown:
        _write(args.markdown, markdown(result) + "\n")
    if args.plot:
        plot.draw(result, args.plot)
    return result


def _check(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before anything is measured."""
    known = (*suite.NAMES, "baseline") if args.suite else MEASURES
    unknown = sorted(set(args.skip) - set(known))
    if unknown:
        raise RequestError(f"there is no measure {unknown[0]!r} to skip; expected some of {', '.join(known)}")
    if args.suite:
        given = [name for name, default in OWN_SIZES.items() if getattr(args, name) != default]
        if given:
            option = "no-guidance" if given[0] == "guidance" else given[0]
            raise RequestError(
                f"--{option} does not go with --suite, which has sizes of its own; leave one of them out"
            )
        if not args.patience > 0:
            raise RequestError(f"patience is {args.patience}, expected seconds above 0")
    elif args.plot or args.markdown:
        raise RequestError(f"--{'plot' if args.plot else 'markdown'} shows a suite; add --suite")
    for path in (args.output, args.markdown, args.plot):
        if path and not Path(path).absolute().parent.is_dir():
            raise RequestError(f"{path} cannot be written: its folder does not exist")
    if args.plot:
        plot.require(args.plot)
    tasks.check_count("repeat", args.repeat, 1, 10_000)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None


def _config(name: str) -> LanceConfig:
    if name == "released":
        return LanceConfig(RELEASED_LLM, RELEASED_VIT, RELEASED_VAE, "video")
    return Checkpoint(name).config


def _measure(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """The sizes asked for, one after the other."""
    config = bench.config
    wanted = [
        m
        for m in MEASURES
        if m not in args.skip
        and getattr(config, {"vit": "vit", "encode": "vae", "decode": "vae"}.get(m, "llm"))
    ]
    options = {"batch": args.batch, "guidance": args.guidance, "edit": args.edit, "context": args.context}
    cases = [case_of(config, size, frames, **options) for size in args.size for frames in args.frames]
    layers, cut = bench.fitting(cases, args.layers)
    speed = bench.rates()
    found: list[dict[str, Any]] = [{} for _ in cases]
    if set(DECODER) & set(wanted):
        model = bench.decoder(layers, "step" in wanted or args.edit)
        for case, measures in zip(cases, found, strict=True):
            measures |= bench.decoder_measures(case, model, wanted, speed)
        del model
        gc.collect()
    for part, names in (("vit", ("vit",)), ("vae", ("encode", "decode"))):
        if not set(names) & set(wanted):
            continue
        tower = bench.tower(part)
        for case, measures in zip(cases, found, strict=True):
            measures |= {name: bench.picture(name, case, tower, speed) for name in names if name in wanted}
        del tower
        gc.collect()
    whole = layers < config.llm.num_layers
    return {
        "layers": (config.llm.num_layers, layers, cut),
        "rates": speed,
        "cases": [_case(bench, case, m, whole) for case, m in zip(cases, found, strict=True)],
    }


def _case(bench: Bench, case: Case, measures: dict[str, Any], extrapolated: bool) -> dict[str, Any]:
    entry = asdict(case) | {"measures": measures}
    return (
        entry | {"denoising": bench.denoising(case, measures, extrapolated)} if "step" in measures else entry
    )
