"""The options of the tasks: for pictures and videos, and for answers."""

from __future__ import annotations

import argparse

from ..config import MAX_FRAMES, RELEASED_SAMPLING, RENORMS
from ..inputs.tasks import SIZES, Task
from .saving import default_output

SHOWN = "default: %(default)s"
SAMPLING = ["width", "height", "steps", "shift", "cfg", "cfg_interval", "cfg_vision", "renorm", "renorm_min"]
SAMPLING += ["seed", "negative_prompt", "system_prompt", "resolution"]
ANSWERING = ["system_prompt", "resolution", "max_new_tokens", "temperature", "top_p", "seed", "positions"]
CLIP = ["fps", "start", "length"]


SPLITS = ("guidance", "sequence", "both")


def add_generation_options(sub: argparse.ArgumentParser, task: Task) -> None:
    """What a drawing task takes."""
    video = task.output == "video"
    sub.add_argument("-o", "--output", metavar="FILE", help=f"default: {default_output(task)}")
    if not task.sized_by_input:
        sizes = ", ".join(f"{w}x{h}" for w, h in SIZES["video_480p" if video else "image_768res"].values())
        text = f"pixels, lowered to a multiple of 16; good sizes: {sizes}"
        sub.add_argument("--width", type=int, help=text)
        sub.add_argument("--height", type=int)
    if video and task.takes != "video":
        text = f"lowered to 4k+1, 12 a second; more than {MAX_FRAMES} are made in windows; default: 49"
        sub.add_argument("--frames", "--num-frames", type=int, help=text)
        add_window_options(sub)
    add_sampling_options(sub)
    if task.takes == "references" or task.system == "edit":
        text = "guidance on what is shown, 1 turns it off; default: 1"
        sub.add_argument("--cfg-vision", type=float, default=1.0, help=text)
    sub.add_argument("--seed", type=int, default=RELEASED_SAMPLING.seed, help=SHOWN)
    text = "N results with seeds SEED, SEED+1, …; default: 1"
    sub.add_argument("--batch", type=int, default=1, metavar="N", help=text)
    text = "several processes, a GPU each, draw one result: guidance's passes apart, tokens divided, or both"
    sub.add_argument("--split", choices=SPLITS, help=text)
    sub.add_argument("--workers", metavar="N", help="how many for --split; default: all GPUs")
    text = "draw N with seeds that follow each other and write the one that fits the prompt best"
    sub.add_argument("--best-of", type=int, metavar="N", help=text)
    text = "of --best-of, write the best K; default: 1"
    sub.add_argument("--keep", type=int, metavar="K", help=text)
    add_enhance_options(sub)
    add_further_options(sub, task)


def add_sampling_options(sub: argparse.ArgumentParser) -> None:
    """Steps and guidance."""
    default = RELEASED_SAMPLING
    sub.add_argument("--steps", type=int, default=default.steps, help=SHOWN)
    sub.add_argument("--shift", type=float, default=default.shift, help=SHOWN)
    text = f"guidance scale, 1 turns it off; {SHOWN}"
    sub.add_argument("--cfg", type=float, default=default.cfg, help=text)
    low, high = default.cfg_interval
    sub.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        default=default.cfg_interval,
        metavar=("LOW", "HIGH"),
        help=f"guidance applies at times above LOW up to HIGH; default: {low} {high}",
    )
    sub.add_argument("--renorm", choices=RENORMS, default=default.renorm, help=SHOWN)
    sub.add_argument("--renorm-min", type=float, default=default.renorm_min, help=SHOWN)
    text = "what to stay away from; default: the trained unconditional sequence"
    sub.add_argument("--negative-prompt", help=text)


def add_window_options(sub: argparse.ArgumentParser) -> None:
    """How videos beyond what the model knows are cut."""
    text = f"frames of one window, at most {MAX_FRAMES}; {SHOWN}"
    sub.add_argument("--window", type=int, default=MAX_FRAMES, metavar="N", help=text)
    text = f"frames that neighbouring windows share; {SHOWN}"
    sub.add_argument("--window-overlap", type=int, default=32, metavar="N", help=text)
    text = f"windows fade into each other, or their mean is taken; {SHOWN}"
    sub.add_argument("--blend", choices=("pyramid", "flat"), default="pyramid", help=text)


def add_enhance_options(sub: argparse.ArgumentParser) -> None:
    """--enhance and who does it."""
    text = "write the prompt out in detail first: by the service in LANCE_REWRITE_BASE_URL, _MODEL_NAME and "
    text += "_API_KEY where those are set, else by the model itself"
    sub.add_argument("--enhance", action="store_true", help=text)
    text = "who writes it out; default: as --enhance says"
    sub.add_argument("--enhance-by", choices=("auto", "model", "endpoint"), default="auto", help=text)


def add_further_options(sub: argparse.ArgumentParser, task: Task) -> None:
    """Keyframes, and what comes after the first result."""
    if task.name in ("t2v", "i2v"):
        text = "a picture kept as frame N (from 0; -1 is the last, as the weights know it; others are an "
        text += "experiment); repeatable"
        sub.add_argument("--keyframe", nargs=2, action="append", default=[], metavar=("N", "FILE"), help=text)
        text = "what happens next, as many frames again in the same file; repeatable"
        sub.add_argument("--then", action="append", default=[], metavar="PROMPT", help=text)
    elif task.name == "image_edit":
        text = "another edit, of the last result; repeatable"
        sub.add_argument("--then", action="append", default=[], metavar="PROMPT", help=text)


def add_text_options(sub: argparse.ArgumentParser) -> None:
    """How an answer is written."""
    sub.add_argument("--max-new-tokens", type=int, default=256, help=SHOWN)
    text = f"0 takes the likeliest token; {SHOWN}"
    sub.add_argument("--temperature", type=float, default=0.0, help=text)
    sub.add_argument("--top-p", type=float, default=1.0, help=SHOWN)
    sub.add_argument("--seed", type=int, default=0, help=SHOWN)
    add_position_options(sub)


def add_position_options(sub: argparse.ArgumentParser) -> None:
    """--positions."""
    text = "where what is shown stands in time: as the released inference code has it, or as the released "
    text += f"training code has; {SHOWN}"
    sub.add_argument("--positions", choices=("released", "as trained"), default="released", help=text)


def add_clip_options(sub: argparse.ArgumentParser) -> None:
    """Which part of clips is seen."""
    text = "frames a second of a clip that are seen; default: 12, up to 6 seconds' worth over the whole"
    sub.add_argument("--fps", type=float, help=text)
    sub.add_argument("--start", type=float, metavar="SECONDS", help="where in a clip to begin; default: 0")
    sub.add_argument("--length", type=float, metavar="SECONDS", help="how much of it; default: the rest")
    sub.add_argument("--frames", type=int, metavar="N", help="how many frames are seen, instead of --fps")
