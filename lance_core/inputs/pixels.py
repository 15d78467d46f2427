"""Pictures in memory as 8-bit RGB: PIL images of any mode, arrays and tensors of any usual range.

A frame is uint8 [height, width, 3]; transparency goes on white, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import MediaError
from . import limits
from .files import decoding, refused

EXIF_ORIENTATION = 0x0112
BAND_PIXELS = 1 << 22  # converted at once, so that a large picture is held once and not three times
CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGBA
# Ranges of floats, as (lowest, highest): what resampling overshoots is clamped
UNIT, SIGNED, BYTES = (-0.25, 1.5), (-1.25, 1.25), (-16.0, 272.0)
DARKEST_BYTES = 16  # a picture of 0..255 that stays below could as well be a bright one of 0..1


def pictures(
    images: Any, mask: np.ndarray | Tensor | None = None, picks: Sequence[int] | None = None
) -> np.ndarray:
    """A batch of pictures, as a person or a node may give it, as uint8 [n, height, width, 3].

    Args:
        images: an array or tensor [n, h, w, c] or [h, w, c] or [h, w], or a list of those and of PIL images
            of one size. c is 1 (grey), 2 (grey, alpha), 3 or 4 (RGB, alpha). uint8, uint16, booleans, or
            floats, whose range is told from the whole batch: 0..1, 0..255 or -1..1.
        mask: what is transparent, [h, w], [m, h, w] or [m, h, w, 1]: floats 0..1, booleans or uint8, where
            the highest is transparent. One mask serves all pictures; of fewer masks than pictures the last
            repeats. A mask that is 0 everywhere hides nothing and may have any size.
        picks: numbers of the pictures to keep, with their masks; all of them by default.

    Raises:
        MediaError: no pictures, several sizes, NaN, a range that cannot be told, or a mask that does not fit.
    """
    batch = _batch(images)
    chosen = range(len(batch)) if picks is None else picks
    scale = float_range(batch)
    first = _channels_last(batch[0]).shape
    masks = None if mask is None else _masks(mask, len(batch), first)
    out = np.empty((len(chosen), first[0], first[1], 3), np.uint8)
    for target, i in zip(out, chosen, strict=True):
        frame = to_levels(_channels_last(batch[i]), scale)
        if frame.shape[:2] != first[:2]:
            raise MediaError(
                f"pictures of {first[1]}x{first[0]} and {frame.shape[1]}x{frame.shape[0]} came in one batch; "
                "resize them to one size first."
            )
        if masks is not None:
            frame = _with_mask(frame, masks[min(i, len(masks) - 1)])
        target[...] = _to_rgb(frame)
    return out


def rgb_from_image(image: Image.Image, name: str = "the image given") -> np.ndarray:
    """A PIL image of any mode as uint8 [H, W, 3]: turned upright, transparency on white, 16 bits scaled to 8.

    Raises:
        MediaError: empty, too large, damaged past its header, or of levels that are no picture; `name` is
            what to call it.
    """
    if image.width < 1 or image.height < 1:
        raise MediaError(f"{name} has {image.width}x{image.height} pixels; it needs at least one each way.")
    check_pixels(image.width, image.height, limits.MAX_PIXELS, name)
    with decoding(name):
        image.load()
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            return upright(_from_deep(image, name), orientation)
        out = np.empty((image.height, image.width, 3), np.uint8)
        for top, band in _bands(image):
            out[top : top + band.height] = np.asarray(_on_white(band))
        return upright(out, orientation)


def rgb_from_array(values: np.ndarray | Tensor, scale: tuple[float, float] | None = None) -> np.ndarray:
    """One picture as uint8 [H, W, 3], of an array or tensor [H, W], [H, W, 1..4] or [1, H, W, 1..4].

    Levels are those of `pictures`; `scale` is the range of a batch that it belongs to, by default its own.
    Transparency goes on white.

    Raises:
        MediaError: another shape or type, or numbers that are no picture.
    """
    array = _as_array(values)
    return _to_rgb(to_levels(_channels_last(array), scale or float_range([array])))


def float_range(arrays: Sequence[Any]) -> tuple[float, float]:
    """The (lowest, highest) level that black and white have in a batch; (0, 1) when it holds no floats.

    Raises:
        MediaError: NaN, infinity, or a range that cannot be told.
    """
    lows, highs = [], []
    for array in (_as_array(a) for a in arrays):
        if array.dtype.kind == "f" and array.size:
            lows.append(float(array.min()))
            highs.append(float(array.max()))
    low, high = (min(lows), max(highs)) if lows else (0.0, 0.0)
    # min() skips a NaN that does not come first
    if not all(math.isfinite(v) for v in (*lows, *highs)):
        raise MediaError(
            "a picture with NaN or infinite values came; the step that made it failed. Numbers in 0..1 are "
            "expected."
        )
    if UNIT[0] <= low and high <= UNIT[1]:
        return 0.0, 1.0
    if low < high:  # one single level tells no range
        if SIGNED[0] <= low and high <= SIGNED[1]:
            return -1.0, 1.0
        if BYTES[0] <= low and DARKEST_BYTES < high <= BYTES[1]:
            return 0.0, 255.0
    raise MediaError(
        f"a picture with float values from {low:g} to {high:g} came; expected 0..1 (or 0..255, or -1..1). "
        "Rescale it, or give uint8."
    )


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Floats (see `float_range`) to the nearest of 0..255, clamped."""
    return _scaled(values, *float_range([values]))


