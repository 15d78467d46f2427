"""The public API: requests in, latents, frames and answers out. With components.py, the only place that moves
data between devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.loading import Progress
from .components import Components
from .config import (
    LATENT_CHANNELS,
    OUTPUT_FPS,
    RELEASED_SAMPLING,
    Grid,
    LanceConfig,
    latent_frames,
    latent_grid,
)
from .errors import NumericsError, RequestError
from .inputs import media, prompts, tasks
from .inputs.tasks import Task
from .model.compiling import check_compiler
from .model.denoise import denoise
from .model.dual_expert import Plan, Prepared
from .model.out_of_memory import said_when_out_of_memory
from .model.sampler import Guidance, schedule, seeded_noise
from .model.sequence import Role, Segment, Sequence, clean_latents
from .model.side_stream import SideStream
from .text_generation import MAX_SEED, Chooser, NewText, write

MAX_BATCH = 64
GENERATE_WITH_LESS = (
    "ask for fewer pixels, frames or results at once, or load smaller weights (`python -m "
    "lance_core convert`)"
)
ANSWER_WITH_LESS = (
    "choose a smaller resolution preset, or load smaller weights (`python -m lance_core convert`)"
)

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


@dataclass(frozen=True)
class Answer:
    """What `understand` wrote: text without the end token, and every id with it when it was reached."""

    text: str
    token_ids: list[int]


def load(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    vit: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    compile: bool = False,
    overlap: bool = False,
    progress: Progress | None = None,
) -> Lance:
    """Open a checkpoint. Everything is checked now; each part's weights are read when first needed, and kept.

    Args:
        path: `.../Lance_3B` or `.../Lance_3B_Video`; the ViT and VAE are found inside or beside it.
        device, dtype: of the weights and the computation.
        vit, vae: files to use instead.
        compile: fuse the decoder's small steps with torch.compile, and on CUDA write text from a graph; the
            same up to rounding.
        overlap: the understanding expert works on a CUDA stream of its own while the generation expert does;
            the same result.
        progress: (what, done, total) on everything that takes time.

    Raises:
        CheckpointError: missing, damaged, or another model.
        RequestError: a device or dtype torch does not have, nothing that torch.compile could compile with, or
            overlap without CUDA.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RequestError(f"dtype is {dtype}, expected torch.float32, bfloat16 or float16")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device {device!r} cannot be used ({str(error).splitlines()[0]}); 'cpu' always can"
        ) from None
    side = SideStream(device) if overlap else None
    if compile:
        check_compiler(device)
    return Lance(Components(Checkpoint(path, vit, vae), device, dtype, progress, compile, side))


