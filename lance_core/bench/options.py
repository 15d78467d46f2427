"""The command line of `bench`: a subcommand a measurement. Imports nothing heavy: --help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
DECODER = ("step", "prefill", "token")
MEASURES = (*DECODER, "vit", "encode", "decode")
GROWTH = "growth"
SUITE_ROWS = (
    *("t2i", "t2i_batch4", "t2v", "prefill_edit", "token"),
    *("decode_image", "encode_image", "decode_video", "encode_video"),
)
SUITE_NAMES = ("full", "small", "auto")
SMALL_LAYERS = 2  # of the small suite
QUIET = ("-q", "--quiet")
PASSES = (
    *("t2i_768_guided", "t2i_768_one", "t2v_25_guided", "t2v_121_guided"),
    *("edit_768_prefill", "text_prefill", "text_token"),
    *("vae_decode_768", "vae_decode_121", "vae_encode_768", "vit_768"),
)
PARTS = ("und", "gen", "vit", "vae")
# What only `bench speed` asks, and what it asks when nothing is said.
OWN_SIZES: dict[str, Any] = {"size": ["768x768"], "frames": [1], "batch": 1}
OWN_SIZES |= {"guidance": True, "edit": False, "baseline": False}


def _option(
    group: argparse._ActionsContainer, name: str, default: Any, text: str = "", metavar: str | None = None
) -> None:
    """An option of its default's type, whose help tells the default; a flag by a default of False."""
    if default is False:
        group.add_argument(f"--{name}", action="store_true", help=text)
        return
    several = isinstance(default, list)
    kind = type(default[0] if several else default)
    told = [text] if text else []
    text = "; ".join(told if several else [*told, "default: %(default)s"])
    nargs = "+" if several else None
    group.add_argument(f"--{name}", type=kind, nargs=nargs, default=default, metavar=metavar, help=text)


def _passes(parser: argparse.ArgumentParser, skip: tuple[str, ...]) -> None:
    """What `speed` and `suite` share."""
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    _option(parser, "dtype", "bfloat16", f"one of {', '.join(DTYPES)}")
    _option(
        parser, "model", "released", "`released` or a checkpoint folder whose sizes to take; random weights"
    )
    parser.add_argument("--layers", type=int, help="cut the decoder to so many (default: as memory holds)")
    _option(parser, "context", 100, "length of the caption or question", "TOKENS")
    _option(parser, "repeat", 5, "timed runs of each measure, after warm-up; the median counts")
    _option(parser, "compile", False, "as of the tasks; the baseline is never compiled")
    _option(parser, "overlap", False, "as of the tasks")
    _option(parser, "profile", False, "also say what ours spends its time on")
    leave = f"leave out some of {', '.join(skip)}"
    parser.add_argument("--skip", nargs="+", default=[], metavar="WHAT", help=leave)


def _suite_options(group: argparse._ActionsContainer) -> None:
    _option(group, "patience", 300.0, "skip rows that need longer", "SECONDS")
    drawn = "draw it, as .png or whatever matplotlib writes (pip install '.[bench]')"
    group.add_argument("--plot", metavar="FILE", help=drawn)


def _speed(parser: argparse.ArgumentParser) -> None:
    _passes(parser, MEASURES)
    own = parser.add_argument_group("sizes")
    _option(own, "size", OWN_SIZES["size"], "pixels, one after the other (default: 768x768)", "WxH")
    _option(own, "frames", OWN_SIZES["frames"], "of video, one after the other (default: 1)", "N")
    _option(own, "batch", OWN_SIZES["batch"], "results at once")
    own.add_argument("--no-guidance", dest="guidance", action="store_false", help="no unconditional branch")
    _option(own, "edit", False, "an edit's context: ViT block and clean latent of the same size")
    _option(own, "baseline", False, "also time the released code's procedure")
    group = parser.add_argument_group("the suite instead of sizes")
    group.add_argument("--suite", nargs="?", const="auto", choices=SUITE_NAMES, help="as `bench suite`")
    _suite_options(group)


def _suite(parser: argparse.ArgumentParser) -> None:
    which = (
        f"full: the sizes that have goals on a large GPU; small: {SMALL_LAYERS} layers and small sizes, "
        "about ten minutes on two CPU cores; auto (default): full on CUDA, else small"
    )
    parser.add_argument("suite", nargs="?", default="auto", choices=SUITE_NAMES, help=which)
    _passes(parser, (*SUITE_ROWS, GROWTH, "baseline"))
    _suite_options(parser)
    parser.set_defaults(**OWN_SIZES)


