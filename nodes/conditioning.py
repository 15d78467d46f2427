"""CONDITIONING that carries a Lance prompt, and how it becomes a context when sampling starts.

A conditioning is `[[ones(1, 1, 1), {"lance": Prompt}]]`: stock nodes combine, time and zero it like any
other. The context's keys and values are computed at the start of every sampling run, because LoRAs may have
changed the weights, and once for the positive and negative of one encode, which share their prefix.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ..lance_core.errors import RequestError
from ..lance_core.inputs import prompts
from ..lance_core.inputs.tasks import check_size, resolve_frames
from ..lance_core.inputs.tokenizer import Tokenizer
from ..lance_core.model.dual_expert import DualExpert, Plan, Prepared, Row
from ..lance_core.model.sequence import Branch, Role, Segment, clean_latents

KEY = "lance"


@dataclass(eq=False)
class Request:
    """One encode, both of its sides: everything but the target's size, which the latent brings.

    negative: the negative prompt, None for the trained unconditional sequence.
    """

    tokenizer: Tokenizer
    system: str
    segments: tuple[Segment, ...]
    caption: str
    negative: str | None
    video: bool
    tokens_per_second: float

    def plan(self, grid: tuple[int, int, int]) -> Plan:
        """The request for a target of `grid` latent cells; nothing is computed yet.

        Raises:
            RequestError: the latent does not fit the request.
        """
        self._check(grid)
        sequence = prompts.generation(self.tokenizer, self.system, self.segments, self.caption, grid)
        negative = self.tokenizer.encode(self.negative) if self.negative else None
        return Plan.of(sequence, self.tokens_per_second, True, negative)

    def _check(self, grid: tuple[int, int, int]) -> None:
        check_size(grid[2] * 16, grid[1] * 16)
        resolve_frames(4 * grid[0] - 3)
        if not self.video and grid[0] > 1:
            raise RequestError(
                f"The latent has {grid[0]} latent frames and the prompt was encoded for an image: set Lance "
                "Text Encode's target to "
                "video, or frames to 1 on the latent."
            )
        for segment in clean_latents(self.segments):
            if segment.role is Role.SOURCE and segment.grid != grid:
                raise RequestError(
                    f"The latent is {pixels(grid)} and what is to be edited was encoded as "
                    f"{pixels(segment.grid)}: connect the LATENT "
                    "output of Lance Vision Encode to the sampler."
                )

    @property
    def reference_tokens(self) -> int:
        """Latent tokens of the references, which take the first rows of the starting noise."""
        return sum(s.visual for s in clean_latents(self.segments))

    @cached_property
    def context_tokens(self) -> int:
        """Tokens whose keys and values the context of both sides holds; the target is not among them."""
        sequence = prompts.generation(self.tokenizer, self.system, self.segments, self.caption, (1, 1, 1))
        negative = self.tokenizer.encode(self.negative) if self.negative else None
        prefix, rests = Plan.of(sequence, self.tokens_per_second, True, negative).lengths
        return prefix + sum(rests)


def pixels(grid: tuple[int, int, int]) -> str:
    """A latent's size as people know it."""
    t, h, w = grid
    return f"{w * 16}x{h * 16}" + (f", {4 * t - 3} frames" if t > 1 else "")


@dataclass(eq=False)
class Prompt:
    """One side of a request: its positive, its negative, or (a zeroed conditioning) the trained unconditional
    one.
    """

    request: Request
    positive: bool

    def zeroed(self) -> Prompt:
        """The unconditional side without any negative prompt; the same object each time."""
        if self.request.negative is None:
            return Prompt(self.request, False)
        return Prompt(self._plain, False)

    @cached_property
    def _plain(self) -> Request:
        return replace(self.request, negative=None)

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


