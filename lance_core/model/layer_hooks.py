"""What a caller may put around the layers of a denoising step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Layer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # und, gen -> und, gen


class LayerHooks(Protocol):
    """Two places in every layer: around all of it, and between its attention and what follows.

    und: the understanding expert's tokens (the target's two markers) [b, 2, hidden]; gen: the generation
    expert's, the latent cells [b, cells, hidden].
    """

    def around(self, index: int, und: Tensor, gen: Tensor, run: Layer) -> tuple[Tensor, Tensor]:
        """In place of layer `index`: und and gen after it. `run` is the layer itself, which overwrites what
        it is given; not to call it leaves the layer out.
        """

    def attended(self, index: int, out: Tensor, split: int) -> Tensor:
        """In place of the attention's result [b, 2 + cells, heads, width]. Its first `split` are und's."""
