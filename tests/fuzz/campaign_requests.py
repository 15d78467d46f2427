"""Requests of every task with odd values for any argument, to one small model."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from campaign_checkpoints import FOLDER, LLM, VAE, VIT
from PIL import Image

import lance_core
from lance_core.checkpoint import tiny
from lance_core.inputs.sizes import PRESETS
from lance_core.inputs.tasks import TASKS

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2.5,
    10**400,
    2**64,
    math.nan,
    math.inf,
    1e-320,
    "",
    "x",
    b"x",
    "\ud83d",
    "a" * 100_000,
]
ODD += [
    [],
    [1],
    (1, 2, 3),
    {},
    {"a": 1},
    object(),
    len,
    np.int64(3),
    np.float32(0.5),
    torch.tensor(1),
    torch.zeros(2),
    np.zeros(3),
]
GOOD: dict[str, list[Any]] = {
    "width": [16, 32, 48, 33.0],
    "height": [16, 32, 48],
    "num_frames": [1, 5, 6],
    "resolution": ["image_256res", "video_192p"],
    "steps": [1, 2],
    "shift": [0.5, 1, 3.5],
    "cfg": [0, 1, 4.0],
    "cfg_interval": [(0.4, 1.0), [0, 1]],
    "renorm": ["global", "channel", "none"],
    "renorm_min": [0, 0.5, 1],
    "seed": [0, 7, 2**63],
    "negative_prompt": ["blurry", ""],
    "system_prompt": ["Draw:", ""],
    "batch_size": [1, 2],
    "noise": [None],
    "callback": [None, lambda *args: None],
}
ASK: dict[str, list[Any]] = {
    "resolution": ["image_256res", "video_192p"],
    "system_prompt": ["Answer:", ""],
    "max_new_tokens": [1, 2, 3],
    "temperature": [0, 0.7, 2],
    "top_p": [0.1, 0.9, 1],
    "seed": [0, 5],
    "on_token": [None, lambda piece: None],
}


def prepare(folder: Path) -> None:
    """A small checkpoint that knows every task."""
    tiny.write(folder / "m", llm=LLM, vit=VIT, vae=VAE)


def load(folder: Path) -> dict[str, Any]:
    """What a worker keeps: the model, and pictures of all kinds."""
    torch.set_num_threads(1)
    for preset in PRESETS:  # as large as a test can afford ten thousand times
        PRESETS[preset] = (64, 56)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (20, 28, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "png")
    pictures = [
        picture,
        Image.fromarray(picture),
        torch.from_numpy(picture),
        picture / 255.0,
        picture[..., 0],
        picture[None],
        png,
    ]
    clips = [np.stack([picture] * 6), (np.stack([picture] * 9), 12), [picture] * 3]
    lance = lance_core.load(folder / FOLDER.replace("Lance_3B", "Lance_3B_Video"), dtype=torch.float32)
    return {
        "lance": lance,
        "image": pictures,
        "video": clips,
        "references": [pictures[:1], pictures[:2], picture],
    }


def case(n: int, seed: int, shared: dict[str, Any]) -> None:
    """One request: mostly right, with up to three odd values or a missing or superfluous argument."""
    rng = random.Random(f"{seed}/{n}")
    task = rng.choice(list(TASKS.values()))
    known = ASK if task.output == "text" else GOOD
    options = {key: rng.choice(values) for key, values in known.items() if rng.random() < 0.5}
    options |= {"steps": rng.choice(GOOD["steps"])} if known is GOOD else {"max_new_tokens": 2}
    preset = "video_192p" if task.is_video else "image_256res"
    if known is GOOD and not task.sized_by_input:
        options |= {"width": 32, "height": 32}
    if task.takes:
        options[task.takes] = rng.choice(shared[task.takes])
    text: Any = "a fox"
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        key = rng.choice([*known, "prompt", *([task.takes] if task.takes else []), "image", "video"])
        value = rng.choice(ODD)
        if key == "prompt":
            text = value
        else:
            options[key] = value
    # None stands for a default, and the defaults are the released sizes.
    for key, small in (("resolution", preset), ("num_frames", 5), ("steps", 1), ("max_new_tokens", 2)):
        if options.get(key) is None and (key != "num_frames" or task.output == "video"):
            options[key] = small
    for key in ("num_frames", "steps") if task.output == "text" else ("max_new_tokens",):
        options.pop(key, None)
    if task.output == "text":
        options.pop("references", None)
        shared["lance"].understand(text, **options)
    else:
        name = task.name if rng.random() < 0.97 else rng.choice(ODD)
        result = shared["lance"].generate(name, text, **options)
        assert torch.isfinite(result.frames).all()
        import json

        json.dumps(result.request)
