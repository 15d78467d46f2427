"""Going on from the end of a clip: part after part, each from the last frames of the one before.

A part is a text-to-video request whose first latent frames are those of the clip's end, kept clean. With one
of them, the clip's last frame alone, that is image to video as trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from .. import checks
from ..checks import shown
from ..components import Components
from ..config import CELL, MAX_FRAMES, OUTPUT_FPS
from ..errors import RequestError
from ..inputs import media, preprocess, tasks
from ..inputs.pixels import to_levels
from ..inputs.sizes import sides
from ..model.out_of_memory import said_when_out_of_memory
from .draw import draw_latent
from .request import Request, check

NEW_FRAMES = 48  # of a part, where nothing is said
MAX_OVERLAP = 16  # latent frames
MOST_NEW = 1 << 20  # frames; it is written as it comes
READ_AT_ONCE = 241  # frames of the old clip held together
ROOM = 1.1  # a clip up to so much larger than its bucket keeps its own size
GAIN = (0.8, 1.25)  # of a channel, at most, to hold a part's colours


def extend(
    components: Components,
    video: Any,
    prompt: str | Sequence[str],
    num_frames: int,
    overlap: int,
    hold_colours: bool,
    options: dict[str, Any],
) -> Extension:
    """See `Lance.extend`. The request is checked now, and the clip's end is read; the rest as it is asked
    for.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise RequestError("extend got no prompt; say what happens next")
    known = {f.name for f in fields(Request)} - {
        "task",
        "prompt",
        "num_frames",
        "kept",
        "noise",
        "batch_size",
    }
    unknown = sorted(set(options) - known)
    if unknown:
        raise RequestError(f"extend does not take {', '.join(map(shown, unknown))}")
    new = checks.whole("num_frames", num_frames, 4, MOST_NEW) // 4 * 4
    overlap = checks.whole("overlap", overlap, 1, MAX_OVERLAP)
    clip = OldClip(components, video)
    size = _size(clip, options)
    options = options | {"width": size[0], "height": size[1]}
    first = [Request("t2v", text, num_frames=5, **options) for text in prompts]
    checked = [check(request, components.config.variant) for request in first]
    overlap = min(overlap, (clip.count - 1) // 4 + 1)
    frames = _frames(components, clip, checked[0].size, first, new, overlap, hold_colours, checked[0].seed)
    return Extension(frames, *checked[0].size, clip.count, clip.count + new * len(prompts))


class Extension(Iterator[np.ndarray]):
    """The frames of a clip and of what comes after it, uint8 [height, width, 3], `count` in all, `fps` a
    second; the first `old` are the clip's.
    """

    def __init__(self, frames: Iterator[np.ndarray], width: int, height: int, old: int, count: int) -> None:
        self.width, self.height, self.old, self.count, self.fps = width, height, old, count, OUTPUT_FPS
        self._frames = frames

    def __next__(self) -> np.ndarray:
        return next(self._frames)


class OldClip:
    """A clip at 12 frames a second, read a stretch at a time."""

    def __init__(self, components: Components, source: Any) -> None:
        self.components, self.source = components, source
        self.total, self.rate = 0, float(OUTPUT_FPS)

        def learn(total: int, rate: float) -> list[int]:
            self.total, self.rate = total, rate
            return [total - 1]

        self.last = media.read_clip(source, pick=learn, progress=self._progress)[0]
        self.count = max(round(self.total * OUTPUT_FPS / self.rate), 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames start to stop, uint8 [n, H, W, 3]."""
        step = self.rate / OUTPUT_FPS
        picks = [min(int(i * step + 1e-6), self.total - 1) for i in range(start, stop)]
        return media.read_clip(self.source, pick=lambda total, rate: picks, progress=self._progress)[0]

    def _progress(self, done: int, total: int) -> None:
        self.components.report("reading the clip", done, total)


def _size(clip: OldClip, options: dict[str, Any]) -> tuple[int, int]:
    """(width, height) of the whole: as asked, the clip's own where the model can make it, else its
    bucket's.
    """
    if options.get("width") is not None or options.get("height") is not None:
        return options.get("width"), options.get("height")  # type: ignore[return-value]  # `check` refuses half
    resolution = tasks.resolve_resolution(tasks.TASKS["t2v"], options.get("resolution"))
    height, width = clip.last.shape[1:3]
    fits = width % CELL == 0 == height % CELL and max(width, height) <= tasks.MAX_LATENT_SIDE * CELL
    if fits and width * height <= ROOM * sides(resolution)[0] ** 2:
        return width, height
    return preprocess.vae_size(width, height, resolution)


def _frames(
    components: Components,
    clip: OldClip,
    size: tuple[int, int],
    requests: list[Request],
    new: int,
    overlap: int,
    hold_colours: bool,
    seed: int,
) -> Iterator[np.ndarray]:
    seen = 4 * (overlap - 1) + 1
    tail = np.empty((0, size[1], size[0], 3), np.uint8)
    for start in range(0, clip.count, READ_AT_ONCE):
        part = preprocess.resize_frames(clip.read(start, min(start + READ_AT_ONCE, clip.count)), size)
        yield from part
        tail = np.concatenate([tail, part[-seen:]])[-seen:].copy()  # no view that holds the rest
    number = 0
    for request in requests:
        for count in lengths(new, MAX_FRAMES - seen):
            asked = replace(request, num_frames=seen + count, seed=seed + number)
            made = _part(components, asked, tail, hold_colours)
            tail = np.concatenate([tail, made[-seen:]])[-seen:].copy()
            number += 1
            yield from made


def lengths(new: int, most: int) -> list[int]:
    """So many new frames as parts of at most `most`, all multiples of four and nearly equal."""
    groups, most = new // 4, most // 4
    parts = -(-groups // most)
    return [4 * (groups // parts + (i < groups % parts)) for i in range(parts)]


@said_when_out_of_memory("extending", "ask for fewer pixels or frames at once")
@torch.inference_mode()
def _part(components: Components, request: Request, tail: np.ndarray, hold_colours: bool) -> np.ndarray:
    """The new frames, uint8 [n, h, w, 3], of one part that starts with the frames of `tail`."""
    latents = components.encode_frames(tail)
    asked = check(replace(request, kept=dict(enumerate(latents))), components.config.variant)
    frames = components.decode_vae(draw_latent(components, asked))[0].numpy()
    if hold_colours:
        frames = matched(frames, frames[: len(tail)], tail.astype(np.float32) / 255)
    return to_levels(frames[len(tail) :], (0.0, 1.0))


def matched(frames: np.ndarray, made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Frames with the colours that bring `made` to `wanted`: mean and spread of each channel, the gain
    limited to GAIN. All float [T, H, W, 3] in 0..1.
    """
    mean, spread = made.mean((0, 1, 2)), made.std((0, 1, 2))
    target, wide = wanted.mean((0, 1, 2)), wanted.std((0, 1, 2))
    gain = np.clip(np.where(spread > 1e-4, wide / np.maximum(spread, 1e-4), 1.0), *GAIN)
    return np.clip((frames - mean) * gain + target, 0, 1).astype(np.float32)
