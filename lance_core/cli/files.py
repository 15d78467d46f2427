"""Commands about checkpoints as files: info, tiny, convert, download."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..config import STORED_DTYPES
from .common import Bars, check_target, model_options, output_options, part_options


def add_commands(commands: Any) -> None:
    """The four."""
    about = commands.add_parser("info", help="what a checkpoint is, its sizes, what it needs")
    model_options(about)
    output_options(about)
    about.add_argument("path", metavar="PATH")
    about.set_defaults(run=info)

    small = commands.add_parser("tiny", help="write a small random checkpoint in the released layout")
    small.add_argument("folder", metavar="DIR")
    small.add_argument("--seed", type=int, default=0)
    small.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    small.set_defaults(run=tiny)

    from ..hub import download as hub

    fetch = commands.add_parser(
        "download", help="fetch a released checkpoint; without a name, list what there is"
    )
    hub.add_arguments(fetch)
    output_options(fetch)
    fetch.set_defaults(run=download)

    shrink = commands.add_parser("convert", help="write a checkpoint as one file, smaller if wanted")
    shrink.add_argument("source", metavar="SRC", help="checkpoint folder or file")
    shrink.add_argument("target", metavar="DST", help="the .safetensors file to write")
    text = (
        "what both experts are kept in; below 16 bits only the middle layers' matrices are, the rest is bf16"
    )
    shrink.add_argument(
        "--dtype", choices=STORED_DTYPES, default="bf16", help=f"{text}; default: %(default)s"
    )
    text = "another one for the understanding expert; int4 and nvfp4 are for files that only answer questions"
    shrink.add_argument("--understanding", choices=STORED_DTYPES, help=text)
    text = "another one for the generation expert; below 16 bits pictures are reported to lose detail"
    shrink.add_argument("--generation", choices=STORED_DTYPES, help=text)
    text = "leave the VAE out; it is then looked for beside the file"
    shrink.add_argument("--no-vae", action="store_true", help=text)
    part_options(shrink)
    output_options(shrink)
    shrink.set_defaults(run=convert)


def info(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Describe a checkpoint."""
    from ..checkpoint import describe

    result = describe.describe(args.path, vit=args.vit, vae=args.vae)
    if not args.json:
        print(describe.report(result))
    return result


def tiny(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Write the small random checkpoint."""
    from ..checkpoint import tiny as writer

    folder = writer.write(args.folder, seed=args.seed)
    if not args.json:
        names = "Lance_3B, Lance_3B_Video, Qwen2.5-VL-ViT and Wan2.2_VAE.pth"
        print(f"{folder}: {names}, with random weights (they draw noise)")
    return {"folder": str(folder)}


def convert(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Write a checkpoint as one file."""
    from ..checkpoint import convert as converter

    if Path(args.target).suffix.lower() == ".safetensors":  # else `convert` itself says what is expected
        check_target(args.target)
    result = converter.convert(
        args.source,
        args.target,
        args.dtype,
        understanding=args.understanding,
        generation=args.generation,
        include_vae=not args.no_vae,
        vit=args.vit,
        vae=args.vae,
        progress=bars,
    )
    if not args.json:
        print(converter.report(result))
    return result


def download(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Fetch a released checkpoint, or list what there is."""
    from ..hub import download as hub

    result = hub.run(args, bars)
    if not args.json:
        print(hub.report(result))
    return result
