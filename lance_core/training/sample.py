"""A training sample: one whole sequence, with what its target or its answer should be, and where it lies.

Two rules differ between what the released code trains and what its inference (and ours) runs; `as_released`
chooses the former. A text-to-image sample has the video instruction with "image" for "video", and ViT
tokens of understanding samples have the time offset of generation. A dropped caption leaves no gap there;
our inference, whose unconditional context keeps its conditional places, has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..inputs import prompts
from ..inputs.tasks import SYSTEM_PROMPTS, Task
from ..inputs.tokenizer import Tokenizer
from ..model import rope
from ..model.sequence import Kind, Role, Segment, Sequence, TargetSegment, TextSegment


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence to learn from.

    sequence: with a target to generate, or without one where there is an answer.
    latent: the target's data, normalised, float32 [t, h, w, 48].
    clean_frames: latent frames of the target that are given (t = 0): the first one of image-to-video.
    answer: token ids of the answer, the end token last.
    caption_dropped: train without the caption; the sequence still holds it, for the places of what follows.
    """

    sequence: Sequence
    latent: Tensor | None = None
    clean_frames: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()
    caption_dropped: bool = False

    @property
    def length(self) -> int:
        """Tokens, markers included."""
        dropped = Role.CAPTION if self.caption_dropped else None
        return sum(s.length for s in self.sequence.segments if s.role is not dropped) + len(self.answer)

    @property
    def loss_tokens(self) -> tuple[int, int]:
        """How many tokens have (cross-entropy, squared error)."""
        if self.latent is None:
            return len(self.answer), 0
        t, h, w = self.latent.shape[:3]
        return 0, (t - len(self.clean_frames)) * h * w


def system_prompt(task: Task, as_released: bool = False) -> str:
    """The instruction a task is trained with; see the top of this file."""
    if as_released and task.name == "t2i":
        return SYSTEM_PROMPTS["t2v"].replace("video", "image")
    return task.default_system_prompt


def generation_sample(
    tokenizer: Tokenizer,
    system: str,
    visuals: Iterable[Segment],
    caption: str,
    latent: Tensor,
    clean_frames: tuple[int, ...] = (),
    caption_dropped: bool = False,
) -> Sample:
    """A picture or video to learn to make. visuals: the references' segments, none when they are dropped.

    Raises:
        RequestError: the text is too long.
    """
    t, h, w = latent.shape[:3]
    sequence = prompts.generation(tokenizer, system, visuals, caption, (t, h, w))
    return Sample(sequence, latent, clean_frames, caption_dropped=caption_dropped)


def answer_sample(
    tokenizer: Tokenizer, system: str, visuals: Iterable[Segment], question: str, answer: str
) -> Sample:
    """A question about a picture or clip whose answer is to be learnt.

    Raises:
        RequestError: the text is too long.
    """
    sequence = prompts.question(tokenizer, system, visuals, question)
    return Sample(sequence, answer=(*tokenizer.encode(answer), tokenizer.im_end))


def placed(
    sample: Sample, tokens_per_second: float, as_released: bool = False
) -> list[tuple[Segment | TargetSegment, Tensor]]:
    """The segments a sample trains on, answer or target last, each with its rope positions [3, length]."""
    sequence = sample.sequence
    if sample.answer:
        spoken = TextSegment(Role.TEMPLATE, sample.answer)
        sequence = replace(sequence, context=(*sequence.context, spoken))
    if not sample.caption_dropped:
        places = rope.positions(sequence, tokens_per_second)
    elif as_released:
        sequence = sequence.without_caption()
        places = rope.positions(sequence, tokens_per_second)
    else:
        places = rope.unconditional_positions(sequence, tokens_per_second)
        sequence = sequence.without_caption()
    if as_released and sequence.target is None:
        places = _vit_offset(sequence, places)
    return [pair for pair in zip(sequence.segments, places, strict=True) if pair[0].length]


def _vit_offset(sequence: Sequence, places: list[Tensor]) -> list[Tensor]:
    """The time offset of ViT tokens, which `rope.positions` gives to generation only."""
    seen = [s.kind is Kind.VIT for s in sequence.segments]
    first = next((p for p, is_vit in zip(places, seen, strict=True) if is_vit), None)
    if first is None:
        return places
    shift = torch.tensor([rope.VIT_OFFSET - int(first[0, 0]), 0, 0])[:, None]
    return [p + shift if is_vit else p for p, is_vit in zip(places, seen, strict=True)]