def _scaled(values: np.ndarray, black: float, white: float) -> np.ndarray:
    unit = values if (black, white) == (0.0, 1.0) else (values - black) / (white - black)
    return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)


def to_levels(values: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """An array of a known type as uint8 of the same shape; `scale` is the range of floats.

    Raises:
        MediaError: another type.
    """
    if values.dtype.kind == "f":
        return _scaled(values, *scale)
    if values.dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype != np.uint8:
        raise MediaError(f"an array of {values.dtype} came; expected uint8, uint16, or floats in 0..1.")
    return values


def upright(frame: np.ndarray, orientation: int) -> np.ndarray:
    """A frame turned and mirrored as EXIF's orientation (1 to 8; anything else is 1) says."""
    if orientation in (5, 6, 7, 8):
        frame = frame.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        frame = frame[:, ::-1]
    if orientation in (3, 4, 7, 8):
        frame = frame[::-1]
    return np.ascontiguousarray(frame)


def check_pixels(width: int, height: int, limit: int, name: str) -> None:
    """Refuse a picture of more than `limit` pixels.

    Raises:
        MediaError: it has more.
    """
    if width * height > limit:
        raise refused(
            f"{name} has {width}x{height} pixels, more than {limit:,}; scale it down first (the models work "
            "below 1,200 pixels a side)."
        )


def _batch(images: Any) -> Any:
    """A sequence of one or more pictures: an array [n, h, w, c] or a list of arrays."""
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, list | tuple):
        images = [rgb_from_image(i) if isinstance(i, Image.Image) else _single(_as_array(i)) for i in images]
    else:
        images = _as_array(images)
        if images.ndim in (2, 3):
            images = _channels_last(images)[None]
        if images.ndim != 4:
            raise MediaError(
                f"an array of shape {list(images.shape)} came; expected pictures [n, height, width, "
                "channels]."
            )
    if len(images) == 0:
        raise MediaError("a batch of 0 images came; at least one is needed.")
    return images


def _as_array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    if not isinstance(values, np.ndarray):
        raise MediaError(
            f"a {type(values).__name__} came; expected an array, a tensor, a PIL image or a list of them."
        )
    return values


def _single(values: np.ndarray) -> np.ndarray:
    return values[0] if values.ndim == 4 and values.shape[0] == 1 else values


