"""Commands about training: train, and dataset check, convert and caption."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..inputs.sizes import PRESETS
from .common import Bars, check_target, device_of, dtype_of, output_options, part_options

EXPERTS = ("generation", "understanding", "both")


def add_commands(commands: Any) -> None:
    """The two."""
    learn = commands.add_parser("train", help="train a LoRA on pictures, clips, edits or answers")
    _add_train(learn)
    learn.set_defaults(run=train)
    add_dataset(commands)


def _add_train(sub: argparse.ArgumentParser) -> None:
    shown = "default: %(default)s"
    sub.add_argument("data", metavar="DATA", help="a folder, or a .jsonl, .parquet or .yaml file")
    _add_model(sub)
    sub.add_argument("-o", "--output", metavar="FILE", required=True, help="the .safetensors file to write")
    sub.add_argument("--resume", action="store_true", help="go on from the newest state of this output")
    sub.add_argument("--strict", action="store_true", help="refuse a data set with a bad row")
    sub.add_argument("--cache", metavar="DIR", help="latents and ViT embeddings; default: beside the states")
    what = sub.add_argument_group("what is trained")
    what.add_argument("--experts", choices=EXPERTS, default="generation", help=shown)
    what.add_argument("--targets", choices=("attention", "mlp"), nargs="+", help="default: both")
    what.add_argument("--rank", type=int, default=16, help=shown)
    what.add_argument("--alpha", type=float, help="strength is alpha / rank; default: the rank")
    what.add_argument("--full", action="store_true", help="all weights instead of a LoRA")
    what.add_argument("--task", choices=("auto", "i2v", "x2t_image", "x2t_video"), default="auto")
    what.add_argument("--question", help="with --task x2t_*: what captions are the answers to")
    how = sub.add_argument_group("how")
    how.add_argument("--steps", type=int, help="default: 1000")
    how.add_argument("--epochs", type=float, help="instead of --steps: times every row is seen")
    how.add_argument("--lr", type=float, help="default: 1e-4, with --full 1e-5")
    how.add_argument("--schedule", choices=("constant", "cosine"), default="constant", help=shown)
    how.add_argument("--warmup", type=int, default=10, help=f"steps; {shown}")
    how.add_argument("--batch", type=int, default=1, help=f"samples a step, of all GPUs; {shown}")
    text = "tokens of one pass; a larger batch is accumulated"
    how.add_argument("--max-tokens", type=int, default=16384, help=f"{text}; {shown}")
    how.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help=shown)
    how.add_argument("--clip", type=float, default=1.0, help=f"largest gradient norm, 0 for none; {shown}")
    how.add_argument("--caption-dropout", type=float, default=0.1, help=shown)
    how.add_argument("--reference-dropout", type=float, default=0.1, help=f"of edits; {shown}")
    how.add_argument("--ema", type=float, default=0.0, help="decay of an average that is saved, too")
    how.add_argument("--seed", type=int, default=0, help=shown)
    how.add_argument("--resolution", choices=PRESETS, help="default: 768 for pictures, 480p for clips")
    text = "of a clip, 12 a second from its start; default: up to 73 over all of it"
    how.add_argument("--num-frames", "--frames", type=int, help=text)
    text = "the released trainer's sequences instead of those inference runs"
    how.add_argument("--as-released", action="store_true", help=text)
    watch = sub.add_argument_group("what is shown and saved")
    watch.add_argument("--save-every", type=int, default=100, help=f"steps; {shown}")
    text = "rows held out (below 1: a share); default: a tenth from 10 rows on"
    watch.add_argument("--validation", type=float, help=text)
    text = "draw this (ask this, of a question) now and then; repeatable"
    watch.add_argument("--sample-prompt", action="append", default=[], metavar="TEXT", help=text)
    watch.add_argument("--sample-every", type=int, help="steps; default: --save-every")
    watch.add_argument("--sample-steps", type=int, default=30, help=shown)
    output_options(sub)


def _add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "-m",
        "--model",
        "--checkpoint",
        metavar="DIR",
        help="checkpoint; default: models/lance/Lance_3B_Video, or Lance_3B where that is missing",
    )
    part_options(sub)
    sub.add_argument("--device", help="torch device; default: cuda where there is one, else cpu")
    sub.add_argument(
        "--dtype",
        choices=("bf16", "fp32", "bfloat16", "float32"),
        default="bfloat16",
        metavar="{bfloat16,float32}",
        help="of the base's weights and the computation; default: %(default)s",
    )


OPTIONS = [
    *("experts", "rank", "alpha", "full", "task", "question", "lr", "schedule", "warmup", "batch"),
    *("max_tokens", "optimizer", "clip", "caption_dropout", "reference_dropout", "ema", "seed"),
    *("resolution", "num_frames", "as_released", "save_every", "validation", "sample_every"),
    "sample_steps",
]


def train(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Train; the bar shows the loss."""
    output = Path(args.output)
    if output.suffix.lower() == ".safetensors":  # else `train` itself says what is expected
        check_target(output)
    from .. import training

    options = {name: getattr(args, name) for name in OPTIONS}
    options["sample_prompts"] = tuple(args.sample_prompt)
    if args.targets:
        options["targets"] = tuple(args.targets)

    if int(os.environ.get("RANK", "0")):  # one of several processes speaks for all
        bars.enabled = args.json = False

    def on_step(done: int, total: int, result: Any) -> None:
        memory = f", {result.gpu_gb:.1f} GB" if result.gpu_gb else ""
        bars.status(f"loss {result.loss:.4f}{memory}")

    result = training.train(
        args.data,
        model_of(args.model),
        output,
        steps=args.steps,
        epochs=args.epochs,
        dtype=dtype_of(args.dtype),
        device=device_of(args.device),
        resume=args.resume,
        strict=args.strict,
        cache=args.cache,
        vit=args.vit,
        vae=args.vae,
        progress=bars,
        on_step=on_step,
        **options,
    )
    if not args.json and int(os.environ.get("RANK", "0")) == 0:
        print(report(result))
    return result


