"""Many mixed jobs in one process: `python tests/soak.py [JOBS]`. What stays behind after them is counted.

Prints one line of JSON: jobs, how many were refused as they should be, and at ten even points of the run the
resident memory (bytes), the open descriptors and the threads. Linux only: it reads /proc.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

import lance_core
from lance_core import config, media
from lance_core.checkpoint import tiny
from lance_core.errors import LanceError

LLM = config.LLMConfig(32, 64, 2, 4, 2, 8, 288, 1e6, (1, 1, 2), 1e-6)
VIT = config.ViTConfig(1, 16, 20, 2, 32, fullatt_block_indexes=(0,))
VAE = config.VAEConfig((8, 8), (8, 8), 1, 1, (True,))


def state() -> dict[str, int]:
    """What this process holds now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
    }


def _job(n: int, lance: lance_core.Lance, folder: Path) -> bool:
    """Job number n of the mix. Returns whether it was refused."""
    size: dict[str, Any] = {"width": 16 * (1 + n % 3), "height": 32, "steps": 2, "seed": n}
    picture, clip = folder / "picture.png", folder / "clip.mp4"
    kind = n % 8
    try:
        if kind == 0:
            result = lance.generate("t2i", f"a fox, number {n}", **size)
            media.save_image(picture, result.frames[0].numpy(), result.request)
        elif kind == 1:
            lance.generate("image_edit", "bluer", image=picture, resolution="image_256res", steps=1, cfg=1)
        elif kind == 2:
            result = lance.generate("t2v", "a fox runs", num_frames=5, **size)
            media.save_video(clip, result.frames.numpy(), 12, result.request)
        elif kind == 3:
            lance.understand("What is this?", image=picture, resolution="image_256res", max_new_tokens=3)
        elif kind == 4:
            media.read_clip(clip)
            lance.understand("What moves?", video=clip, resolution="video_192p", max_new_tokens=3)
        elif kind == 5:
            lance.generate("t2i", "a fox", **size | {"steps": -n})  # refused
        elif kind == 6:
            (folder / "half.png").write_bytes(picture.read_bytes()[: 40 + n % 200])
            lance.understand("What is this?", image=folder / "half.png")  # refused
        else:
            fresh = lance_core.load(folder / "m" / "Lance_3B_Video", dtype=torch.float32)
            fresh.generate("t2i", "a fox", batch_size=2, **size)
    except LanceError:
        return True
    return False


def main(jobs: int) -> dict[str, Any]:
    """Run the jobs, the first of each kind as warm-up included."""
    torch.set_num_threads(1)
    points, refused = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.write(folder / "m", llm=LLM, vit=VIT, vae=VAE)
        lance = lance_core.load(folder / "m" / "Lance_3B_Video", dtype=torch.float32)
        for n in range(jobs):
            refused += _job(n, lance, folder)
            if (n + 1) * 10 // jobs > n * 10 // jobs:
                points.append(state())
    return {"jobs": jobs, "refused": refused, "points": points}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)))
