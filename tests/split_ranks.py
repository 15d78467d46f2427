"""One process of a split: draws every case and, in the first process, keeps what came out.

`python tests/split_ranks.py MODE FILE` with RANK and WORLD_SIZE set; test_split.py starts it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from batching import IMAGE, INPUTS, VIDEO

from lance_core import load
from lance_core.pipeline import Lance
from lance_core.scale import launch, split
from lance_core.scale.split import joined

GUIDED = {"steps": 3, "cfg_interval": (0.7, 1.0)}  # the last step is not guided
PHOTO, CLIP = str(INPUTS / "photo.png"), str(INPUTS / "clip.mp4")
CASES: dict[str, dict[str, Any]] = {
    "odd": {"task": "t2i", "prompt": "a fox", "width": 80, "height": 48},  # 15 tokens
    "one": {"task": "t2i", "prompt": "a fox", "width": 16, "height": 16},  # fewer tokens than processes
    "unguided": {"task": "t2i", "prompt": "a fox", "width": 48, "height": 48, "cfg": 1},
    "batch": {
        "task": "t2i",
        "prompt": "a fox",
        "width": 48,
        "height": 32,
        "batch_size": 2,
        "renorm": "channel",
    },
    "negative": {
        "task": "t2i",
        "prompt": "a fox",
        "width": 48,
        "height": 48,
        "negative_prompt": "a crow, here",
    },
    "video": {"task": "t2v", "prompt": "it runs", "width": 48, "height": 80, "num_frames": 9},  # 45 tokens
    "first": {"task": "i2v", "prompt": "go", "image": PHOTO, "num_frames": 5, "resolution": "video_192p"},
    "edit": {"task": "image_edit", "prompt": "blue", "image": PHOTO, "resolution": "image_256res"},
}


def draw(lances: dict[str, Lance]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Latent and frames of every case."""
    found = {}
    for name, case in CASES.items():
        made = lances["video" if case["task"] in ("t2v", "i2v") else "image"].generate(**GUIDED | case)
        found[name] = (made.latent, made.frames)
    return found


def opened() -> dict[str, Lance]:
    """Both tiny checkpoints in float32."""
    return {"image": load(IMAGE, dtype=torch.float32), "video": load(VIDEO, dtype=torch.float32)}


def counted(lances: dict[str, Lance]) -> int:
    """Tokens that this process's generation expert computes for "odd", over all steps and rows."""
    tokens = 0
    run_layers = split.run_layers

    def count(und_layers, gen_layers, und, gen, *rest):
        nonlocal tokens
        tokens += gen.shape[0] * gen.shape[1]
        return run_layers(und_layers, gen_layers, und, gen, *rest)

    split.run_layers = count
    lances["image"].generate(**GUIDED | CASES["odd"])
    split.run_layers = run_layers
    return tokens


def main(mode: str, file: str) -> None:
    torch.set_num_threads(1)
    with launch.member("cpu"):
        lances = {name: joined(lance, mode) for name, lance in opened().items()}
        found = draw(lances)
        if launch.rank() == 0:
            torch.save(found, file)
        Path(f"{file}.{launch.rank()}").write_text(json.dumps(counted(lances)))


if __name__ == "__main__":
    main(*sys.argv[1:])
