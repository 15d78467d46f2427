"""From 8-bit RGB frames to model input: aspect buckets, crops, frame picks, ViT patches, VAE pixels.

Pure functions of arrays; no model, no file. Files are read by media.py, pictures in memory by pixels.py.
Sizes are (width, height) in pixels as in PIL, arrays are [height, width, 3]. The geometry is exact: the tests
hold rows of the released code's that it must reproduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import OUTPUT_FPS, ViTConfig
from ..errors import MediaError
from .pixels import rgb_from_array, rgb_from_image, to_uint8
from .sizes import PRESETS, RATIOS, Size, bucket, buckets, require_pixels, round_cells, sides

# Also of sizes.py and pixels.py, for who wants all of it.
__all__ = [
    "PRESETS",
    "RATIOS",
    "bucket",
    "buckets",
    "rgb_from_array",
    "rgb_from_image",
    "round_cells",
    "sides",
    "to_uint8",
]

MAX_SECONDS = 6  # of a clip, as far as its number of picked frames goes; the picks still span all of it
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MERGED_PATCH = 28  # pixels a side of one ViT token, of every released configuration

Frames = np.ndarray | Sequence[Any] | Tensor


def vae_size(width: int, height: int, preset: str) -> Size:
    """The (width, height) a picture of this size is given before the VAE: multiples of 16."""
    return bucket(width, height, sides(preset)[0])


def vit_size(width: int, height: int, preset: str, multiple: int = MERGED_PATCH) -> Size:
    """The (width, height) the ViT sees: its bucket, centre-cropped to whole merged patches."""
    wide, tall = bucket(width, height, sides(preset)[1])
    return wide // multiple * multiple, tall // multiple * multiple


def crop_box(width: int, height: int, bucket_w: int, bucket_h: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the centred window, of the bucket's ratio, that the released code cuts
    out of a picture.

    A window of the picture's area and the bucket's ratio, each side rounded, if it fits into the picture: so
    small pictures of nearly that ratio stay whole. Else the largest window of the ratio; at least one pixel
    each way.

    Raises:
        MediaError: the picture has no pixels.
    """
    require_pixels(width, height)
    ratio = bucket_w / bucket_h
    w, h = round(math.sqrt(width * height * ratio)), round(math.sqrt(width * height / ratio))
    if 1 <= w <= width and 1 <= h <= height:
        return (width - w) // 2, (height - h) // 2, w, h
    w, h = width, height
    if width / height < ratio:
        h = min(max(round(width / ratio), 1), height)
    elif width / height > ratio:
        w = min(max(round(height * ratio), 1), width)
    return (width - w) // 2, (height - h) // 2, w, h


def crop_resize(frame: np.ndarray, size: Size) -> np.ndarray:
    """Crop a frame, uint8 [H, W, 3], to the ratio of `size` (width, height) and resize it: uint8 [h, w, 3].

    PIL's antialiased bicubic on 8 bits, which the weights were trained with; torch's differs by several
    levels.
    """
    left, top, w, h = crop_box(frame.shape[1], frame.shape[0], *size)
    window = np.ascontiguousarray(frame[top : top + h, left : left + w])
    if (w, h) == tuple(size):
        return window
    return np.asarray(Image.fromarray(window).resize(size, Image.Resampling.BICUBIC))


def resize_frames(frames: Frames, size: Size) -> np.ndarray:
    """`crop_resize` over frames, uint8 [T, H, W, 3]: uint8 [T, h, w, 3]. One frame's floats never exist."""
    checked = check_frames(frames)
    out = np.empty((len(checked), size[1], size[0], 3), np.uint8)
    for target, frame in zip(out, checked, strict=True):
        target[...] = crop_resize(frame, size)
    return out


def vae_frames(frames: Frames, preset: str) -> np.ndarray:
    """Frames, uint8 [T, H, W, 3], in the latent bucket of `preset`: uint8 [T, h, w, 3]."""
    checked = check_frames(frames)
    return resize_frames(checked, vae_size(*_size(checked), preset))


def vae_pixels(frames: Frames, preset: str) -> Tensor:
    """VAE input of frames, uint8 [T, H, W, 3]: float32 [1, 3, T, h, w] in -1..1, h and w multiples of 16.

    Raises:
        RequestError: unknown preset.
        MediaError: no frames, or not frames.
    """
    return to_signed(vae_frames(frames, preset))


