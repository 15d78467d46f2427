"""Parts of a latent that a model call denoises alone, where context windows cut it up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lance_core.errors import RequestError
from ..lance_core.model.sequence import VisualSegment

BATCH, CHANNELS, FIRST_CELLS = 0, 1, 2  # axes of a latent [batch, channels, time, row, column]


class Window(NamedTuple):
    """Which cells along one axis of the latent [b, 48, t, h, w].

    axis: of the latent. indices: of its cells, in the order they are denoised. anchored: the first only leads
    in, and what becomes of it is dropped.
    """

    axis: int
    indices: tuple[int, ...]
    anchored: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Window | None:
        """The window of a model call by its `transformer_options`; None where nothing is cut.

        Raises:
            RequestError: it is of channels.
        """
        window = options.get("context_window")
        if window is None:
            return None
        if window.dim == CHANNELS:
            raise RequestError(
                "Context windows of dim 1 would cut up the channels of the latent: choose dim 2, its frames."
            )
        # Newer ComfyUIs let a window begin with one frame more, whose result they drop.
        anchor = getattr(window, "causal_anchor_index", None)
        anchored = anchor is not None and anchor >= 0
        lead = (int(anchor),) if anchor is not None and anchored else ()
        return cls(window.dim, (*lead, *map(int, window.index_list)), anchored)

    def cut(self, whole: Tensor, axis: int | None = None) -> Tensor:
        """The window of a tensor; axis: of the tensor, if it is another than the latent's."""
        axis = self.axis if axis is None else axis
        return whole.index_select(axis, torch.tensor(self.indices, device=whole.device))

    def of_segment(self, segment: VisualSegment) -> VisualSegment:
        """The window of what is to be edited."""
        axis = self.axis - FIRST_CELLS
        if axis < 0 or max(self.indices) >= segment.grid[axis]:
            return segment
        return segment.cut(axis, self.indices)
