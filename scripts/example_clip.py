"""workflows/lance_example.mp4, the clip that the video workflows start with: drawn here, of our own making.

python scripts/example_clip.py        draw it anew (needs `lance_core`; the file depends on the x264 in PyAV)

A red balloon drifts over green hills, clouds pass behind it, and a sun shines: three seconds, 12 frames each.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).absolute().parents[1]
FILE = ROOT / "workflows" / "lance_example.mp4"
WIDTH, HEIGHT, FRAMES, FPS = 480, 272, 37, 12
FINER = 3  # drawn this much larger, so that edges are smooth

SKY_TOP, SKY_LOW = (88, 150, 214), (220, 236, 246)
SUN, CLOUD, ROPE, BASKET = (255, 226, 120), (252, 253, 255), (90, 70, 60), (150, 100, 60)
HILLS = (
    ((112, 168, 108), 0.62, 0.05, 1.3, 0.4),
    ((78, 140, 84), 0.72, 0.06, 2.1, 2.0),
    ((54, 110, 66), 0.85, 0.04, 1.6, 4.1),
)
RED, STRIPE = (206, 52, 52), (246, 196, 80)


def frame(number: int) -> np.ndarray:
    """One frame, uint8 [272, 480, 3]."""
    time = number / (FRAMES - 1)
    wide, tall = WIDTH * FINER, HEIGHT * FINER
    rows = np.linspace(0, 1, tall)[:, None, None]
    sky = np.asarray(SKY_TOP) * (1 - rows) + np.asarray(SKY_LOW) * rows
    picture = Image.fromarray(np.broadcast_to(sky, (tall, wide, 3)).astype(np.uint8).copy())
    draw = ImageDraw.Draw(picture)
    _disc(draw, 0.82, 0.2, 0.09, SUN)
    for x, y, size in ((0.15, 0.22, 0.05), (0.55, 0.14, 0.04), (0.95, 0.34, 0.045)):
        _cloud(draw, (x - 0.12 * time) % 1.2 - 0.1, y, size)
    for color, level, swell, waves, phase in HILLS:
        _hill(draw, color, level, swell, waves, phase)
    _balloon(draw, 0.22 + 0.5 * time, 0.5 - 0.16 * math.sin(math.pi * time))
    return np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: tuple) -> None:
    """x in widths, y and radius in heights."""
    cx, cy, r = x * WIDTH * FINER, y * HEIGHT * FINER, radius * HEIGHT * FINER
    draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=color)


def _cloud(draw: ImageDraw.ImageDraw, x: float, y: float, size: float) -> None:
    for across, up, scale in ((-0.045, 0.0, 0.8), (0.0, -0.03, 1.15), (0.045, 0.0, 0.9), (0.02, 0.015, 0.8)):
        _disc(draw, x + across, y + up, size * scale, CLOUD)


def _hill(
    draw: ImageDraw.ImageDraw, color: tuple, level: float, swell: float, waves: float, phase: float
) -> None:
    xs = np.linspace(0, 1, 200)
    ys = level + swell * np.sin(2 * math.pi * waves * xs + phase)
    edge = [(x * WIDTH * FINER, y * HEIGHT * FINER) for x, y in zip(xs, ys, strict=True)]
    draw.polygon([*edge, (WIDTH * FINER, HEIGHT * FINER), (0, HEIGHT * FINER)], fill=color)


def _balloon(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    cx, cy, r = x * WIDTH * FINER, y * HEIGHT * FINER, 0.17 * HEIGHT * FINER
    for side in (-0.5, 0.5):
        draw.line((cx + side * r, cy + 0.8 * r, cx + 0.3 * side * r, cy + 1.65 * r), fill=ROPE, width=FINER)
    draw.rounded_rectangle((cx - 0.22 * r, cy + 1.6 * r, cx + 0.22 * r, cy + 1.95 * r), 0.08 * r, fill=BASKET)
    draw.polygon(
        [(cx - 0.86 * r, cy + 0.5 * r), (cx + 0.86 * r, cy + 0.5 * r), (cx, cy + 1.45 * r)], fill=RED
    )
    for half, color in ((1.0, RED), (0.62, STRIPE), (0.25, RED)):
        draw.ellipse((cx - half * r, cy - r, cx + half * r, cy + r), fill=color)


def main() -> None:
    """Write the file."""
    sys.path.insert(0, str(ROOT))
    from lance_core.inputs.video_writer import save_video

    save_video(FILE, (frame(number) for number in range(FRAMES)), FPS)
    print(f"{FILE.relative_to(ROOT)}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
