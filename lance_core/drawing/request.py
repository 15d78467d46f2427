"""A request to draw: what was asked, checked before anything is loaded, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import checks
from ..config import MAX_FRAMES, RELEASED_SAMPLING, latent_frames, pixel_frames
from ..errors import RequestError
from ..inputs import tasks
from ..inputs.tasks import Task
from ..model.sampler import Guidance, schedule
from ..model.windows import Windows
from ..text_generation import MAX_SEED
from . import keyframes

MAX_BATCH = 64
MAX_WINDOWED_FRAMES = 1441  # two minutes at 12 a second, whose frames are held in memory together

Callback = Callable[[int, int, Tensor], None]  # step from 1, steps in all, latent


@dataclass(eq=False)
class Generated:
    """What `generate` made.

    latent: normalised, float32 [t, h, w, 48]; frames: float32 [T, H, W, 3] in 0..1; a batch in front of both
    when batch_size > 1. fps: frames per second of a video (1 frame is an image). request: what was asked,
    JSON-ready.
    """

    latent: Tensor
    frames: Tensor
    fps: int
    request: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Request:
    """The arguments of `Lance.generate`, where they are described; `check` makes of them what is drawn.

    kept: latents [h, w, 48] by latent frame that are held, as going on from a clip needs them; they and
    `keyframes` are for videos that are not sized by their input.
    """

    task: str
    prompt: str
    image: Any = None
    video: Any = None
    references: Any = None
    keyframes: Mapping[int, Any] | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    windows: Windows | None = None
    resolution: str | None = None
    steps: int = RELEASED_SAMPLING.steps
    shift: float = RELEASED_SAMPLING.shift
    cfg: float = RELEASED_SAMPLING.cfg
    cfg_interval: tuple[float, float] = RELEASED_SAMPLING.cfg_interval
    cfg_vision: float = 1.0
    renorm: str = RELEASED_SAMPLING.renorm
    renorm_min: float = RELEASED_SAMPLING.renorm_min
    seed: int = RELEASED_SAMPLING.seed
    negative_prompt: str | None = None
    system_prompt: str | None = None
    batch_size: int = 1
    noise: Any = None
    callback: Callback | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Checked:
    """A request that can be drawn. size: (width, height) in pixels, (0, 0) where the input decides; frames:
    pixel frames, 4k+1; keyframes: pictures by latent frame.
    """

    request: Request
    task: Task
    resolution: str
    times: Tensor
    guidance: Guidance
    batch: int
    seed: int
    frames: int
    size: tuple[int, int]
    keyframes: dict[int, Any]


def check(request: Request, variant: str) -> Checked:
    """Resolve a request for a checkpoint of this variant, "image" or "video".

    Raises:
        RequestError: it cannot be carried out.
    """
    r = request
    task = tasks.task_of(r.task, text=False)
    tasks.check_text("prompt", r.prompt)
    tasks.check_variant(task, variant)
    tasks.check_media(task, r.image, r.video, r.references)
    resolution = tasks.resolve_resolution(task, r.resolution)
    times = schedule(r.steps, r.shift)
    guidance = Guidance(r.cfg, r.cfg_interval, r.renorm, r.renorm_min, r.cfg_vision)
    if guidance.shows and not (task.takes == "references" or task.system == "edit"):
        raise RequestError(
            f"cfg_vision is {guidance.vision:g} and {task.name} shows the model no references; it is for "
            f"edits "
            "and subjects, else leave it at 1"
        )
    batch = checks.whole("batch_size", r.batch_size, 1, MAX_BATCH)
    seed = checks.whole("seed", r.seed, 0, MAX_SEED - batch + 1)
    checks.function("callback", r.callback, "step, total, latent")
    for name, text in (("system_prompt", r.system_prompt), ("negative_prompt", r.negative_prompt)):
        if text is not None:
            checks.text(name, text)
    frames = _frames(task, r)
    size = (0, 0) if task.sized_by_input else tasks.resolve_size(task, r.width, r.height, resolution)
    pictures = keyframes.resolve(task, r.keyframes, frames)
    return Checked(r, task, resolution, times, guidance, batch, seed, frames, size, pictures)


def _frames(task: Task, request: Request) -> int:
    """Pixel frames of the result, 4k+1; more than the model knows only with windows."""
    count = request.num_frames
    if task.output == "image":
        if count is not None and checks.whole("num_frames", count, 1, tasks.MAX_COUNT) != 1:
            raise RequestError(
                f"{task.name} makes one picture and num_frames is {count}; leave it out, or use t2v"
            )
        return 1
    if request.windows is None:
        return tasks.resolve_frames(count)
    if not isinstance(request.windows, Windows):
        raise RequestError(f"windows is {checks.shown(request.windows)}, expected lance_core.Windows or None")
    if task.takes == "video":
        raise RequestError(
            f"windows are for videos longer than {MAX_FRAMES} frames, and {task.name} makes none"
        )
    count = tasks.DEFAULT_FRAMES if count is None else count
    wanted = checks.whole("num_frames", count, 1, MAX_WINDOWED_FRAMES)
    return pixel_frames(latent_frames(wanted))
