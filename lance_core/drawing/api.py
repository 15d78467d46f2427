"""What the public API draws: `Lance.generate`, `best_of` and `extend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..components import Components
from ..config import RELEASED_SAMPLING
from ..errors import RequestError
from ..model.out_of_memory import said_when_out_of_memory
from ..model.windows import Windows
from .best import draw_best
from .draw import draw
from .extend import NEW_FRAMES, Extension, extend
from .request import Callback, Generated, Request, check

WITH_LESS = (
    "ask for fewer pixels, frames or results at once, or load smaller weights (`python -m "
    "lance_core convert`)"
)


class Drawing:
    """The part of `Lance` that makes pictures and videos."""

    components: Components

    @said_when_out_of_memory("generating", WITH_LESS)
    @torch.inference_mode()
    def generate(
        self,
        task: str,
        prompt: str,
        *,
        image: Any = None,
        video: Any = None,
        references: Any = None,
        keyframes: Mapping[int, Any] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        windows: Windows | None = None,
        resolution: str | None = None,
        steps: int = RELEASED_SAMPLING.steps,
        shift: float = RELEASED_SAMPLING.shift,
        cfg: float = RELEASED_SAMPLING.cfg,
        cfg_interval: tuple[float, float] = RELEASED_SAMPLING.cfg_interval,
        cfg_vision: float = 1.0,
        renorm: str = RELEASED_SAMPLING.renorm,
        renorm_min: float = RELEASED_SAMPLING.renorm_min,
        seed: int = RELEASED_SAMPLING.seed,
        negative_prompt: str | None = None,
        system_prompt: str | None = None,
        batch_size: int = 1,
        noise: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Generated:
        """Make an image or a video.

        Args:
            task: t2i, t2v, i2v, image_edit, video_edit, subject_image or subject_video.
            prompt: the caption or instruction.
            image, video, references: what the task takes; a path, PIL image, or array/tensor ([H, W, 3];
                videos [T, H, W, 3], or (frames, fps); references: a list of images).
            width, height: pixels, lowered to multiples of 16; ignored where the input decides (i2v and
                edits).
            keyframes: pictures by frame number (-1 is the last) that t2v and i2v keep at that time; see
                `drawing.keyframes`.
            num_frames: lowered to 4k+1, at most 121; ignored by video_edit, where the clip decides.
            windows: for more frames than 121 (up to 1441): how they are cut; see `Windows`.
            resolution: preset that sizes references, sources and, without width and height, the result.
            steps, shift: of the Euler schedule.
            cfg, cfg_interval, cfg_vision, renorm, renorm_min: see `sampler.Guidance`.
            seed: any whole number from 0; result i of a batch has seed + i.
            negative_prompt: takes the caption's place in the unconditional sequence; None or empty removes
                the caption, as trained.
            system_prompt: instead of the one the weights were trained with.
            noise: starting noise of the target, [t, h, w, 48] (a batch in front if batch_size > 1), instead
                of the seed's.
            callback: (step, total, latent) after each step, step from 1; raise in it to stop.

        Raises:
            RequestError, MediaError, CheckpointError, NumericsError.
        """
        request = Request(
            task,
            prompt,
            image=image,
            video=video,
            references=references,
            keyframes=keyframes,
            width=width,
            height=height,
            num_frames=num_frames,
            windows=windows,
            resolution=resolution,
            steps=steps,
            shift=shift,
            cfg=cfg,
            cfg_interval=cfg_interval,
            cfg_vision=cfg_vision,
            renorm=renorm,
            renorm_min=renorm_min,
            seed=seed,
            negative_prompt=negative_prompt,
            system_prompt=system_prompt,
            batch_size=batch_size,
            noise=noise,
            callback=callback,
        )
        return draw(self.components, check(request, self.components.config.variant))

    @said_when_out_of_memory("generating", WITH_LESS)
    @torch.inference_mode()
    def best_of(
        self, count: int, task: str, prompt: str, *, keep: int = 1, **options: Any
    ) -> list[Generated]:
        """The `keep` best of `count` results with seeds that follow each other, the best first.

        Each is scored by `score`'s question, edits and subjects with what they were made from beside them;
        its request says "score" and "best_of". options: as `generate`'s, without batch_size and noise.

        Raises:
            RequestError, MediaError, CheckpointError, NumericsError.
        """
        refused = {"batch_size", "noise"} & set(options)
        if refused:
            raise RequestError(
                f"best_of draws several results itself; leave out {', '.join(sorted(refused))}"
            )
        return draw_best(self.components, Request(task, prompt, **options), count, keep)

    def extend(
        self,
        video: Any,
        prompt: str | Sequence[str],
        *,
        num_frames: int = NEW_FRAMES,
        overlap: int = 1,
        hold_colours: bool = True,
        **options: Any,
    ) -> Extension:
        """A clip and what comes after it, one frame uint8 [H, W, 3] after another, 12 a second.

        Nothing but the part being made is held, so a long video can be written as it comes.

        Args:
            video: the clip: a path, frames [T, H, W, 3], or (frames, fps). It is shown at 12 frames a second
                and the size the model works at: its own where that fits, else its bucket's.
            prompt: what happens next; several, one after another.
            num_frames: new frames for each prompt, lowered to a multiple of 4.
            overlap: latent frames at the clip's end that each part starts from. 1 is its last frame alone, as
                image to video was trained; more also give the motion, which is an experiment.
            hold_colours: bring each part's colours to those of the frames it starts from.
            options: as `generate`'s for t2v; part i of the whole has seed + i.

        Raises:
            RequestError, MediaError, CheckpointError, NumericsError.
        """
        return extend(self.components, video, prompt, num_frames, overlap, hold_colours, options)