def _memory(parser: argparse.ArgumentParser) -> None:
    how = "meta (default): count every tensor, anywhere; cuda: run it, and read the allocator's peak"
    parser.add_argument("--device", default="meta", choices=("meta", "cuda"), help=how)
    parser.add_argument("--only", default="", metavar="TEXT", help="requests whose name contains this")
    _option(parser, "top", 0, "list the N largest tensors at each stage's peak", "N")


def _count(parser: argparse.ArgumentParser) -> None:
    which = f"some of {', '.join(PASSES)} (default: all)"
    parser.add_argument("--passes", nargs="+", choices=PASSES, metavar="NAME", help=which)
    cards = ("all", "h200", "4090", "3060")
    parser.add_argument("--card", default="all", choices=cards, help="predict times for this one (all)")
    parser.add_argument("--layers", type=int, help="cut the experts to so many (default: all 36)")
    text = "predict instead what several GPUs gain on one video (t2v --split)"
    instead: dict[str, Any] = {"action": "store_const", "const": "split_count", "default": argparse.SUPPRESS}
    parser.add_argument("--split", dest="bench", help=text, **instead)
    _option(parser, "top", 8, "source lines that move the most bytes outside products", "N")


def _loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, help="cut the experts to so many, for little memory")
    cases = "some of image, video, bf16, fp8, int8, int4, nvfp4 (default: all)"
    parser.add_argument("--cases", nargs="+", metavar="NAME", help=cases)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="default: all")
    _option(parser, "repeat", 3, "the fastest counts")
    parser.add_argument("--folder", metavar="DIR", help="for the sparse files (default: a temporary one)")


def _quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", metavar="DIR", help="checkpoints, instead of random weights")
    _option(parser, "layers", 4, "of the random weights")
    _option(parser, "cells", 8, "latent cells a side, 48 for 768x768")
    _option(parser, "steps", 3)


def _overhead(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--comfyui", metavar="DIR", help="where ComfyUI is (default: $COMFYUI_PATH)")
    python = "the Python that runs it (default: $COMFYUI_PYTHON, or the venv in its folder)"
    parser.add_argument("--comfyui-python", metavar="PYTHON", help=python)
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder, instead of random weights")
    _option(parser, "layers", 2, "of the random weights")
    _option(
        parser, "tiny", False, "tiny widths: hardly any arithmetic, so that a step is what calling it costs"
    )
    _option(parser, "size", "256x256", "", "WxH")
    _option(parser, "steps", 6, "in a run, at least 2")
    _option(parser, "rounds", 5, "runs of each path")
    _option(parser, "gpu", False, "let ComfyUI use the GPU")
    own = "options of ComfyUI's own, without dashes: use-pytorch-cross-attention"
    parser.add_argument("--comfy", nargs="+", default=[], metavar="ARG", help=own)
    _option(parser, "top", 10, "lines of each profile")


COMMANDS = {
    "speed": ("passes of the sizes you ask for; what `bench` does without a command", _speed),
    "suite": ("every kind of work against this device's limit and the released procedure", _suite),
    "memory": ("peak memory of requests at the released sizes, and the smallest card that has it", _memory),
    "count": ("kernels, operations and bytes of each pass at the released sizes, counted", _count),
    "loading": ("peak memory and time of loading a checkpoint of the released sizes; Linux only", _loading),
    "quality": ("how far each weight format drifts from float32 and from bf16", _quality),
    "overhead": ("what ComfyUI adds to a denoising step", _overhead),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand with its options for every measurement; options without a command are those of `speed`."""
    parser.set_defaults(bench="speed")
    both = ((("--json",), "print one JSON object instead of text"), (QUIET, "no progress bars"))
    for names, does in both:
        parser.add_argument(*names, action="store_true", help=does)
    commands = parser.add_subparsers(
        dest="bench", metavar="WHAT", description="Without one of these: speed, and its options."
    )
    for name, (text, add_options) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_options(sub)
        files = sub.add_argument_group("results")
        files.add_argument("--output", metavar="FILE", help="write the result as JSON too")
        files.add_argument("--markdown", metavar="FILE", help="write the tables as Markdown too")
        # No defaults of their own: `bench -q memory` is quiet as well.
        for names, does in both:
            files.add_argument(*names, action="store_true", default=argparse.SUPPRESS, help=does)
    _default_to_speed(parser)


def _default_to_speed(parser: argparse.ArgumentParser) -> None:
    """Read `bench --size 64x64` as `bench speed --size 64x64`: argparse has no default for a subcommand."""
    parse = parser.parse_known_args

    def with_command(args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        words = list(sys.argv[1:] if args is None else args)
        first = next((word for word in words if word not in ("--json", *QUIET)), None)
        return parse(words if first in (*COMMANDS, "-h", "--help") else ["speed", *words], namespace)

    vars(parser)["parse_known_args"] = with_command