def to_signed(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] to float32 [1, 3, T, H, W] in -1..1."""
    channels_first = torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))
    return channels_first[None].float().div_(255).sub_(0.5).div_(0.5)


def vit_frames(frames: Frames, preset: str, multiple: int = MERGED_PATCH) -> np.ndarray:
    """Frames, uint8 [T, H, W, 3], as the ViT sees them: bucket of `preset`, then a centre crop to whole
    merged patches.
    """
    checked = check_frames(frames)
    w, h = vit_size(*_size(checked), preset, multiple)
    resized = resize_frames(checked, bucket(*_size(checked), sides(preset)[1]))
    top, left = (resized.shape[1] - h) // 2, (resized.shape[2] - w) // 2
    return resized[:, top : top + h, left : left + w]


def vit_patches(frames: Frames, preset: str, config: ViTConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """ViT input of an image (one frame) or video, uint8 [T, H, W, 3].

    Returns: normalised patches float32 [t * h * w, channels * temporal_patch * patch * patch], merge group by
    merge group, and the grid (t, h, w) in patches. Missing frames of the last temporal patch repeat the last
    frame.

    Raises:
        RequestError: unknown preset.
        MediaError: no frames, or not frames.
    """
    pixels = vit_frames(frames, preset, config.patch_size * config.spatial_merge_size)
    return patchify(pixels, config)


def patchify(frames: np.ndarray, config: ViTConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """Cut frames, uint8 [T, H, W, 3] in whole merged patches, into normalised patches; see `vit_patches`."""
    depth, patch, merge = config.temporal_patch_size, config.patch_size, config.spatial_merge_size
    missing = -len(frames) % depth
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    count, height, width, channels = frames.shape
    if (
        height % (patch * merge)
        or width % (patch * merge)
        or not height * width
        or channels != config.in_channels
    ):
        raise MediaError(
            f"frames of {width}x{height} with {channels} channels cannot be cut into the ViT's patches; "
            "expected positive "
            f"multiples of {patch * merge} pixels and {config.in_channels} channels."
        )
    t, h, w = count // depth, height // patch, width // patch
    cut = frames.reshape(t, depth, h // merge, merge, patch, w // merge, merge, patch, channels)
    cut = cut.transpose(
        0, 2, 5, 3, 6, 8, 1, 4, 7
    )  # t, groups down and across, inside a group, channel, frame, row, col
    out = np.empty((t * h * w, channels, depth * patch * patch), np.float32)
    levels = _normalised_levels()
    cut = cut.reshape(t * h * w, channels, -1)
    for channel in range(channels):
        out[:, channel] = levels[channel][cut[:, channel]]
    return torch.from_numpy(out.reshape(t * h * w, -1)), (t, h, w)


def frame_indices(
    total_frames: int, fps: float, rate: int = OUTPUT_FPS, max_seconds: float = MAX_SECONDS
) -> list[int]:
    """Which frames of a clip the model sees: 4k + 1 of them, evenly over the whole clip, however long.

    Args:
        total_frames: frames in the clip.
        fps: its frames per second (rounded to an integer, as in training).
        rate: frames per second the model works at.
        max_seconds: longer clips are picked more sparsely.

    Raises:
        MediaError: the clip is empty, or its frame rate is no positive number.
    """
    if total_frames < 1:
        raise MediaError(f"a clip of {total_frames} frames came; at least one is needed.")
    if not (0 < fps < math.inf):
        raise MediaError(
            f"a clip at {fps!r} frames per second came; expected a positive number. Pass fps yourself."
        )
    wanted = frames_wanted(total_frames / max(round(fps), 1), rate, max_seconds)
    return np.linspace(0, total_frames - 1, wanted).astype(int).tolist()


def frames_wanted(seconds: float, rate: int = OUTPUT_FPS, max_seconds: float = MAX_SECONDS) -> int:
    """How many frames of a clip of so many seconds the model sees: 4k + 1."""
    return max((round(min(seconds, max_seconds) * rate) - 1) // 4 * 4 + 1, 1)


def check_frames(frames: Frames) -> np.ndarray | list[np.ndarray]:
    """Frames as an uint8 array [T, H, W, 3], or as a list of [H, W, 3] of one size (not copied together).

    Raises:
        MediaError: none, not 8-bit RGB, empty, or of several sizes.
    """
    if isinstance(frames, Tensor):
        frames = frames.cpu().numpy()
    listed = (
        frames
        if isinstance(frames, np.ndarray)
        else [f.cpu().numpy() if isinstance(f, Tensor) else np.asarray(f) for f in frames]
    )
    if isinstance(listed, np.ndarray) and listed.ndim != 4:
        raise MediaError(f"frames of shape {list(listed.shape)} came; expected [frames, height, width, 3].")
    if len(listed) == 0:
        raise MediaError("no frames came; at least one is needed.")
    first = listed[0]
    for frame in listed:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise MediaError(
                f"a frame of {frame.dtype} {list(frame.shape)} came; expected uint8 [height, width, 3]. "
                "Read it with media.load_image."
            )
        if frame.shape != first.shape:
            raise MediaError(
                f"frames of {first.shape[1]}x{first.shape[0]} and {frame.shape[1]}x{frame.shape[0]} came in "
                "one clip; "
                "resize them to one size first."
            )
    require_pixels(first.shape[1], first.shape[0])
    return listed


@lru_cache(maxsize=1)
def _normalised_levels() -> np.ndarray:
    """float32 [3, 256]: every 8-bit level after CLIP's normalisation. Each step rounds to float32, as in
    training.
    """
    level = np.arange(256, dtype=np.float32) / np.float32(255)
    return np.stack(
        [(level - np.float32(m)) / np.float32(s) for m, s in zip(CLIP_MEAN, CLIP_STD, strict=True)]
    )


def _size(frames: np.ndarray | list[np.ndarray]) -> Size:
    return frames[0].shape[1], frames[0].shape[0]
