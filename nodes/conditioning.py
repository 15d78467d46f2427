"""CONDITIONING that carries a Lance prompt, and how it becomes a context when sampling starts.

A conditioning is `[[mark, {"lance": Prompt}]]`: stock nodes combine, time and zero it like any other. The
mark is a number of the prompt's own, so that a node which calculates with it (averages, multiplies) is
noticed.

    Lance Text Encode   Encoded: token ids of the prompt and the negative, embeddings of pictures
    CONDITIONING        Prompt: one branch of an Encoded
    sampling            see contexts.py
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..lance_core.config import MAX_FRAMES, Grid, latent_frames, pixel_size
from ..lance_core.errors import RequestError
from ..lance_core.inputs.tasks import check_size
from ..lance_core.model.dual_expert import Plan
from ..lance_core.model.references import without_references
from ..lance_core.model.rope import GridScale
from ..lance_core.model.sequence import (
    Branch,
    Role,
    Segment,
    Sequence,
    TargetSegment,
    clean_latents,
    is_clean,
)
from .windows import Window

KEY = "lance"
_numbers = itertools.count(1)
ROUNDING = 1e-9  # of a mark that was averaged with itself; marks are whole numbers in float64


@dataclass(eq=False)
class Encoded:
    """One encode, both of its branches: everything but the target's size, which the latent brings.

    sequence: the context as token ids and embeddings; its target is a placeholder. negative: token ids of the
    negative prompt, None for the trained unconditional sequence. video: what the prompt was encoded for.
    """

    sequence: Sequence
    negative: tuple[int, ...] | None
    video: bool
    tokens_per_second: float

    def plan(self, grid: Grid, window: Window | None = None, scale: GridScale | None = None) -> Plan:
        """Both branches for a target of `grid` latent cells; nothing is computed yet.

        window: where they lie in the whole latent, if they are a part of it. scale: see `rope.positions`.

        Raises:
            RequestError: the latent does not fit what was encoded.
        """
        context = tuple(self._cut(s, window) for s in self.sequence.context)
        self._check(grid, context, window)
        sequence = replace(self.sequence, context=context, target=TargetSegment(grid))
        return Plan.of(sequence, self.tokens_per_second, True, self.negative, scale)

    @property
    def edits(self) -> bool:
        """Whether the target has a source, whose cells are its own."""
        return any(s.role is Role.SOURCE for s in clean_latents(self.sequence.context))

    @staticmethod
    def _cut(segment: Segment, window: Window | None) -> Segment:
        if window is None or segment.role is not Role.SOURCE or not is_clean(segment):
            return segment
        return window.of_segment(segment)

    def _check(self, grid: Grid, context: tuple[Segment, ...], window: Window | None) -> None:
        width, height, frames = pixel_size(grid)
        check_size(width, height)
        if grid[0] - (window is not None and window.anchored) > latent_frames(MAX_FRAMES):
            what = "context window" if window is not None else "latent"
            raise RequestError(
                f"The {what} has {frames} frames and the model makes at most {MAX_FRAMES} at once: make it "
                "shorter, or put Wan Context Windows (or Context Windows (Manual) with dim 2) on the model, "
                f"with windows of up to {MAX_FRAMES} frames."
            )
        if not self.video and grid[0] > 1:
            raise RequestError(
                f"The latent has {grid[0]} latent frames and the prompt was encoded for an image: set Lance "
                "Text "
                "Encode's target to video, or frames to 1 on the latent."
            )
        for segment in clean_latents(context):
            if segment.role is Role.SOURCE and segment.grid != grid:
                raise RequestError(
                    f"The latent is {size_text(grid)} and what is to be edited was encoded as "
                    f"{size_text(segment.grid)}: connect the LATENT output of Lance Vision Encode to the "
                    "sampler. For a second, larger pass connect the upscaled latent to size_from of another "
                    "Lance Vision Encode, and encode the prompt with its vision."
                )

    @cached_property
    def without_references(self) -> Encoded:
        """The encode without its caption and references, for guidance on what is shown."""
        return replace(self, sequence=without_references(self.sequence), negative=None)

    @property
    def reference_tokens(self) -> int:
        """Latent tokens of the references, which take the first rows of the starting noise."""
        return sum(s.visual for s in clean_latents(self.sequence.context))

    @cached_property
    def context_tokens(self) -> int:
        """Tokens whose keys and values the context of both branches holds; the target is not among them."""
        context, split = self.sequence.context, self.sequence.caption
        again = sum(
            s.length for s in context[split:] if s.role is not Role.CAPTION
        )  # after the caption, in both
        return sum(s.length for s in context) + again + len(self.negative or ())


def size_text(grid: Grid) -> str:
    """A latent's size as people know it."""
    width, height, frames = pixel_size(grid)
    return f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")


@dataclass(eq=False)
class Prompt:
    """What a conditioning carries: one branch of an encode. A zeroed conditioning is the trained
    unconditional one.
    """

    encoded: Encoded
    branch: Branch
    number: int = field(default_factory=lambda: next(_numbers))

    def zeroed(self) -> Prompt:
        """The unconditional branch without any negative prompt; the same `encoded` each time."""
        return Prompt(self.encoded if self.encoded.negative is None else self._plain, Branch.UNCONDITIONAL)

    @cached_property
    def _plain(self) -> Encoded:
        return replace(self.encoded, negative=None)

    def conditioning(self) -> list:
        """As ComfyUI's CONDITIONING."""
        return [[self.mark(), {KEY: self}]]

    def mark(self) -> Tensor:
        """What stands where other models have embeddings, [1, 1, 1]."""
        return torch.full((1, 1, 1), float(self.number), dtype=torch.float64)


def prompt_of(conds: dict[str, Any]) -> Prompt:
    """The prompt a conditioning carries, the unconditional one if its tensor has been zeroed.

    Raises:
        RequestError: it carries none, or its tensor says that it was mixed with another.
    """
    prompt = conds.get(KEY)
    if not isinstance(prompt, Prompt):
        raise RequestError(
            "This model is Lance, and the conditioning was not made for it: encode the prompt with Lance "
            "Text Encode."
        )
    found = conds.get("cross_attn")
    if not isinstance(found, Tensor):
        return prompt
    if found.shape[-1] != 1:
        raise RequestError(
            "The conditioning was mixed with another model's: encode both prompts with Lance Text Encode."
        )
    if found.shape[1:2] != (1,):
        raise RequestError(
            "Lance's prompts cannot be concatenated: write both into one prompt, or use Conditioning "
            "(Combine)."
        )
    if not bool(found.any()):
        return prompt.zeroed()
    if not torch.allclose(found, prompt.mark().to(found), rtol=ROUNDING, atol=0):
        raise RequestError(
            "Lance's prompts cannot be averaged or multiplied. For a weighted mean of what two prompts "
            "predict, give each a weight with Conditioning (Set Area Strength) and join them with "
            "Conditioning (Combine)."
        )
    return prompt


def dropped_conditioning(positive: list) -> list:
    """A positive CONDITIONING with every prompt's caption and references left out.

    Raises:
        RequestError: a prompt shows nothing.
    """
    out = []
    for _, options in positive:
        encoded = prompt_of(options).encoded
        if not encoded.reference_tokens:
            raise RequestError(
                "cfg_vision guides on what is shown and the prompt shows nothing: set it to 1, or connect a "
                "vision to Lance Text Encode."
            )
        dropped = Prompt(encoded.without_references, Branch.CONDITIONAL)
        out.append([dropped.mark(), {**options, KEY: dropped}])
    return out
