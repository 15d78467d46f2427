"""What may be asked: tasks, sizes, frames and media, resolved once and the same everywhere.

Rules a caller may rely on: sizes are lowered to multiples of 16 pixels, frame counts to 4k+1; image-to-video
and editing take their size from the input (a requested one is ignored); a clip's own frames decide a video
edit's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import checks
from ..checks import shown
from ..config import CELL, LATENT_CHANNELS, MAX_FRAMES, MAX_LATENT_SIDE, latent_frames, pixel_frames
from ..errors import RequestError
from .sizes import PRESETS, bucket, sides

SYSTEM_PROMPTS = {
    "t2i": "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial "
    "relationships of the objects "
    "and background:",
    "t2v": "Describe the video by detailing the color, quantity, visible text, shape, size, texture, "
    "spatial relationships and "
    "motion/camera movements of the objects and background:",
    "edit": "Describe the key features of the input {vision} (color, shape, size, texture, objects, "
    "background), then explain how the "
    "user’s text instruction should alter or modify the {vision}. Generate a new {vision} that meets the "
    "user’s requirements while "
    "maintaining consistency with the original input where appropriate.",
    "subject": "Describe the key features of the input image (color, shape, size, texture, objects, "
    "background, style), then "
    "incorporate the user’s text description to generate a new {vision} that satisfies the user’s "
    "requirements while preserving the "
    "essential identity and object or style information from the reference input.",
    "x2t_image": "Look at the image carefully and answer the question.",
    "x2t_video": "Watch the video carefully and answer the question.",
}
"""The instructions the weights were trained with; {vision} is what is made, "image" or "video"."""

MAX_NEW_TOKENS = 4096
MAX_PIXELS, MAX_COUNT = 1 << 20, 1 << 31  # beyond these a number is no size, and no count of frames
DEFAULT_FRAMES = 50  # of the released command line; lowered to 49


@dataclass(frozen=True)
class Task:
    """One of the nine.

    output: "image", "video" or "text". takes: the one kind of media it needs, None for none.
    """

    name: str
    output: str
    takes: str | None
    system: str

    @property
    def default_resolution(self) -> str:
        return "video_480p" if self.is_video else "image_768res"

    @property
    def is_video(self) -> bool:
        """Whether it makes or reads a video, which only the video checkpoint can."""
        return self.output == "video" or self.takes == "video"

    @property
    def default_system_prompt(self) -> str:
        """The instruction the weights were trained with for this task."""
        return SYSTEM_PROMPTS[self.system].format(vision=self.output)

    @property
    def sized_by_input(self) -> bool:
        return self.name in ("i2v", "image_edit", "video_edit")


TASKS = {
    t.name: t
    for t in (
        Task("t2i", "image", None, "t2i"),
        Task("t2v", "video", None, "t2v"),
        Task("i2v", "video", "image", "t2v"),
        Task("image_edit", "image", "image", "edit"),
        Task("video_edit", "video", "video", "edit"),
        Task("subject_image", "image", "references", "subject"),
        Task("subject_video", "video", "references", "subject"),
        Task("x2t_image", "text", "image", "x2t_image"),
        Task("x2t_video", "text", "video", "x2t_video"),
    )
}

# Sizes users ask for, (width, height) in pixels by ratio; these are always allowed, even where a side passes
# 64 cells.
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "image_768res": {
        "21:9": (1168, 496),
        "16:9": (1024, 576),
        "3:2": (944, 624),
        "4:3": (880, 672),
        "1:1": (768, 768),
        "3:4": (672, 880),
        "2:3": (624, 944),
        "9:16": (576, 1024),
    },
    "video_480p": {
        "21:9": (976, 416),
        "16:9": (848, 480),
        "3:2": (784, 528),
        "4:3": (736, 560),
        "1:1": (640, 640),
        "3:4": (560, 736),
        "2:3": (528, 784),
        "9:16": (480, 848),
    },
    "video_360p": {
        "21:9": (672, 288),
        "16:9": (640, 352),
        "3:2": (528, 352),
        "4:3": (560, 416),
        "1:1": (480, 480),
        "3:4": (416, 560),
        "2:3": (352, 528),
        "9:16": (352, 640),
    },
}


def task_of(name: str, *, text: bool | None = None) -> Task:
    """The task by name; `text` True or False also demands that it answers or draws.

    Raises:
        RequestError: no such task, or of the other kind.
    """
    task = TASKS.get(name) if isinstance(name, str) else None
    wanted = [t for t in TASKS.values() if text is None or (t.output == "text") == text]
    if task is None:
        raise RequestError(f"unknown task {shown(name)}; expected one of {', '.join(t.name for t in wanted)}")
    if task not in wanted:
        call = "understand" if task.output == "text" else "generate"
        raise RequestError(
            f"{name} is asked with `{call}`; here one of {', '.join(t.name for t in wanted)} is expected"
        )
    return task


def check_variant(task: Task, variant: str) -> None:
    """Refuse a video task on an image checkpoint."""
    if task.is_video and variant == "image":
        raise RequestError(
            f"{task.name} needs the video checkpoint (Lance_3B_Video); this is the image one (Lance_3B). "
            "Load the other."
        )


def check_media(task: Task, image: Any, video: Any, references: Any) -> None:
    """Refuse a request with media the task does not take, or without those it needs."""
    given = {"image": image is not None, "video": video is not None, "references": references is not None}
    for kind, present in given.items():
        if present and kind != task.takes:
            takes = f"takes {task.takes}= only" if task.takes else "takes no pictures or clips"
            fits = [t.name for t in TASKS.values() if t.takes == kind]
            raise RequestError(
                f"{task.name} {takes}, but {kind}= was given; tasks with {kind}=: {', '.join(fits)}"
            )
    if task.takes and not given[task.takes]:
        raise RequestError(f"{task.name} needs {task.takes}=, and none was given")
    if task.takes == "references" and isinstance(references, list | tuple) and not references:
        raise RequestError(f"{task.name} needs at least one reference image, and references= is empty")


def check_text(what: str, text: Any) -> str:
    """A prompt or question that says something.

    Raises:
        RequestError: no text, empty, or with half a character in it.
    """
    if not checks.text(what, text).strip():
        raise RequestError(f"{what} is empty; say what is wanted")
    return text


def resolve_size(task: Task, width: int | None, height: int | None, resolution: str) -> tuple[int, int]:
    """(width, height) in pixels, multiples of 16, of what a task without an input size makes.

    Without width and height the preset decides: its 1:1 size for images, 16:9 for videos.

    Raises:
        RequestError: one side without the other, too small, or beyond 64 latent cells.
    """
    if width is None and height is None:
        side = sides(resolution)[0]
        return bucket(16, 9, side) if task.is_video else (side, side)
    if width is None or height is None:
        raise RequestError(f"width={shown(width)}, height={shown(height)}: give both or neither")
    return check_size(width, height)


def check_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) lowered to multiples of 16 pixels.

    Raises:
        RequestError: below 16 pixels, or beyond 64 latent cells (1024 pixels) a side and not one of `SIZES`.
    """
    expected = f"at least {CELL} pixels"
    sides = (("width", width), ("height", height))
    given = [checks.real(name, value, CELL, MAX_PIXELS, expected=expected) for name, value in sides]
    wide, tall = (int(value) // CELL * CELL for value in given)
    size = (wide, tall)
    listed = any(size in by_ratio.values() for by_ratio in SIZES.values())
    limit = MAX_LATENT_SIDE * CELL
    if max(size) > limit and not listed:
        raise RequestError(
            f"{width}x{height} is beyond {MAX_LATENT_SIDE} latent cells ({limit} pixels) a side, which the "
            "model knows; "
            f"make it smaller and upscale the result, or take 1168x496 for 21:9"
        )
    return size


def resolve_frames(num_frames: int | None) -> int:
    """Frames of a video, lowered to 4k+1 (the VAE's first latent frame holds one frame, every other four).

    Raises:
        RequestError: below 1 or above 121.
    """
    frames = DEFAULT_FRAMES if num_frames is None else num_frames
    frames = checks.whole("num_frames", frames, 1, MAX_COUNT, f"a whole number from 1 to {MAX_FRAMES}")
    if frames > MAX_FRAMES:
        raise RequestError(
            f"num_frames is {frames}, the model makes at most {MAX_FRAMES} (10 seconds at 12 a second); ask "
            "for fewer"
        )
    return pixel_frames(latent_frames(frames))


def resolve_resolution(task: Task, resolution: str | None) -> str:
    """The preset to use.

    Raises:
        RequestError: unknown.
    """
    if resolution is None:
        return task.default_resolution
    if not isinstance(resolution, str) or resolution not in PRESETS:
        raise RequestError(f"unknown resolution {shown(resolution)}; expected one of {', '.join(PRESETS)}")
    return resolution


def check_noise(noise: Any, batch: int, grid: Sequence[int]) -> None:
    """Starting noise given by the caller, float32: [t, h, w, 48], with the batch in front when there is one.

    Raises:
        RequestError: not numbers, or of another shape.
    """
    shape = (*grid, LATENT_CHANNELS)
    wanted = shape if batch == 1 else (batch, *shape)
    try:
        found = tuple(noise.shape)
    except Exception:
        raise RequestError(f"noise is {shown(noise)}, expected a tensor of shape {list(wanted)}") from None
    if found not in (wanted, (batch, *shape)):
        raise RequestError(
            f"noise has shape {list(found)}, expected {list(wanted)} ([frames, rows, columns, channels] of "
            "the "
            "latent)"
        )