def _channels_last(values: np.ndarray) -> np.ndarray:
    """One picture as [h, w, 1..4]."""
    shape = list(values.shape)
    values = _single(values)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] not in CHANNELS or not values.size:
        raise MediaError(
            f"an array of shape {shape} came; expected one picture [height, width, 1 to 4], channels last."
        )
    return values


def _to_rgb(levels: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 1..4] to [h, w, 3], transparency on white."""
    channels = levels.shape[2]
    if channels == 1:
        return np.repeat(levels, 3, axis=2)
    if channels == 3:
        return np.ascontiguousarray(levels)
    return rgb_from_image(Image.fromarray(np.ascontiguousarray(levels)), "the array given")


def _masks(mask: Any, count: int, shape: Sequence[int]) -> np.ndarray | None:
    """Masks, float32 [m, h, w] of 0..1, or None when nothing is transparent."""
    values = _as_array(mask)
    if values.ndim == 4 and 1 in (values.shape[1], values.shape[3]):
        values = values[..., 0] if values.shape[3] == 1 else values[:, 0]
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3:
        raise MediaError(f"a mask of shape {list(values.shape)} came; expected [masks, height, width].")
    if len(values) > count:
        raise MediaError(f"{len(values)} masks came for {count} images; give one for each, or one for all.")
    if not values.size or not values.any():  # a picture without transparency comes with an empty mask
        return None
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or values.min() < UNIT[0] or values.max() > UNIT[1]:
            raise MediaError(
                f"a mask with values from {values.min():g} to {values.max():g} came; expected 0..1, where 1 "
                "is transparent."
            )
        values = np.clip(values.astype(np.float32), 0, 1)
    elif values.dtype in (np.uint8, np.bool_):
        values = to_levels(values, (0, 1)).astype(np.float32) / 255
    else:
        raise MediaError(f"a mask of {values.dtype} came; expected floats in 0..1, uint8 or booleans.")
    if values.shape[1:] != tuple(shape[:2]):
        raise MediaError(
            f"the mask is {values.shape[2]}x{values.shape[1]} and the image {shape[1]}x{shape[0]}: give the "
            "mask of the same image."
        )
    return values


def _with_mask(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 1..4] with a mask [h, w], 1 is transparent, as uint8 [h, w, 2 or 4]."""
    opaque = 1 - mask
    if frame.shape[2] in (2, 4):  # transparent by the picture's own alpha or by the mask
        opaque = opaque * (frame[..., -1].astype(np.float32) / 255)
        frame = frame[..., :-1]
    alpha = np.rint(opaque * 255).astype(np.uint8)
    return np.concatenate([frame, alpha[..., None]], axis=2)


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(top row, part) from top to bottom, each of about `BAND_PIXELS`."""
    rows = max(BAND_PIXELS // image.width, 1)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow converts it to one mode only
        image = image.convert("LA")
    if image.mode in ("P", "PA", "LA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _from_deep(image: Image.Image, name: str) -> np.ndarray:
    """Pillow's 16-bit, 32-bit (which holds 16-bit files too) and float modes as uint8 [h, w, 3]."""
    scale = 0.0, 1.0
    ranges = [(part.min(), part.max()) for part in (np.asarray(band) for _, band in _bands(image))]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    if image.mode == "F":
        scale = float_range([np.array([[v for r in ranges for v in r]], np.float32)])
    elif low < 0 or high > 65535:
        raise refused(f"{name} has levels from {low} to {high}; expected 16 bits. Save it with 8 or 16 bits.")
    clear = image.info.get("transparency")  # of a 16-bit PNG: the one level that is transparent
    out = np.empty((image.height, image.width, 3), np.uint8)
    for top, band in _bands(image):
        levels = np.asarray(band)
        grey = to_levels(levels if image.mode == "F" else levels.astype(np.uint16), scale)
        if isinstance(clear, int):
            grey = np.where(levels == clear, np.uint8(255), grey)
        out[top : top + band.height] = grey[..., None]
    return out
