"""Given pictures at chosen times of a video.

A picture is kept clean (timestep 0) at one latent frame of the target. The weights know this for the first
frame (image to video) and, by the released training code, for first and last together (flf2v); anything else
is an experiment.

A latent frame other than the first stands for four pixel frames and, in training, comes from a causal encode
of the whole clip: it has seen what was before it. For a single picture that clip is the picture held still
from the start up to there, and the latent is the last one of its encode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .. import checks
from ..components import Components
from ..config import CELL, Grid
from ..errors import RequestError
from ..inputs import preprocess
from ..inputs.images import load_image
from ..inputs.tasks import Task

TASKS = ("t2v", "i2v")


def latent_frame(frame: int) -> int:
    """The latent frame that a pixel frame belongs to."""
    return (frame + 3) // 4


def resolve(task: Task, given: Any, frames: int) -> dict[int, Any]:
    """Pictures by latent frame. given: pictures by pixel frame, negative ones from the end (-1 is the last).

    Raises:
        RequestError: no such frame, two for one latent frame, or a task that takes none.
    """
    if given is None or (isinstance(given, Mapping) and not given):
        return {}
    if task.name not in TASKS:
        raise RequestError(f"{task.name} takes no keyframes; tasks with keyframes=: {', '.join(TASKS)}")
    if not isinstance(given, Mapping):
        raise RequestError(
            f"keyframes is {checks.shown(given)}, expected a mapping of frame numbers to pictures, as "
            f"{{-1: picture}}"
        )
    out: dict[int, Any] = {}
    for frame, picture in given.items():
        number = checks.whole("the number of a keyframe", frame, -frames, frames - 1)
        at = latent_frame(number % frames)
        if at in out or (at == 0 and task.takes == "image"):
            raise RequestError(
                f"two pictures are given for frame {number % frames}: a video keeps one for its first "
                f"frame and "
                "one for each four frames after it" + ("; i2v's picture is the first" if task.takes else "")
            )
        out[at] = picture
    return out


def encode(components: Components, pictures: Mapping[int, Any], grid: Grid) -> dict[int, Tensor]:
    """Normalised latents [h, w, 48] of pictures by latent frame, cropped and resized to the grid."""
    size = (grid[2] * CELL, grid[1] * CELL)
    return {
        at: components.encode_frames(still(preprocess.crop_resize(load_image(picture), size), at))[at]
        for at, picture in pictures.items()
    }


def still(frame: np.ndarray, at: int) -> np.ndarray:
    """A clip uint8 [4 * at + 1, H, W, 3] that shows one picture up to latent frame `at`."""
    return np.repeat(frame[None], 4 * at + 1, axis=0)
