"""CONDITIONING that carries a Lance prompt, and how it becomes a context when sampling starts.

A conditioning is `[[ones(1, 1, 1), {"lance": Prompt}]]`: stock nodes combine, time and zero it like any other. The
context's keys and values are computed at the start of every sampling run, because LoRAs may have changed the weights,
and once for the positive and negative of one encode, which share their prefix.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..lance_core import prompts
from ..lance_core.errors import RequestError
from ..lance_core.model import Branch, DualExpert, Plan, Prepared
from ..lance_core.prompts import Tokenizer
from ..lance_core.sequence import Kind, Role, Segment

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

    def prepare(self, grid: tuple[int, int, int]) -> Prepared:
        """The request for a target of `grid` latent cells; nothing is computed yet.

        Raises:
            RequestError: the latent does not fit the request.
        """
        self._check(grid)
        sequence = prompts.generation(self.tokenizer, self.system, self.segments, self.caption, grid)
        negative = self.tokenizer.encode(self.negative) if self.negative else None
        return Prepared(sequence, Plan.of(sequence, self.tokens_per_second, True, negative))

    def _check(self, grid: tuple[int, int, int]) -> None:
        if not self.video and grid[0] > 1:
            raise RequestError(
                f"The latent has {grid[0]} latent frames and the prompt was encoded for an image: set Lance Text Encode's target to "
                "video, or frames to 1 on the latent."
            )
        for segment in self.segments:
            if segment.kind is Kind.CLEAN and segment.role is Role.SOURCE and segment.grid != grid:
                raise RequestError(
                    f"The latent is {pixels(grid)} and what is to be edited was encoded as {pixels(segment.grid)}: connect the LATENT "
                    "output of Lance Vision Encode to the sampler."
                )

    @property
    def reference_tokens(self) -> int:
        """Latent tokens of the references, which take the first rows of the starting noise."""
        return sum(s.visual for s in self.segments if s.kind is Kind.CLEAN)

    @property
    def tokens(self) -> int:
        """About how many tokens the context has, for memory estimates: ids counted, not encoded."""
        return sum(s.length for s in self.segments) + len(self.system) // 2 + len(self.caption) + len(self.negative or "") + 64


def pixels(grid: tuple[int, int, int]) -> str:
    """A latent's size as people know it."""
    t, h, w = grid
    return f"{w * 16}x{h * 16}" + (f", {4 * t - 3} frames" if t > 1 else "")


@dataclass(eq=False)
class Prompt:
    """One side of a request: its positive, its negative, or (a zeroed conditioning) the trained unconditional one."""

    request: Request
    positive: bool

    def zeroed(self) -> Prompt:
        """The unconditional side without any negative prompt; the same object each time."""
        if self.request.negative is None:
            return Prompt(self.request, False)
        plain = self.__dict__.setdefault("_plain", Request(**{**self.request.__dict__, "negative": None}))
        return Prompt(plain, False)

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
        raise RequestError("This model is Lance, and the conditioning was not made for it: encode the prompt with Lance Text Encode.")
    cross = conds.get("cross_attn")
    if isinstance(cross, Tensor) and not bool(cross.any()):
        return prompt.zeroed()
    return prompt


class Store:
    """Prepared contexts of the sampling run that is going on, shared by the conditionings of one encode.

    Held weakly: a context lives as long as the run's conditionings do, and no longer.
    """

    def __init__(self) -> None:
        self._prepared: weakref.WeakValueDictionary[tuple, Prepared] = weakref.WeakValueDictionary()

    def branch(self, prompt: Prompt, grid: tuple[int, int, int], weights: Any) -> Branch:
        """The prompt's side of its prepared context; `weights` changes when patched weights do."""
        key = (id(prompt.request), grid, weights)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = prompt.request.prepare(grid)
            prepared.request = prompt.request  # keeps the id in the key from being used again
            self._prepared[key] = prepared
        return Branch(prepared, 0 if prompt.positive else 1)


class Rows:
    """What the rows of one model call run against, in chunks: row r of B belongs to branch r // (B / n)."""

    def __init__(self, model: DualExpert, branches: list[Branch]) -> None:
        self.model, self.branches = model, branches

    def fill(self) -> None:
        """Compute the contexts that are still missing."""
        for branch in self.branches:
            self.model.fill(branch.prepared, branch.index)

    def per_row(self, batch: int) -> list[Branch]:
        return [self.branches[r * len(self.branches) // batch] for r in range(batch)]


class RowsCond:
    """ComfyUI's condition protocol over `Rows`, so that positive and negative can run in one forward."""

    def __init__(self, cond: Rows, joinable: bool = True) -> None:
        self.cond, self.joinable = cond, joinable

    def process_cond(self, batch_size: int, **kwargs: Any) -> RowsCond:
        return RowsCond(self.cond, self.joinable)

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, RowsCond) and self.joinable and other.joinable

    def concat(self, others: list[RowsCond]) -> Rows:
        return Rows(self.cond.model, [b for c in (self, *others) for b in c.cond.branches])

    def size(self) -> list[int]:
        prefix, rests = self.cond.branches[0].prepared.plan.lengths
        return [1, 1, prefix + sum(rests)]
