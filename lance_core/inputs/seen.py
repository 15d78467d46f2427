"""Pictures and clips mixed in one list, told apart; and which part of a clip the model sees, at what rate."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from .. import checks
from ..errors import RequestError
from . import media
from .clips import Pick, Progress
from .images import load_image
from .preprocess import frames_wanted

MAX_SEEN_FRAMES = (
    961  # of one clip: 80 seconds at the 12 a second of the weights, whose ViT blocks fit memory
)
MAX_PICTURES = 64  # pictures and clips of one question


@dataclass(frozen=True)
class ClipRange:
    """Which frames of a clip are seen; None is today's rule (12 a second, up to 6 seconds' worth, evenly
    over the whole clip).

    fps: frames a second that are looked at, however long the clip is. start, length: seconds. frames: how
    many frames, instead of `fps`. Counts are lowered to 4k+1, as in training.

    Raises:
        RequestError: no such number, or both `fps` and `frames`.
    """

    fps: float | None = None
    start: float | None = None
    length: float | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.fps is not None:
            checks.real("fps", self.fps, 0, 1000, above=0)
        if self.start is not None:
            checks.real("start", self.start, 0, 1e6)
        if self.length is not None:
            checks.real("length", self.length, 0, 1e6, above=0)
        if self.frames is not None:
            checks.whole("frames", self.frames, 1, MAX_SEEN_FRAMES)
            if self.fps is not None:
                raise RequestError(
                    f"fps is {self.fps:g} and frames {self.frames}: both say how many frames are seen; "
                    f"give one"
                )

    @property
    def pick(self) -> Pick | None:
        """For `media.read_clip`; None where nothing was asked."""
        return None if self == ClipRange() else self._indices

    def _indices(self, total: int, rate: float) -> list[int]:
        first = int((self.start or 0) * rate + 1e-6)
        if first >= total:
            raise RequestError(
                f"start is {self.start:g} s and the clip is {total / rate:.2f} s long; start before its end"
            )
        after = (
            total if self.length is None else min(total, max(first + round(self.length * rate), first + 1))
        )
        seconds = (after - first) / rate
        if self.frames is not None:
            wanted = (int(self.frames) - 1) // 4 * 4 + 1
        elif self.fps is not None:
            wanted = max((round(seconds * self.fps) - 1) // 4 * 4 + 1, 1)
        else:
            wanted = frames_wanted(seconds)
        if wanted > MAX_SEEN_FRAMES:
            raise RequestError(
                f"{seconds:.1f} s at {self.fps:g} frames a second are {wanted} frames, at most "
                f"{MAX_SEEN_FRAMES} can be seen; lower fps or length"
            )
        return np.linspace(first, after - 1, wanted).astype(int).tolist()


@dataclass(frozen=True, eq=False)
class Seen:
    """A picture or clip as it was given: frames uint8 [T, H, W, 3], and whether it is a clip. name: its file,
    "" where it came from memory.
    """

    frames: np.ndarray
    clip: bool
    name: str = ""


def read_picture(source: Any) -> Seen:
    """A picture: a path, PIL image or array [H, W, 3]."""
    return Seen(load_image(source)[None], False, _name(source))


def read_clip(source: Any, part: ClipRange, progress: Progress | None = None) -> Seen:
    """A clip: a path, frames [T, H, W, 3], or a pair (frames, fps)."""
    return Seen(media.read_clip(source, pick=part.pick, progress=progress)[0], True, _name(source))


def read_either(source: Any, part: ClipRange, progress: Progress | None = None) -> Seen:
    """A picture or a clip, whichever it is: a moving file, four axes, a list, and a pair with a rate are
    clips.

    Raises:
        MediaError: it cannot be read.
    """
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Real):
        return read_clip(source, part, progress)
    if isinstance(source, np.ndarray | Tensor):
        return read_clip(source, part, progress) if source.ndim == 4 else read_picture(source)
    if isinstance(source, list | tuple):
        return read_clip(source, part, progress)
    if hasattr(source, "convert") or not media.is_moving(source):
        return read_picture(source)
    return read_clip(source, part, progress)


def listed(images: Any) -> list[Any]:
    """Pictures and clips as a list of them: an array of four axes is a batch of pictures.

    Raises:
        RequestError: more than MAX_PICTURES.
    """
    if isinstance(images, np.ndarray | Tensor):
        out = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, tuple) and len(images) == 2 and isinstance(images[1], Real):
        out = [images]
    else:
        out = list(images) if isinstance(images, list | tuple) else [images]
    if len(out) > MAX_PICTURES:
        raise RequestError(
            f"{len(out)} pictures came, at most {MAX_PICTURES} can be in one question; give fewer"
        )
    return out


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str) or hasattr(source, "__fspath__") else ""