@dataclass(eq=False)
class Run:
    """A request in one sampling run: planned, and prepared from its first model call on."""

    request: Request
    plan: Plan
    prepared: Prepared | None = None

    def row(self, model: DualExpert, branch: Branch) -> Row:
        """One of its branches, its context computed now unless that is done."""
        if self.prepared is None:
            self.prepared = model.prefill(self.plan, branch)
        else:
            model.prefill_branch(self.prepared, branch)
        return Row(self.prepared, branch)


@dataclass(frozen=True, eq=False)
class Side:
    """What rows of a model call run against: a branch of a run."""

    run: Run
    branch: Branch


class Store:
    """Contexts of the sampling run that is going on, shared by the conditionings of one encode.

    Held weakly: a context lives as long as the run's conditionings do, and no longer.
    """

    def __init__(self) -> None:
        self._runs: weakref.WeakValueDictionary[tuple, Run] = weakref.WeakValueDictionary()

    def branch(self, prompt: Prompt, grid: tuple[int, int, int], weights: Any) -> Side:
        """The prompt's side of its run; `weights` changes when patched weights do."""
        key = (id(prompt.request), grid, weights)
        run = self._runs.get(key)
        if run is None:
            # The run holds the request, which keeps the id in the key from being used again.
            run = self._runs[key] = Run(prompt.request, prompt.request.plan(grid))
        return Side(run, Branch.CONDITIONAL if prompt.positive else Branch.UNCONDITIONAL)


class Rows:
    """What the rows of one model call run against, in chunks: row r of B belongs to branch r // (B / n)."""

    def __init__(self, model: DualExpert, branches: list[Side]) -> None:
        self.model, self.branches = model, branches
        self.filled: list[Row] = []

    def fill(self, grid: tuple[int, int, int]) -> None:
        """Compute the contexts that are still missing.

        Raises:
            RequestError: they were prepared for another size than the `grid` that is to be denoised.
        """
        for side in self.branches:
            if side.run.plan.grid != grid:
                raise RequestError(
                    f"A node between Lance Loader and the sampler denoises {pixels(grid)} of a latent of "
                    f"{pixels(side.run.plan.grid)}; Lance cannot be cut up like that: remove it "
                    "(context windows, for instance)."
                )
        self.filled = [side.run.row(self.model, side.branch) for side in self.branches]

    def per_row(self, batch: int) -> list[Row]:
        return [self.filled[r * len(self.filled) // batch] for r in range(batch)]


class ContextShape(list):
    """[1, 1, tokens] for the host's memory estimates, which can tell from it which conditionings share one
    context.
    """

    def __init__(self, request: Request) -> None:
        super().__init__([1, 1, request.context_tokens])
        self.request = request


class RowsCond:
    """ComfyUI's condition protocol over `Rows`, so that positive and negative can run in one forward.

    at: the branch for a target of another grid, for conditionings that are set to an area.
    """

    def __init__(
        self,
        model: DualExpert,
        at: Callable[[tuple], Side],
        grid: tuple[int, int, int],
        joinable: bool = True,
    ) -> None:
        self.model, self.at, self.joinable = model, at, joinable
        self.cond = Rows(model, [at(grid)])

    @classmethod
    def of(
        cls,
        model: DualExpert,
        store: Store,
        prompt: Prompt,
        grid: tuple[int, int, int],
        weights: Any,
        joinable: bool,
    ) -> RowsCond:
        """What `LanceModel.extra_conds` gives; branches stay alive with it."""
        return cls(model, cache(lambda grid: store.branch(prompt, grid, weights)), grid, joinable)

    def process_cond(self, batch_size: int, area: Any = None, **kwargs: Any) -> RowsCond:
        grid = self.cond.branches[0].run.plan.grid if area is None else tuple(area[: len(area) // 2])
        return RowsCond(self.model, self.at, grid, self.joinable)

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, RowsCond) and self.joinable and other.joinable

    def concat(self, others: list[RowsCond]) -> Rows:
        return Rows(self.model, [b for c in (self, *others) for b in c.cond.branches])

    def size(self) -> ContextShape:
        return ContextShape(self.cond.branches[0].run.request)
