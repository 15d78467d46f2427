"""Commands for more than one result: `extend`, and `story`, which is story.py's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..inputs.sizes import PRESETS
from . import options, story
from .common import Bars, check_target, model_options, output_options
from .generate import enhanced, opened
from .saving import save_one


def add_commands(commands: Any) -> None:
    """The two."""
    text = "go on from the end of a clip; old and new are written as one"
    sub = commands.add_parser("extend", help=text, description=f"{text.capitalize()}.")
    model_options(sub)
    output_options(sub)
    sub.add_argument("clip", help="the clip")
    sub.add_argument("prompt", help="what happens next")
    sub.add_argument("-o", "--output", metavar="FILE", default="extend.mp4", help=options.SHOWN)
    text = f"new frames for each prompt, lowered to a multiple of 4, 12 a second; {options.SHOWN}"
    sub.add_argument("--frames", "--num-frames", type=int, default=48, help=text)
    text = "what happens after that, as many frames again; repeatable"
    sub.add_argument("--then", action="append", default=[], metavar="PROMPT", help=text)
    text = (
        "latent frames (of four) at the end that each part starts from; 1, the last frame alone, is as the "
    )
    text += f"weights know it; {options.SHOWN}"
    sub.add_argument("--held", type=int, default=1, metavar="M", help=text)
    text = "leave the colours as they come, instead of holding those of the clip"
    sub.add_argument("--free-colours", action="store_true", help=text)
    text = "pixels, lowered to a multiple of 16; default: the clip's own where that fits"
    sub.add_argument("--width", type=int, help=text)
    sub.add_argument("--height", type=int)
    sub.add_argument("--resolution", choices=PRESETS, help="default: video_480p")
    sub.add_argument("--system-prompt", help="instead of the instruction the weights were trained with")
    options.add_sampling_options(sub)
    sub.add_argument("--seed", type=int, default=42, help=f"part i has SEED + i; {options.SHOWN}")
    options.add_enhance_options(sub)
    sub.set_defaults(run=run_extend)

    text = "a script of shots as pictures, clips and one video; a second run does what is missing"
    sub = commands.add_parser("story", help=text, description=story.DESCRIPTION)
    model_options(sub)
    output_options(sub)
    sub.add_argument("script", metavar="FILE.toml")
    sub.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="where everything is written and kept"
    )
    sub.set_defaults(run=story.run)


def run_extend(args: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Write a clip and what comes after it."""
    from ..inputs import media

    output = Path(args.output)
    if output.suffix.lower() not in media.VIDEO_FORMATS:
        raise RequestError(f"{output}: extend writes videos, as one of {', '.join(media.VIDEO_FORMATS)}")
    check_target(output)
    lance = opened(args, True, bars)
    chosen = {key: getattr(args, key) for key in options.SAMPLING if hasattr(args, key)}
    wishes, last = [args.prompt, *args.then], None
    if args.enhance:
        last = media.read_clip(args.clip, pick=lambda total, rate: [total - 1], progress=None)[0][0]
    pairs = [enhanced(args, "i2v", wish, last, lance) for wish in wishes]
    prompts = [prompt for prompt, _ in pairs]
    told = {"overlap": args.held, "hold_colours": not args.free_colours}
    frames = lance.extend(args.clip, prompts, num_frames=args.frames, **told, **chosen)
    asked: dict[str, Any] = {"task": "extend", "prompt": prompts[0], "clip": str(args.clip)} | told
    asked |= {k: v for k, v in chosen.items() if v is not None} | pairs[0][1]
    asked |= {"turns": wishes} if len(wishes) > 1 else {}
    asked |= {"width": frames.width, "height": frames.height, "num_frames": frames.count}
    asked |= {"old_frames": frames.old, "checkpoint": lance.checkpoint.path.name}
    return {
        "task": "extend",
        "files": [save_one(output, frames, frames.count, frames.fps, asked, args, bars)],
    }