class Lance:
    """An opened checkpoint that generates and understands. Made by `load`."""

    def __init__(self, components: Components) -> None:
        self.components = components

    @property
    def config(self) -> LanceConfig:
        """Sizes of the whole model."""
        return self.components.config

    @property
    def checkpoint(self) -> Checkpoint:
        """The files it was opened from, and the tokeniser."""
        return self.components.checkpoint

    def unload(self, *names: str) -> None:
        """Drop loaded components ("und", "gen", "vit", "vae"; all without names); they are read again when
        next needed.
        """
        self.components.unload(*names)

    # -- generation ------------------------------------------------------------------------------------------

    @said_when_out_of_memory("generating", GENERATE_WITH_LESS)
    @torch.inference_mode()
    def generate(
        self,
        task: str,
        prompt: str,
        *,
        image: Any = None,
        video: Any = None,
        references: Any = None,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        resolution: str | None = None,
        steps: int = RELEASED_SAMPLING.steps,
        shift: float = RELEASED_SAMPLING.shift,
        cfg: float = RELEASED_SAMPLING.cfg,
        cfg_interval: tuple[float, float] = RELEASED_SAMPLING.cfg_interval,
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
            num_frames: lowered to 4k+1, at most 121; ignored by video_edit, where the clip decides.
            resolution: preset that sizes references, sources and, without width and height, the result.
            steps, shift: of the Euler schedule.
            cfg, cfg_interval, renorm, renorm_min: see `sampler.Guidance`.
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
        kind = tasks.task_of(task, text=False)
        tasks.check_text("prompt", prompt)
        tasks.check_variant(kind, self.config.variant)
        tasks.check_media(kind, image, video, references)
        resolution = tasks.resolve_resolution(kind, resolution)
        times = schedule(steps, shift)
        steps, shift = len(times) - 1, float(shift)
        guidance = Guidance(cfg, cfg_interval, renorm, renorm_min)
        batch = checks.whole("batch_size", batch_size, 1, MAX_BATCH)
        seed = checks.whole("seed", seed, 0, MAX_SEED - batch + 1)
        checks.function("callback", callback, "step, total, latent")
        for name, text in (("system_prompt", system_prompt), ("negative_prompt", negative_prompt)):
            if text is not None:
                checks.text(name, text)
        frames = tasks.resolve_frames(num_frames) if kind.output == "video" else 1
        if kind.output == "image" and num_frames is not None:
            self._check_one_frame(task, num_frames)
        size = (0, 0) if kind.sized_by_input else tasks.resolve_size(kind, width, height, resolution)

        sources = self._sources(kind, image, video, references)
        first_frame = None
        if kind.name == "i2v":
            first_frame = self.components.encode_vae(sources[0], resolution)
            segments: list[Segment] = []
            grid: Grid = (latent_frames(frames), first_frame.shape[1], first_frame.shape[2])
        else:
            role = Role.SUBJECT if kind.takes == "references" else Role.SOURCE
            segments = [
                s for clip in sources for s in self.components.visual_segments(clip, resolution, role)
            ]
            clean = clean_latents(segments)
            grid = clean[0].grid if role is Role.SOURCE and clean else latent_grid(*size, frames)
        source_tokens = sum(s.visual for s in clean_latents(segments))

        sequence = prompts.generation(
            self.checkpoint.tokenizer, self._system(kind, system_prompt), segments, prompt, grid
        )
        prepared = self._prefill(sequence, guidance.active, negative_prompt)
        x = self._noise(noise, batch, grid, source_tokens, seed)
        latent = self._denoise(
            prepared, x, times, guidance, first_frame, callback if batch > 1 else _unbatched(callback)
        )
        pixels = self.components.decode_vae(latent)
        asked = {
            "task": task,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "system_prompt": system_prompt,
        } | {
            "resolution": resolution,
            "width": pixels.shape[3],
            "height": pixels.shape[2],
            "num_frames": pixels.shape[1],
            "steps": steps,
            "shift": shift,
            "cfg": guidance.scale,
            "cfg_interval": list(guidance.interval),
            "renorm": renorm,
            "renorm_min": guidance.renorm_min,
            "seed": seed,
            "checkpoint": self.checkpoint.path.name,
        }
        if batch == 1:
            latent, pixels = latent[0], pixels[0]
        return Generated(latent, pixels, OUTPUT_FPS, asked)

    @staticmethod
    def _check_one_frame(task: str, num_frames: Any) -> None:
        """Refuse more than one frame for a picture."""
        count = checks.whole("num_frames", num_frames, 1, tasks.MAX_COUNT)
        if count != 1:
            raise RequestError(
                f"{task} makes one picture and num_frames is {count}; leave it out, or use t2v"
            )

    def _sources(self, task: Task, image: Any, video: Any, references: Any) -> list[np.ndarray]:
        """The request's media as 8-bit clips [T, H, W, 3], videos already thinned to the frames the model
        sees.
        """
        if task.takes == "video":
            return [
                media.read_clip(
                    video,
                    progress=lambda done, total: self.components.report("reading the clip", done, total),
                )[0]
            ]
        if task.takes == "references":
            listed = references if isinstance(references, list | tuple) else [references]
            return [media.load_image(r)[None] for r in listed]
        return [media.load_image(image)[None]] if task.takes == "image" else []

    def _system(self, task: Task, system_prompt: str | None) -> str:
        return task.default_system_prompt if system_prompt is None else system_prompt

    def _prefill(self, sequence: Sequence, guided: bool, negative_prompt: str | None) -> Prepared:
        negative = prompts.negative(self.checkpoint.tokenizer, negative_prompt, sequence)
        plan = Plan.of(sequence, self.config.tokens_per_second, guided, negative)
        counted = self.components.counted("prefilling", [plan.prefix, *plan.rests.values()])
        return self.components.experts(attention=counted).prefill(plan)

    def _noise(self, noise: Any, batch: int, grid: Grid, before: int, seed: int) -> Tensor:
        """Starting noise [batch, t, h, w, 48] on the device: a row per latent token of the whole sequence,
        references first.
        """
        if noise is not None:
            tasks.check_noise(noise, batch, grid)
            try:
                noise = torch.as_tensor(noise, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError) as error:
                raise RequestError(f"noise is no array of numbers ({str(error)[:200]})") from None
            if not bool(torch.isfinite(noise).all()):
                raise NumericsError("the noise given has NaN or infinity in it")
            return noise.reshape(batch, *grid, LATENT_CHANNELS).to(self.components.device)
        return torch.stack([seeded_noise(seed + i, grid, before) for i in range(batch)]).to(
            self.components.device
        )

    def _denoise(
        self,
        prepared: Prepared,
        x: Tensor,
        times: Tensor,
        guidance: Guidance,
        first_frame: Tensor | None,
        callback: Callback | None,
    ) -> Tensor:
        """`denoise`, with progress, and with an error that names a damaged weight."""

        def step(i: int, total: int, latent: Tensor) -> None:
            self.components.report("denoising", i, total)
            if callback is not None:
                callback(i, total, latent)

        try:
            experts = self.components.experts()
            return denoise(experts, prepared, x, times, guidance, first_frame=first_frame, callback=step)
        except NumericsError as error:
            raise NumericsError(f"{error}{self.components.blame('gen', 'und')}") from None

    # -- understanding ---------------------------------------------------------------------------------------

    @said_when_out_of_memory("answering", ANSWER_WITH_LESS)
    @torch.inference_mode()
    def understand(
        self,
        question: str,
        *,
        image: Any = None,
        video: Any = None,
        system_prompt: str | None = None,
        resolution: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[NewText], None] | None = None,
    ) -> Answer:
        """Answer a question about one image or one video. Loads the understanding expert and the ViT only.

        Args:
            temperature: 0 takes the likeliest token; above, samples at that temperature from the `top_p`
                nucleus.
            on_token: called with each new stretch of text (a str with `.token_id`); raise in it to stop.

        Raises:
            RequestError, MediaError, CheckpointError, NumericsError.
        """
        if image is None and video is None:
            raise RequestError("understanding needs image= or video=, and none was given")
        task = tasks.TASKS["x2t_video" if video is not None else "x2t_image"]
        tasks.check_text("question", question)
        tasks.check_variant(task, self.config.variant)
        tasks.check_media(task, image, video, None)
        resolution = tasks.resolve_resolution(task, resolution)
        max_new_tokens = checks.whole("max_new_tokens", max_new_tokens, 1, tasks.MAX_NEW_TOKENS)
        checks.function("on_token", on_token, "new")
        if system_prompt is not None:
            checks.text("system_prompt", system_prompt)
        choose = Chooser(temperature, top_p, seed)

        clip = self._sources(task, image, video, None)[0]
        segment = self.components.vit_segment(clip, resolution, Role.QUESTION)
        sequence = prompts.question(
            self.checkpoint.tokenizer, self._system(task, system_prompt), [segment], question
        )
        return self.answer(sequence, max_new_tokens, choose, on_token)

    def answer(
        self,
        sequence: Sequence,
        max_new_tokens: int,
        choose: Chooser,
        on_token: Callable[[NewText], None] | None = None,
    ) -> Answer:
        """Write tokens after an understanding sequence until the end token or the limit."""
        count = 0

        def show(new: NewText) -> None:
            nonlocal count
            count += 1
            self.components.report("writing", count, max_new_tokens)
            if on_token is not None:
                on_token(new)

        self.components.report("writing", 0, max_new_tokens)
        model, rate = self.components.experts(generation=False), self.config.tokens_per_second
        try:
            fixed = self.components.compile and self.components.device.type == "cuda"
            return Answer(
                *write(model, self.checkpoint.tokenizer, sequence, rate, max_new_tokens, choose, show, fixed)
            )
        except NumericsError as error:
            raise NumericsError(f"{error}{self.components.blame('und', 'vit')}") from None


def _unbatched(
    callback: Callback | None,
) -> Callback | None:
    """A callback that sees [t, h, w, 48] as results of a single request do."""
    return None if callback is None else lambda step, total, latent: callback(step, total, latent[0])
