"""CONDITIONING that carries a Lance prompt, and how it becomes a context when sampling starts.

A conditioning is `[[ones(1, 1, 1), {"lance": Prompt}]]`: stock nodes combine, time and zero it like any
other.

    Lance Text Encode   Encoded: token ids of the prompt and the negative, embeddings of pictures
    CONDITIONING        Prompt: one branch of an Encoded
    sampling starts     Run: an Encoded planned for the latent's size, its context filled by the first model
    call
    a model call        RowsCond: the runs and branches that the call's rows belong to

Keys and values are computed anew at the start of every sampling run, because LoRAs may have changed the
weights, and once for the positive and negative of one encode, which share their prefix.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ..lance_core.config import Grid, pixel_size
from ..lance_core.errors import RequestError
from ..lance_core.inputs.tasks import check_size, resolve_frames
from ..lance_core.model.dual_expert import DualExpert, Plan, Prepared, Row
from ..lance_core.model.references import without_references
from ..lance_core.model.sequence import Branch, Role, Sequence, TargetSegment, clean_latents

KEY = "lance"


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

    def plan(self, grid: Grid) -> Plan:
        """Both branches for a target of `grid` latent cells; nothing is computed yet.

        Raises:
            RequestError: the latent does not fit what was encoded.
        """
        self._check(grid)
        sequence = replace(self.sequence, target=TargetSegment(grid))
        return Plan.of(sequence, self.tokens_per_second, True, self.negative)

    def _check(self, grid: Grid) -> None:
        width, height, frames = pixel_size(grid)
        check_size(width, height)
        resolve_frames(frames)
        if not self.video and grid[0] > 1:
            raise RequestError(
                f"The latent has {grid[0]} latent frames and the prompt was encoded for an image: set Lance "
                "Text "
                "Encode's target to video, or frames to 1 on the latent."
            )
        for segment in clean_latents(self.sequence.context):
            if segment.role is Role.SOURCE and segment.grid != grid:
                raise RequestError(
                    f"The latent is {size_text(grid)} and what is to be edited was encoded as "
                    f"{size_text(segment.grid)}: connect the LATENT output of Lance Vision Encode to the "
                    "sampler."
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

    def zeroed(self) -> Prompt:
        """The unconditional branch without any negative prompt; the same `encoded` each time."""
        return Prompt(self.encoded if self.encoded.negative is None else self._plain, Branch.UNCONDITIONAL)

    @cached_property
    def _plain(self) -> Encoded:
        return replace(self.encoded, negative=None)

    def conditioning(self) -> list:
        """As ComfyUI's CONDITIONING."""
        return [[torch.ones(1, 1, 1), {KEY: self}]]


def prompt_of(conds: dict[str, Any]) -> Prompt:
    """The prompt a conditioning carries, the unconditional one if its tensor has been zeroed.

    Raises:
        RequestError: it carries none.
    """
    prompt = conds.get(KEY)
    if not isinstance(prompt, Prompt):
        raise RequestError(
            "This model is Lance, and the conditioning was not made for it: encode the prompt with Lance "
            "Text Encode."
        )
    cross = conds.get("cross_attn")
    if isinstance(cross, Tensor) and cross.shape[1:2] != (1,):
        raise RequestError(
            "Lance's prompts cannot be concatenated: write both into one prompt, or use Conditioning "
            "(Combine)."
        )
    if isinstance(cross, Tensor) and not bool(cross.any()):
        return prompt.zeroed()
    return prompt


def dropped_conditioning(positive: list) -> list:
    """A positive CONDITIONING with every prompt's caption and references left out.

    Raises:
        RequestError: a prompt shows nothing.
    """
    out = []
    for tensor, options in positive:
        encoded = prompt_of(options).encoded
        if not encoded.reference_tokens:
            raise RequestError(
                "cfg_vision guides on what is shown and the prompt shows nothing: set it to 1, or connect a "
                "vision to Lance Text Encode."
            )
        dropped = Prompt(encoded.without_references, Branch.CONDITIONAL)
        out.append([torch.ones_like(tensor), {**options, KEY: dropped}])
    return out