def model_of(given: str | None) -> Path:
    """The checkpoint asked for, or the one there is."""
    if given:
        return Path(given)
    video, image = (Path("models/lance") / name for name in ("Lance_3B_Video", "Lance_3B"))
    return video if video.exists() or not image.exists() else image


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['file']}: {result['steps']} steps on {result['rows'] - result['held_out']} rows"]
    if result["loss"] is not None:
        lines.append(f"  loss {result['loss']:.4f}, of the last step")
    if result["validation"] is not None:
        told = f"of {result['held_out']} rows held out" if result["held_out"] else "of trained rows"
        lines.append(f"  validation loss {result['validation']:.4f}, {told}")
    lines.append(f"  {result['folder']}: lines, plot, states and samples")
    lines += [f"  left out: {name}: {why}" for name, why in list(result["skipped"].items())[:20]]
    if len(result["skipped"]) > 20:
        lines.append(f"  and {len(result['skipped']) - 20} more (`python -m lance_core dataset check`)")
    return "\n".join([*lines, *(f"  {note}" for note in result["notes"])])


def add_dataset(commands: Any) -> None:
    """dataset check, convert and caption."""
    about = commands.add_parser("dataset", help="check, convert or caption a data set for `train`")
    verbs = about.add_subparsers(dest="verb", required=True, metavar="VERB")
    check = verbs.add_parser("check", help="what is in it and what is wrong with it, row by row")
    check.add_argument("data", metavar="DATA")
    check.add_argument("--resolution", choices=PRESETS, help="default: each task's own")
    check.add_argument("--task", choices=("auto", "i2v", "x2t_image", "x2t_video"), default="auto")
    check.add_argument("--question", help="with --task x2t_*: what captions are the answers to")
    check.set_defaults(run=dataset_check)

    convert = verbs.add_parser("convert", help="write it in another form, media copied")
    convert.add_argument("data", metavar="DATA")
    convert.add_argument("target", metavar="DIR", help="a new folder")
    convert.add_argument("--to", choices=("folder", "jsonl", "parquet"), required=True)
    convert.set_defaults(run=dataset_convert)

    caption = verbs.add_parser("caption", help="let Lance write NAME.txt beside pictures and clips")
    caption.add_argument("data", metavar="DIR")
    _add_model(caption)
    caption.add_argument("--question", help="what to ask; default: to describe it in one detailed sentence")
    caption.add_argument("--overwrite", action="store_true", help="write over captions that are there")
    text = "what the model sees; default: each task's own"
    caption.add_argument("--resolution", choices=PRESETS, help=text)
    caption.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    caption.set_defaults(run=dataset_caption)
    for sub in (check, convert, caption):
        output_options(sub)


def dataset_check(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Describe a data set."""
    from ..training import inspection

    task = None if args.task == "auto" else args.task
    result = inspection.inspect(args.data, args.resolution, task, args.question, bars)
    if not args.json:
        print(inspection.report(result))
    return result


def dataset_convert(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Write a data set in another form."""
    from ..training import conversion

    result = conversion.convert(args.data, args.target, args.to)
    if not args.json:
        print(f"{result['folder']}: {result['rows']} rows as {result['form']}")
        for name, why in result["problems"].items():
            print(f"  left out: {name}: {why}")
        for note in result["notes"]:
            print(f"  note: {note}")
    return result


def dataset_caption(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Write captions."""
    from ..pipeline import load
    from ..training import captions

    options = {"vit": args.vit, "vae": args.vae, "progress": None}
    lance = load(model_of(args.model), device_of(args.device), dtype_of(args.dtype), **options)
    result = captions.caption(
        Path(args.data),
        lance,
        args.question,
        args.overwrite,
        args.resolution,
        args.max_new_tokens,
        bars,
    )
    if not args.json:
        for name, text in result["captions"].items():
            print(f"{name}: {text}")
        print(f"{len(result['captions'])} written, {result['kept']} were there")
        for name, why in result["problems"].items():
            print(f"  left out: {name}: {why}")
    return result
