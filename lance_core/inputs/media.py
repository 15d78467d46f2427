"""Pictures and clips from files and memory as 8-bit RGB arrays, and results back to files with their settings
inside: the public face of the modules that do it.

Pillow opens pictures, PyAV (its own FFmpeg) videos; no other program is started. The bytes of a file say what
it is, its name does not. A frame is uint8 [height, width, 3]. What the models make of frames is in
preprocess.py.
"""

from __future__ import annotations

from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import embedded
from .clips import Clip, Pick, Progress, read_memory
from .files import name_of, opened, picture_format, refused
from .images import IMAGE_FORMATS, load_image, picture_metadata, save_image
from .moving import count_moving, read_moving
from .pixels import pictures
from .video_reader import read_video, video_comment
from .video_writer import VIDEO_FORMATS, save_video

__all__ = [
    "IMAGE_FORMATS",
    "VIDEO_FORMATS",
    "Clip",
    "is_moving",
    "load_image",
    "load_video",
    "pictures",
    "read_clip",
    "read_metadata",
    "save_image",
    "save_video",
]


def read_clip(
    source: Any, fps: float | None = None, pick: Pick | None = None, progress: Progress | None = None
) -> Clip:
    """The frames of a clip that the model sees; the others are never held in memory.

    Args:
        source: a path, bytes or binary file (video, or moving GIF, WebP, PNG, AVIF), a list of pictures, an
            array or tensor [T, H, W, C] (see `pictures`), or a pair (array or list, fps).
        fps: frames per second, overriding the file's times; a list or an array without it plays at 12, as
            results of ours do.
        pick: (frames in all, fps) -> increasing frame numbers. By default `preprocess.frame_indices`, and for
            clips of uneven rate the same number of moments, evenly over the clip's time.
        progress: (frames decoded, frames in all) of a file; raise in it to stop. While many frames are
            counted it is told (0, frames so far).

    Returns: picked frames uint8 [n, H, W, 3], frames per second, frames in all. Where a file is cut off, the
        attribute `note` says how much of it was read. Frames above 1080p are reduced by a whole factor where
        together they would take more than `limits.MAX_CLIP_BYTES`.

    Raises:
        MediaError: missing, damaged, cut off after next to nothing, without picture, or too large.
    """
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Real):
        source, fps = source[0], fps or float(source[1])
    if isinstance(source, np.ndarray | Tensor | list | tuple):
        return read_memory(source, fps, pick)
    reader = read_moving if _is_picture(source, "a video") else read_video
    return reader(source, fps, pick, progress)


def load_video(source: Any, fps: float | None = None) -> tuple[np.ndarray, float]:
    """Every frame of a short clip, uint8 [n, H, W, 3], and its frames per second; see `read_clip`."""
    frames, rate, _ = read_clip(source, fps, lambda total, _: list(range(total)))
    return frames, rate


def is_moving(source: Any) -> bool:
    """Whether a file is a clip: a video, or a picture file with more than one frame.

    Raises:
        MediaError: missing, or neither.
    """
    if not _is_picture(source, "a picture or clip"):
        return True
    return count_moving(source) > 1


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What `save_image` or `save_video` stored in a file; None where there is none of ours.

    Raises:
        MediaError: the file is missing or unreadable.
    """
    if _is_picture(path, "a picture or video"):
        return picture_metadata(path)
    return embedded.unwrap(video_comment(path))


def _is_picture(source: Any, what: str) -> bool:
    with opened(source, what) as file:
        kind = picture_format(file)
    if kind == "HEIC":
        raise refused(
            f"{name_of(source)} is a HEIC picture, which cannot be read here; save it as JPEG or PNG."
        )
    return kind is not None
