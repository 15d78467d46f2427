"""What the public API says about pictures: `Lance.understand`, `answer` and `score`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import checks
from ..components import Components
from ..inputs import seen as media_seen
from ..inputs import tasks
from ..inputs.seen import ClipRange
from ..model.out_of_memory import said_when_out_of_memory
from ..model.sequence import Sequence as TokenSequence
from ..text_generation import Chooser, NewText
from . import scoring, understanding
from .understanding import Answer

WITH_LESS = "choose a smaller resolution preset, or load smaller weights (`python -m lance_core convert`)"


class Talking:
    """The part of `Lance` that answers."""

    components: Components

    @said_when_out_of_memory("answering", WITH_LESS)
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
        tasks.check_variant(task, self.components.config.variant)
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

    @said_when_out_of_memory("scoring", WITH_LESS)
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
