"""What the rows of a model call run against: contexts, the keys and values of prompts.

    sampling starts   RowsCond: a prompt's branch, and where its contexts of this run are kept (Contexts)
    a model call      RowsCond of all its rows -> Rows, each row's context at the call's size

A call's size is known only in the call: context windows and areas give a part of the latent, training gives
pictures of several sizes, and with several GPUs each has weights of its own. So a context belongs to the
model object it was computed with, to the size, and to the weights' patches; it is computed in the first call
that needs it. The positive and negative of one encode share their contexts.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.utils
import torch
from torch import Tensor

from ..lance_core.config import Grid
from ..lance_core.model.dual_expert import DualExpert, Prepared, Row
from ..lance_core.model.rope import GridScale
from ..lance_core.model.sequence import Branch
from .conditioning import Encoded, Prompt
from .windows import BATCH, FIRST_CELLS, Window

KEPT = 4  # contexts of one encode and model at once: of two window lengths, or regions of as many sizes


class Place(NamedTuple):
    """What a context is planned for: the cells of the target, where they lie in the latent if they are a part
    of it, and whether their positions are stretched.
    """

    grid: Grid
    window: Window | None = None
    scale: GridScale | None = None


class Contexts:
    """The contexts of one encode, by model, place and weights; the least recently used ones go."""

    def __init__(self, encoded: Encoded) -> None:
        self.encoded = encoded
        self._lock = threading.Lock()  # several GPUs' models run in threads
        self._made: dict[int, OrderedDict[Any, Prepared]] = {}

    def row(self, model: DualExpert, owner: Any, branch: Branch, place: Place, weights: Any) -> Row:
        """One branch of the encode, its context computed now unless that is done.

        owner: the model object the weights belong to. weights: changes when their patches do.
        """
        if torch.is_grad_enabled():  # training changes the weights in every step
            with torch.no_grad():
                return Row(self._prefill(model, branch, place), branch)
        # Windows have positions of their own, counted from their first frame, so that those of one length
        # share a context; but what is to be edited lies where it lies.
        window = place.window if self.encoded.edits else None
        key = (place._replace(window=window), weights, torch.is_inference_mode_enabled())
        with self._lock:
            made = self._made.setdefault(id(owner), OrderedDict())
        if key in made:
            made.move_to_end(key)
            model.prefill_branch(made[key], branch)
        else:
            while len(made) >= KEPT:
                made.popitem(last=False)
            made[key] = self._prefill(model, branch, place)
        return Row(made[key], branch)

    def _prefill(self, model: DualExpert, branch: Branch, place: Place) -> Prepared:
        return model.prefill(self.encoded.plan(*place), branch)


class Store:
    """The contexts in use, found by their encode.

    Held weakly: a context lives as long as the run's conditionings do, and no longer.
    """

    def __init__(self) -> None:
        self._contexts: weakref.WeakValueDictionary[int, Contexts] = weakref.WeakValueDictionary()

    def contexts(self, encoded: Encoded) -> Contexts:
        """Those of an encode."""
        found = self._contexts.get(id(encoded))
        if found is None:
            # They hold `encoded`, which keeps the id from being used again.
            found = self._contexts[id(encoded)] = Contexts(encoded)
        return found


class ContextShape(list):
    """[1, 1, tokens] for ComfyUI's memory estimates, which can tell from it which conditionings share a
    context.
    """

    def __init__(self, encoded: Encoded) -> None:
        super().__init__([1, 1, encoded.context_tokens])
        self.encoded = encoded


@dataclass(eq=False)
class Rows:
    """What the model's forward is given: both experts, and the branches of its rows, in chunks."""

    model: DualExpert
    rows: list[Row]

    def per_row(self, batch: int) -> list[Row]:
        """The branch of each of `batch` rows: row r belongs to branch r // (batch / n)."""
        return [self.rows[r * len(self.rows) // batch] for r in range(batch)]


class RowsCond:
    """ComfyUI's condition protocol, so that positive and negative can run in one forward: the branches that
    the rows of a model call belong to, in chunks.
    """

    def __init__(self, branches: list[tuple[Contexts, Branch]], joinable: bool) -> None:
        self.branches, self.joinable = branches, joinable

    @classmethod
    def of(cls, store: Store, prompt: Prompt, joinable: bool) -> RowsCond:
        """What `LanceModel.extra_conds` gives; contexts stay alive with it."""
        return cls([(store.contexts(prompt.encoded), prompt.branch)], joinable)

    @property
    def cond(self) -> RowsCond:
        """What the model is called with where nothing is joined."""
        return self

    def process_cond(self, batch_size: int, **kwargs: Any) -> RowsCond:
        return self

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, RowsCond) and self.joinable and other.joinable

    def concat(self, others: list[RowsCond]) -> RowsCond:
        return RowsCond([branch for cond in (self, *others) for branch in cond.branches], self.joinable)

    def size(self) -> ContextShape:
        return ContextShape(self.branches[0][0].encoded)

    def rows(self, model: DualExpert, owner: Any, place: Place, weights: Any) -> Rows:
        """The contexts for a call, those computed that are still missing; see `Contexts.row`.

        Raises:
            RequestError: a prompt does not fit the place.
        """
        return Rows(model, [c.row(model, owner, branch, place, weights) for c, branch in self.branches])


class CleanPart(NamedTuple):
    """Of one conditioning: which frames are clean [b, t], the latent they are in [b, 48, t, h, w], and the
    area (sizes, then starts, of t, h, w) that the conditioning is set to.
    """

    frames: Tensor
    latent: Tensor
    area: tuple[int, ...] | None = None


class CleanCond:
    """ComfyUI's condition protocol for frames that stay as they are, such as a video's first.

    It has no tensor that ComfyUI would cut up: its versions differ in what they cut for a context window, so
    `at` does it for all. retained: a window's lead-in (`Window.anchored`) is the whole latent's first frame.
    """

    def __init__(self, parts: list[CleanPart], batch: int = 1, retained: bool = False) -> None:
        self.parts, self.batch, self.retained = parts, batch, retained

    def process_cond(self, batch_size: int, area: Any = None, **kwargs: Any) -> CleanCond:
        parts = [part._replace(area=None if area is None else tuple(area)) for part in self.parts]
        return CleanCond(parts, batch_size, self.retained)

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, CleanCond) and self.retained == other.retained and self.batch == other.batch

    def concat(self, others: list[CleanCond]) -> CleanCond:
        return CleanCond([p for cond in (self, *others) for p in cond.parts], self.batch, self.retained)

    def size(self) -> list[int]:
        return list(self.parts[0].latent.shape)

    def retaining(self) -> CleanCond:
        """With `retained`."""
        return CleanCond(self.parts, self.batch, True)

    def at(self, x: Tensor, window: Window | None) -> tuple[Tensor, Tensor]:
        """(which frames are clean [b, t], the latent [b, 48, t, h, w]) for a call with x."""
        pairs = [self._cut(part, window) for part in self.parts]
        frames, latent = (torch.cat(whole).to(x.device) for whole in zip(*pairs, strict=True))
        return frames, latent.to(x.dtype)

    def _cut(self, part: CleanPart, window: Window | None) -> tuple[Tensor, Tensor]:
        frames, latent, area = part
        if window is not None:
            frames, latent = self._windowed(frames, latent, window)
        if area is not None:
            sides = len(area) // 2
            for side, (size, start) in enumerate(zip(area[:sides], area[sides:], strict=True)):
                latent = latent.narrow(FIRST_CELLS + side, start, size)
            frames = frames.narrow(1, area[sides], area[0])
        repeated = comfy.utils.repeat_to_batch_size
        return repeated(frames, self.batch), repeated(latent, self.batch)

    def _windowed(self, frames: Tensor, latent: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        first, first_frame = frames[:, :1], latent[:, :, :1]
        if window.axis == BATCH:
            several = max(window.indices) < len(latent)
            return (window.cut(frames), window.cut(latent)) if several else (frames, latent)
        latent = window.cut(latent)
        if window.axis == FIRST_CELLS:
            frames = window.cut(frames, axis=1)
            if self.retained and window.anchored:
                frames = torch.cat([first, frames[:, 1:]], dim=1)
                latent = torch.cat([first_frame, latent[:, :, 1:]], dim=2)
        return frames, latent
