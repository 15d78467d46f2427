"""The public API: requests in, latents, frames and answers out. With components.py, the only place that moves
data between devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.loading import Progress
from .components import Components
from .config import RELEASED_SAMPLING, LanceConfig
from .dialogue import scoring, understanding
from .dialogue.understanding import Answer
from .drawing.best import draw_best
from .drawing.draw import draw
from .drawing.extend import NEW_FRAMES, Extension, extend
from .drawing.request import MAX_BATCH, Callback, Generated, Request, check
from .errors import RequestError
from .inputs import seen as media_seen
from .inputs import tasks
from .inputs.seen import ClipRange
from .model.compiling import check_compiler
from .model.out_of_memory import said_when_out_of_memory
from .model.sampler import seeded_noise
from .model.sequence import Sequence as TokenSequence
from .model.side_stream import SideStream
from .model.windows import Windows
from .prompting import enhance as writing
from .text_generation import Chooser, NewText

__all__ = ["MAX_BATCH", "Answer", "Generated", "Lance", "Windows", "load", "seeded_noise"]

GENERATE_WITH_LESS = (
    "ask for fewer pixels, frames or results at once, or load smaller weights (`python -m "
    "lance_core convert`)"
)
ANSWER_WITH_LESS = (
    "choose a smaller resolution preset, or load smaller weights (`python -m lance_core convert`)"
)


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
        return draw(self.components, check(request, self.config.variant))

    @said_when_out_of_memory("generating", GENERATE_WITH_LESS)
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

    # -- understanding ---------------------------------------------------------------------------------------

    @said_when_out_of_memory("answering", ANSWER_WITH_LESS)
    @torch.inference_mode()
    def understand(
        self,
        question: str,
        *,
        image: Any = None,
        video: Any = None,
        images: Any = None,
        history: Any = None,
        system_prompt: str | None = None,
        resolution: str | None = None,
        positions: str = understanding.RELEASED,
        fps: float | None = None,
        start: float | None = None,
        length: float | None = None,
        frames: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[NewText], None] | None = None,
    ) -> Answer:
        """Answer a question. Loads the understanding expert, and the ViT where something is shown.

        Args:
            image, video: the one picture or clip asked about, or
            images: pictures and clips in order, or none: what is read like a clip (moving files, [T, H, W,
                3], (frames, fps), lists of pictures) is one.
            history: what was said before: an answer's `.history`, whose keys and values are used again, or
                its turns (see `dialogue.history`).
            system_prompt: None is the trained instruction, by what the first turn shows; without pictures
                Qwen2.5's.
            resolution: preset of everything shown; None is image_768res for pictures, video_480p for clips.
            positions: "released", or "as trained": the ViT's tokens at time 1000, as in the released training
                code. The released inference code leaves that out.
            fps, start, length, frames: which part of clips is seen, and how densely; see `ClipRange`.
            temperature: 0 takes the likeliest token; above, samples at that temperature from the `top_p`
                nucleus.
            on_token: called with each new stretch of text (a str with `.token_id`); raise in it to stop.

        Raises:
            RequestError, MediaError, CheckpointError, NumericsError.
        """
        task = tasks.TASKS["x2t_video" if video is not None else "x2t_image"]
        tasks.check_text("question", question)
        tasks.check_variant(task, self.config.variant)
        if image is not None or video is not None:
            tasks.check_media(task, image, video, None)
        if resolution is not None:
            resolution = tasks.resolve_resolution(task, resolution)
        max_new_tokens = checks.whole("max_new_tokens", max_new_tokens, 1, tasks.MAX_NEW_TOKENS)
        checks.function("on_token", on_token, "new")
        if system_prompt is not None:
            checks.text("system_prompt", system_prompt)
        choose, part = Chooser(temperature, top_p, seed), ClipRange(fps, start, length, frames)
        as_trained = understanding.positions_of(positions)

        parts = self.components
        shown = understanding.gather(image, video, images, part, parts)
        before = understanding.resume(parts, history, shown, part, system_prompt, resolution, as_trained)
        return understanding.ask(parts, before, question, shown, resolution, max_new_tokens, choose, on_token)

    @said_when_out_of_memory("scoring", ANSWER_WITH_LESS)
    @torch.inference_mode()
    def score(
        self,
        images: Any,
        text: str,
        *,
        question: str | None = None,
        answer: str = scoring.ANSWER,
        resolution: str | None = None,
        system_prompt: str | None = None,
        positions: str = understanding.RELEASED,
    ) -> list[float]:
        """How well each picture or clip fits a text: the probability of "Yes", 0..1.

        Args:
            images: a list of pictures and clips as `understand` takes them, or a batch [B, H, W, 3].
            question: with {text} in it; None is VQAScore's.
            answer: whose probability is given.
            resolution, system_prompt, positions: as `understand`'s.

        Raises:
            RequestError, MediaError, CheckpointError, NumericsError.
        """
        asked = scoring.wording(question, tasks.check_text("text", text))
        as_trained = understanding.positions_of(positions)
        if resolution is not None:
            resolution = tasks.resolve_resolution(tasks.TASKS["x2t_image"], resolution)
        shown = understanding.gather(None, None, media_seen.listed(images), ClipRange(), self.components)
        return scoring.scores(
            self.components,
            [[one] for one in shown],
            asked,
            answer,
            resolution=resolution,
            system_prompt=system_prompt,
            as_trained=as_trained,
        )

    @said_when_out_of_memory("writing a prompt", ANSWER_WITH_LESS)
    @torch.inference_mode()
    def enhance(
        self,
        prompt: str,
        task: str,
        image: Any = None,
        *,
        by: str = "auto",
        seed: int = 0,
        temperature: float = writing.TEMPERATURE,
        timeout: float = writing.TIMEOUT,
    ) -> str:
        """A short wish as the detailed prompt the weights were trained on, in the wish's language.

        What cannot be used (an empty answer, a service that fails) falls back to the wish, with a warning in
        the log.

        Args:
            task: what the prompt is for.
            image: what the task is given, which the writer sees: a picture, a clip, or a list of references.
            by: "model", this model's understanding expert; "endpoint", the OpenAI-compatible service in
                LANCE_REWRITE_BASE_URL, _MODEL_NAME and _API_KEY; "auto", the service where those are set.
            seed, temperature: of the draw.
            timeout: seconds a service may take.

        Raises:
            RequestError, MediaError, CheckpointError, NumericsError.
        """
        return writing.enhance(
            self.components, prompt, task, image, by=by, seed=seed, temperature=temperature, timeout=timeout
        )

    def answer(
        self,
        sequence: TokenSequence,
        max_new_tokens: int,
        choose: Chooser,
        on_token: Callable[[NewText], None] | None = None,
    ) -> Answer:
        """Write tokens after an understanding sequence until the end token or the limit."""
        written = understanding.written(self.components, sequence, max_new_tokens, choose, on_token)
        return Answer(*written[:2])
