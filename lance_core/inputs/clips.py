"""What all clips have in common, wherever their frames come from: which frames are picked, at what rate, and
how many bytes they may take.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ..config import OUTPUT_FPS
from ..errors import MediaError, RequestError
from . import limits
from .images import load_image
from .pixels import float_range, rgb_from_array
from .preprocess import frame_indices, frames_wanted

ASSUMED_FPS = 24.0  # of a clip without times and rate; the released code's assumption
LARGEST_FPS = 1000.0

Pick = Callable[[int, float], list[int]]
Progress = Callable[[int, int], None]
_log = logging.getLogger(__name__)


class _Clip(NamedTuple):
    frames: np.ndarray
    fps: float
    total: int


class Clip(_Clip):
    """Picked frames uint8 [n, H, W, 3], frames per second, frames in all; and what is to be said of the file.

    Attributes:
        note: a sentence when only a part of the file could be read, else None. It is logged as a warning too.
    """

    note: str | None = None

    @classmethod
    def of(cls, frames: np.ndarray, fps: float, total: int, note: str | None = None) -> Clip:
        """A clip with its note, which is logged."""
        clip = cls(frames, fps, total)
        clip.note = note
        if note:
            _log.warning(note)
        return clip


class Times(NamedTuple):
    """When each frame of a clip is shown, in seconds, increasing, and when the last one ends."""

    starts: Sequence[float]
    end: float

    @property
    def seconds(self) -> float:
        """How long the clip is."""
        return self.end - self.starts[0]

    def rate(self, stated: float | None) -> float:
        """Frames per second: what the file states where that agrees with the times, else by the times."""
        if self.seconds <= 0:
            return stated or ASSUMED_FPS
        span = self.starts[-1] - self.starts[0]
        if stated and abs((len(self.starts) - 1) / stated - span) <= 0.5 / stated:
            return stated
        return min(len(self.starts) / self.seconds, LARGEST_FPS)

    def even(self) -> bool:
        """Whether no frame is further than half a frame from where a constant rate would show it."""
        count = len(self.starts)
        wanted = self.starts[0] + np.arange(count) * (self.seconds / count)
        return bool(np.abs(np.asarray(self.starts) - wanted).max() <= self.seconds / count / 2)

    def indices(self) -> list[int]:
        """Which frames of an uneven clip the model sees: those shown at 4k + 1 moments, evenly over the clip.

        For a constant rate this is `frame_indices`. The last moment is the last frame's start, or one frame
        of ours before the end if that is later, so that a long last frame counts as long as it is shown.
        """
        last = max(self.starts[-1], self.end - 1 / OUTPUT_FPS)
        moments = np.linspace(self.starts[0], last, frames_wanted(self.seconds))
        shown = np.searchsorted(np.asarray(self.starts), moments + 1e-6, side="right") - 1
        return np.maximum(shown, 0).tolist()


def choose(
    pick: Pick | None, total: int, fps: float | None, stated: float | None, times: Times | None, name: str
) -> tuple[list[int], float]:
    """The frames to keep, and the clip's frames per second.

    Args:
        pick: see `media.read_clip`.
        fps: the caller's word, which is above all others.
        stated: the file's word.
        times: when the frames are shown, where the file says so.

    Raises:
        MediaError: no frames.
        RequestError: `pick` gave numbers that are not there.
    """
    if total < 1:
        raise MediaError(f"{name} holds no frames; expected a clip of at least one.")
    rate = fps if fps is not None else times.rate(stated) if times else stated or ASSUMED_FPS
    if pick is None and fps is None and times and times.seconds > 0 and not times.even():
        return times.indices(), rate
    picks = list((pick or frame_indices)(total, rate))
    if not picks or picks != sorted(picks) or picks[0] < 0 or picks[-1] >= total:
        asked = f"{str(picks)[:150]}" if len(picks) < 40 else f"{len(picks)} numbers"
        raise RequestError(
            f"frames {asked} were asked of {total} in {name}; expected increasing numbers from 0 to "
            f"{total - 1}."
        )
    return picks, rate


def stack(frames: Iterable[np.ndarray], count: int, name: str) -> np.ndarray:
    """Frames of one size in one array, allocated once. Frames that are too large together are reduced by a
    whole factor, if that leaves more pixels than the models see.

    Raises:
        MediaError: too large, or of several sizes.
    """
    out: np.ndarray | None = None
    first: tuple[int, ...] = ()
    factor, i = 1, 0
    for frame in frames:
        if out is None:
            first, factor = frame.shape, _factor(frame, count, name)
            out = np.empty((count, -(-first[0] // factor), -(-first[1] // factor), 3), np.uint8)
        if frame.shape != first:
            raise MediaError(
                f"{name} changes size from {first[1]}x{first[0]} to {frame.shape[1]}x{frame.shape[0]}; "
                "re-encode it at one size."
            )
        out[i] = frame if factor == 1 else np.asarray(Image.fromarray(frame).reduce(factor))
        i += 1
    if out is None:
        raise MediaError(f"{name} holds no frames; expected a clip of at least one.")
    return out[:i]


def _factor(frame: np.ndarray, count: int, name: str) -> int:
    height, width, _ = frame.shape
    factor = 1
    while count * -(-height // factor) * -(-width // factor) * 3 > limits.MAX_CLIP_BYTES:
        factor += 1
        if max(height, width) / factor < limits.LEAST_REDUCED_SIDE:
            raise MediaError(
                f"{count} frames of {width}x{height} from {name} take {count * frame.nbytes >> 20:,} MiB, "
                f"more than {limits.MAX_CLIP_BYTES >> 20:,}; shorten the clip or scale it down."
            )
    return factor


def read_memory(frames: Any, fps: float | None, pick: Pick | None) -> Clip:
    """A clip from an array, tensor or list; see `media.read_clip`."""
    name = "the clip given"
    if isinstance(frames, np.ndarray | Tensor) and frames.ndim != 4:
        raise MediaError(
            f"an array of shape {list(frames.shape)} came; expected a clip [frames, height, width, 3]."
        )
    picks, rate = choose(pick, len(frames), OUTPUT_FPS if fps is None else fps, None, None, name)
    if isinstance(frames, np.ndarray | Tensor) or all(isinstance(f, np.ndarray | Tensor) for f in frames):
        scale = float_range(frames)  # one for all frames: a black one alone tells none
        kept = (rgb_from_array(frames[i], scale) for i in picks)
    else:
        kept = (load_image(frames[i]) for i in picks)
    return Clip.of(stack(kept, len(picks), name), float(rate), len(frames))
