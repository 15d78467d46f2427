"""Presets and buckets: which sizes a picture is brought to. Nothing here needs torch.

Source: the released inference code's resolution buckets.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ..config import CELL
from ..errors import MediaError, RequestError

Size = tuple[int, int]

# Preset -> side R of its 1:1 bucket in pixels, for the latents and for the ViT.
PRESETS: dict[str, tuple[int, int]] = {
    "image_256res": (256, 224),
    "image_512res": (512, 448),
    "image_768res": (768, 672),
    "video_192p": (256, 224),
    "video_360p": (480, 476),
    "video_480p": (640, 616),
}
RATIOS = (21 / 9, 16 / 9, 4 / 3, 1.0, 3 / 4, 9 / 16)  # width / height


def sides(preset: str) -> tuple[int, int]:
    """(latent R, ViT R) of a preset, in pixels.

    Raises:
        RequestError: no such preset.
    """
    if preset not in PRESETS:
        raise RequestError(f"resolution preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[preset]


def round_cells(pixels: float) -> int:
    """The multiple of 16 nearest to `pixels` (a tie goes to the even multiple)."""
    return round(pixels / CELL) * CELL


@lru_cache(maxsize=64)
def buckets(side: int) -> tuple[Size, ...]:
    """The (width, height) of each of `RATIOS` at about side*side pixels, both multiples of 16."""
    if side < 2 * CELL:
        raise RequestError(
            f"a bucket side of {side} pixels is too small; {2 * CELL} is the least, presets start at 224."
        )
    found = []
    for ratio in RATIOS:
        wide = round_cells(side * math.sqrt(ratio))
        tall = round_cells(side / math.sqrt(ratio))
        candidates = ((wide, round_cells(wide / ratio)), (round_cells(tall * ratio), tall))
        found.append(
            min(
                candidates,
                key=lambda c: (abs(c[0] / c[1] - ratio), abs(c[0] * c[1] - side * side), c[0] * c[1]),
            )
        )
    return tuple(found)


def bucket(width: int, height: int, side: int) -> Size:
    """The bucket (width, height) of side R whose own ratio is nearest the picture's; the wider one on a tie.

    Raises:
        MediaError: the picture has no pixels.
    """
    require_pixels(width, height)
    ratio = width / height
    return min(buckets(side), key=lambda size: abs(size[0] / size[1] - ratio))


def require_pixels(width: int, height: int) -> None:
    """Refuse a picture without pixels."""
    if width < 1 or height < 1:
        raise MediaError(f"a picture of {width}x{height} pixels came; it needs at least one pixel each way.")