@dataclass(eq=False)
class Run:
    """An encode in one sampling run: planned, and prepared from its first model call on."""

    encoded: Encoded
    plan: Plan
    prepared: Prepared | None = None

    def row(self, model: DualExpert, branch: Branch) -> Row:
        """One of its branches, its context computed now unless that is done."""
        if self.prepared is None:
            self.prepared = model.prefill(self.plan, branch)
        else:
            model.prefill_branch(self.prepared, branch)
        return Row(self.prepared, branch)


class Store:
    """The runs that are going on, shared by the conditionings of one encode.

    Held weakly: a context lives as long as the run's conditionings do, and no longer.
    """

    def __init__(self) -> None:
        self._runs: weakref.WeakValueDictionary[tuple, Run] = weakref.WeakValueDictionary()

    def run(self, encoded: Encoded, grid: Grid, weights: Any) -> Run:
        """The encode's run at a size; `weights` changes when patched weights do."""
        key = (id(encoded), grid, weights)
        run = self._runs.get(key)
        if run is None:
            # The run holds `encoded`, which keeps the id in the key from being used again.
            run = self._runs[key] = Run(encoded, encoded.plan(grid))
        return run


class ContextShape(list):
    """[1, 1, tokens] for ComfyUI's memory estimates, which can tell from it which conditionings share a
    context.
    """

    def __init__(self, encoded: Encoded) -> None:
        super().__init__([1, 1, encoded.context_tokens])
        self.encoded = encoded


class RowsCond:
    """ComfyUI's condition protocol, so that positive and negative can run in one forward: what the rows of a
    model call run against, in chunks. Row r of B belongs to branch r // (B / n).

    at: the run for a target of another grid, for conditionings that are set to an area.
    """

    def __init__(
        self, model: DualExpert, branches: list[tuple[Run, Branch]], at: Callable[[Grid], Run], joinable: bool
    ) -> None:
        self.model, self.branches, self.at, self.joinable = model, branches, at, joinable
        self.filled: list[Row] = []

    @classmethod
    def of(
        cls, model: DualExpert, store: Store, prompt: Prompt, grid: Grid, weights: Any, joinable: bool
    ) -> RowsCond:
        """What `LanceModel.extra_conds` gives; runs stay alive with it."""
        at = cache(lambda grid: store.run(prompt.encoded, grid, weights))
        return cls(model, [(at(grid), prompt.branch)], at, joinable)

    @property
    def cond(self) -> RowsCond:
        """What the model is called with where nothing is joined."""
        return self

    def process_cond(self, batch_size: int, area: Any = None, **kwargs: Any) -> RowsCond:
        ((run, branch),) = self.branches
        run = run if area is None else self.at(tuple(area[: len(area) // 2]))
        return RowsCond(self.model, [(run, branch)], self.at, self.joinable)

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, RowsCond) and self.joinable and other.joinable

    def concat(self, others: list[RowsCond]) -> RowsCond:
        joined = [branch for cond in (self, *others) for branch in cond.branches]
        return RowsCond(self.model, joined, self.at, self.joinable)

    def size(self) -> ContextShape:
        return ContextShape(self.branches[0][0].encoded)

    def fill(self, grid: Grid) -> None:
        """Compute the contexts that are still missing.

        Raises:
            RequestError: they were planned for another size than the `grid` that is to be denoised.
        """
        for run, _ in self.branches:
            if run.plan.grid != grid:
                raise RequestError(
                    f"A node between Lance Loader and the sampler denoises {size_text(grid)} of a latent of "
                    f"{size_text(run.plan.grid)}; Lance cannot be cut up like that: remove it (context "
                    "windows, for "
                    "instance)."
                )
        self.filled = [run.row(self.model, branch) for run, branch in self.branches]

    def per_row(self, batch: int) -> list[Row]:
        """The branch of each of `batch` rows, after `fill`."""
        return [self.filled[r * len(self.filled) // batch] for r in range(batch)]
