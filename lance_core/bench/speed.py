"""How fast the model is on this device, against what the device can do and what the released procedure takes.

Everything is measured in one run with random weights: speed does not depend on them, and nothing has to be
downloaded. A decoder cut to fewer layers gives times for all of them only by extrapolation, which is always
labelled so. `bench suite` measures the list in suite.py, `bench speed` the sizes asked for.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from .. import checks
from ..checkpoint.checkpoint import Checkpoint, Progress
from ..config import LanceConfig
from ..errors import RequestError
from ..model.compiling import check_compiler
from ..model.side_stream import SideStream
from . import plot, suite
from .case import RELEASED, Case, case_of
from .device import Others, device_of, free, machine
from .measure import Bench
from .options import DECODER, DTYPES, GROWTH, MEASURES, OWN_SIZES, SUITE_ROWS
from .speed_report import document

__all__ = ["document", "run"]

FORMAT = 1  # of the JSON
BUDGET = 10.0  # seconds of timed turns that a measure of the suite is given, two turns at least


def run(args: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    """Measure the suite, or the sizes asked for; see `run.run`.

    Raises:
        RequestError: an option out of range or that the device cannot do, memory that is not there, or
            matplotlib missing for a plot.
        CheckpointError: `--model` is neither `released` nor a checkpoint.
    """
    device = device_of(args.device)
    if args.dtype not in DTYPES:
        raise RequestError(f"dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}")
    _check(args)
    if args.compile:
        check_compiler(device)
    bench = Bench(
        _config(args.model),
        device,
        getattr(torch, args.dtype),
        args.repeat,
        "baseline" not in args.skip if args.suite else args.baseline,
        progress,
        budget=BUDGET if args.suite else None,
        compile=args.compile,
        side=SideStream(device) if args.overlap else None,
        profile=args.profile,
    )
    others = Others()
    with torch.inference_mode():
        if args.suite:
            found = suite.run(bench, args.suite, args.layers, args.skip, args.context, args.patience)
        else:
            found = _measure(args, bench)
    layers, measured, cut = found.pop("layers")
    return {
        "format": FORMAT,
        "environment": machine(device, bench.dtype) | {"others_cores": others.cores()},
        "model": {
            "name": args.model,
            "layers": layers,
            "layers_measured": measured,
            "cut": cut,
            "compiled": args.compile,
            "overlapped": args.overlap,
            "weights": "random",
            "llm": asdict(bench.config.llm),
        },
        "repeat": args.repeat,
        **found,
    }


def _check(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before anything is measured."""
    known = (*SUITE_ROWS, GROWTH, "baseline") if args.suite else MEASURES
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
    if args.plot:
        plot.require(args.plot)
    checks.whole("repeat", args.repeat, 1, 10_000)


def _config(name: str) -> LanceConfig:
    return RELEASED if name == "released" else Checkpoint(name).config


def _measure(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """The sizes asked for, one after the other."""
    config = bench.config
    parts = {"vit": "vit", "encode": "vae", "decode": "vae"}
    wanted = [m for m in MEASURES if m not in args.skip and getattr(config, parts.get(m, "llm"))]
    cases = [
        case_of(
            config,
            size,
            frames,
            batch=args.batch,
            guidance=args.guidance,
            edit=args.edit,
            context=args.context,
        )
        for size in args.size
        for frames in args.frames
    ]
    layers, cut = bench.fitting(cases, args.layers)
    speed = bench.rates()
    found: list[dict[str, Any]] = [{} for _ in cases]
    if set(DECODER) & set(wanted):
        model = bench.decoder(layers, "step" in wanted or args.edit)
        for case, measures in zip(cases, found, strict=True):
            measures |= bench.decoder_measures(case, model, wanted, speed)
        del model
        free(bench.device)
    for part in ("vit", "vae"):
        names = [name for name in wanted if parts.get(name) == part]
        if names:
            tower = bench.tower(part)
            for case, measures in zip(cases, found, strict=True):
                measures |= {name: bench.picture(name, case, tower, speed) for name in names}
            del tower
            free(bench.device)
    whole = layers < config.llm.num_layers
    return {
        "layers": (config.llm.num_layers, layers, cut),
        "rates": speed,
        "cases": [_case(bench, case, m, whole) for case, m in zip(cases, found, strict=True)],
    }


def _case(bench: Bench, case: Case, measures: dict[str, Any], extrapolated: bool) -> dict[str, Any]:
    entry = asdict(case) | {"measures": measures}
    if "step" in measures:
        entry["denoising"] = bench.denoising(case, measures, extrapolated)
    return entry
