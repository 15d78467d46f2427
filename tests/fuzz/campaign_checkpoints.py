"""Damaged checkpoints: opened, every part loaded, one picture drawn and one answer written where that still
works.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutate import damage, damage_header, damage_json

import lance_core
from lance_core import config
from lance_core.checkpoint import tiny
from lance_core.checkpoint.convert import convert

LLM = config.LLMConfig(32, 64, 2, 4, 2, 8, 288, 1e6, (1, 1, 2), 1e-6)
VIT = config.ViTConfig(1, 16, 20, 2, 32, fullatt_block_indexes=(0,))
VAE = config.VAEConfig((8, 8), (8, 8), 1, 1, (True,))
FOLDER = "m/Lance_3B"
FILES = [
    f"{FOLDER}/model.safetensors",
    f"{FOLDER}/llm_config.json",
    f"{FOLDER}/tokenizer.json",
    f"{FOLDER}/vocab.json",
]
FILES += [
    "m/Qwen2.5-VL-ViT/vit.safetensors",
    "m/Qwen2.5-VL-ViT/config.json",
    "m/Wan2.2_VAE.pth",
    "one.safetensors",
]


def prepare(folder: Path) -> None:
    """The whole checkpoint: a folder in the released layout, and one file with everything in it."""
    tiny.write(folder / "m", llm=LLM, vit=VIT, vae=VAE)
    convert(folder / FOLDER, folder / "one.safetensors", "int8")


def load(folder: Path) -> dict[str, Any]:
    """What a worker keeps: its own copy, damaged one file at a time."""
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(folder / "m", place / "m")
    shutil.copy(folder / "one.safetensors", place)
    return {"place": place, "whole": {name: (place / name).read_bytes() for name in FILES}}


def case(n: int, seed: int, shared: dict[str, Any]) -> None:
    """One damaged file of the checkpoint, and everything a user would do with it."""
    rng = random.Random(f"{seed}/{n}")
    name = rng.choice(FILES)
    data, place = shared["whole"][name], shared["place"]
    if name.endswith(".json") and rng.random() < 0.8:
        value = json.loads(data)
        for _ in range(rng.choice([1, 1, 2, 5])):
            value = damage_json(value, rng)
        data = json.dumps(value).encode()
    elif name.endswith(".safetensors") and rng.random() < 0.7:
        data = damage_header(data, rng)
    else:
        data = damage(data, rng)
    (place / name).write_bytes(data)
    try:
        use(place / ("one.safetensors" if name == "one.safetensors" else FOLDER))
    finally:
        (place / name).write_bytes(shared["whole"][name])


def use(path: Path) -> None:
    """Open it, draw 32x32 in one step from one step's picture, and answer with two tokens."""
    lance = lance_core.load(path, dtype=torch.float32)
    picture = np.zeros((32, 32, 3), np.uint8)
    small = {"resolution": "image_256res"}
    lance.generate("t2i", "a fox", width=32, height=32, steps=1)
    lance.understand("What?", image=picture, max_new_tokens=2, **small)
