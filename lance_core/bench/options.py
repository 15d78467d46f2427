"""The command line of `bench`: a subcommand a measurement. Imports nothing heavy: --help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

COMMANDS = {
    "speed": "passes of the sizes you ask for; what `bench` does without a command",
    "suite": "every kind of work against this device's limit and the released procedure, and how time grows",
    "memory": "peak memory of each request at the released sizes, and the smallest card that has it",
    "loading": "peak memory and time of loading a checkpoint of the released sizes; Linux only",
    "quality": "how far each weight format drifts from float32 and from bf16",
    "overhead": "what ComfyUI adds to a denoising step",
}
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
PARTS = ("und", "gen", "vit", "vae")
# What only `bench speed` asks, and what it asks when nothing is said.
OWN_SIZES = {
    "size": ["768x768"],
    "frames": [1],
    "batch": 1,
    "guidance": True,
    "edit": False,
    "baseline": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand with its options for every measurement; options without a command are those of `speed`."""
    parser.set_defaults(bench="speed")
    commands = parser.add_subparsers(
        dest="bench", metavar="WHAT", description="Without one of these: speed, and its options."
    )
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        {
            "speed": _speed,
            "suite": _suite,
            "memory": _memory,
            "loading": _loading,
            "quality": _quality,
            "overhead": _overhead,
        }[name](sub)
        files = sub.add_argument_group("results")
        files.add_argument("--output", metavar="FILE", help="write the result as JSON too")
        files.add_argument("--markdown", metavar="FILE", help="write the tables as Markdown too")
        # No defaults of their own: `bench -q memory` is quiet as well.
        for names, does in (
            (("--json",), "print one JSON object instead of text"),
            (QUIET, "no progress bars"),
        ):
            files.add_argument(*names, action="store_true", default=argparse.SUPPRESS, help=does)
    _default_to_speed(parser)


def _default_to_speed(parser: argparse.ArgumentParser) -> None:
    """Read `bench --size 64x64` as `bench speed --size 64x64`: argparse has no default for a subcommand."""
    parse = parser.parse_known_args

    def with_command(args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        words = list(sys.argv[1:] if args is None else args)
        first = next((word for word in words if word not in ("--json", *QUIET)), "speed")
        return parse(words if first in (*COMMANDS, "-h", "--help") else ["speed", *words], namespace)

    vars(parser)["parse_known_args"] = with_command


def _speed(parser: argparse.ArgumentParser) -> None:
    _passes(parser, f"leave out some of {', '.join(MEASURES)}; of a suite, what `bench suite` can")
    own = parser.add_argument_group("sizes")
    own.add_argument(
        "--size", nargs="+", default=OWN_SIZES["size"], metavar="WxH", help="pixels; one after the other"
    )
    own.add_argument(
        "--frames", nargs="+", type=int, default=OWN_SIZES["frames"], help="video frames; likewise"
    )
    own.add_argument("--batch", type=int, default=1)
    own.add_argument("--no-guidance", dest="guidance", action="store_false", help="no unconditional branch")
    own.add_argument(
        "--edit", action="store_true", help="an edit's context: ViT block and clean latent of the same size"
    )
    own.add_argument("--baseline", action="store_true", help="also time the released code's procedure")
    group = parser.add_argument_group("the suite instead of sizes")
    group.add_argument("--suite", nargs="?", const="auto", choices=SUITE_NAMES, help="as `bench suite`")
    _patience(group)


def _suite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "suite",
        nargs="?",
        default="auto",
        choices=SUITE_NAMES,
        help=f"full: the sizes that have goals on a large GPU; small: {SMALL_LAYERS} layers and small sizes, "
        "about ten minutes on two CPU cores; auto (default): full on CUDA, else small",
    )
    _passes(parser, f"leave out some of {', '.join((*SUITE_ROWS, GROWTH, 'baseline'))}")
    _patience(parser)
    parser.set_defaults(**OWN_SIZES)


def _patience(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--patience",
        type=float,
        default=300,
        metavar="SECONDS",
        help="skip rows that need longer; default: %(default)s",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw it, as .png or whatever matplotlib writes (pip install '.[bench]')",
    )


def _passes(parser: argparse.ArgumentParser, skip: str) -> None:
    """What `speed` and `suite` share."""
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument(
        "--model",
        default="released",
        help="`released`, or a checkpoint folder whose sizes to take; weights are random",
    )
    parser.add_argument(
        "--layers", type=int, help="cut the decoder to so many (default: all, or as many as memory holds)"
    )
    parser.add_argument(
        "--context", type=int, default=100, metavar="TOKENS", help="length of the caption or question"
    )
    parser.add_argument(
        "--repeat", type=int, default=5, help="timed runs of each measure, after warm-up; the median counts"
    )
    parser.add_argument(
        "--compile", action="store_true", help="as with the tasks; the baseline stays as it is"
    )
    parser.add_argument("--overlap", action="store_true", help="likewise")
    parser.add_argument("--profile", action="store_true", help="also say what ours spends its time on")
    parser.add_argument("--skip", nargs="+", default=[], metavar="WHAT", help=skip)


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="meta",
        choices=("meta", "cuda"),
        help="meta (default): count every tensor, anywhere; cuda: run it, and read the allocator's peak",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="requests whose name contains this")
    parser.add_argument(
        "--top", type=int, default=0, metavar="N", help="list the N largest tensors at each stage's peak"
    )


def _loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, help="cut the experts to so many, for little memory")
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", help="some of image, video, bf16, fp8, int8, int4, nvfp4"
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--repeat", type=int, default=3, help="the fastest counts; default: %(default)s")
    parser.add_argument(
        "--folder", metavar="DIR", help="for the sparse files (default: the system's for such)"
    )


def _quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", metavar="DIR", help="checkpoints to measure, instead of random weights"
    )
    parser.add_argument("--layers", type=int, default=4, help="of the random weights; default: %(default)s")
    parser.add_argument(
        "--cells", type=int, default=8, help="latent cells a side, 48 for 768x768; default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")


def _overhead(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--comfyui", metavar="DIR", help="where ComfyUI is (default: $COMFYUI_PATH)")
    parser.add_argument(
        "--comfyui-python",
        metavar="PYTHON",
        help="the Python that runs it (default: $COMFYUI_PYTHON, or the venv in its folder)",
    )
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder, instead of random weights")
    parser.add_argument("--layers", type=int, default=2, help="of the random weights; default: %(default)s")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny widths: a step then costs little but calling it"
    )
    parser.add_argument("--size", default="256x256", metavar="WxH", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=6, help="in a run, at least 2; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each path; default: %(default)s")
    parser.add_argument("--gpu", action="store_true", help="let ComfyUI use the GPU")
    parser.add_argument(
        "--comfy",
        nargs="+",
        default=[],
        metavar="ARG",
        help="options of ComfyUI's own, without dashes: use-pytorch-cross-attention",
    )
    parser.add_argument("--top", type=int, default=10, help="lines of each profile; default: %(default)s")
