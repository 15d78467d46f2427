"""Changes of shape without weights: shortcuts around a level, and patches to channels and back."""

from __future__ import annotations

import math
from itertools import product

from einops import rearrange
from torch import Tensor

from .streaming import layout


def add_averaged(y: Tensor, x: Tensor, time: int, space: int) -> Tensor:
    """y plus a finer level's x at y's size and width, without parameters; in place.

    Cells of time x space x space points are folded into x's channels, and those averaged in groups. A first
    frame alone is averaged with zeros before it, as the weights were trained.
    """
    cell = time * space * space
    group = x.shape[1] * cell // y.shape[1]
    shared = math.gcd(group, cell)
    places = _places(x, time, space)
    # Channels of y that are `cell / shared` apart read the same places, `group / shared` channels apart.
    for first in range(cell // shared):
        group_at = range(first * group, (first + 1) * group)
        parts = [
            place[:, at // cell :: group // shared].float()
            for at in group_at
            if (place := places[at % cell]) is not None
        ]
        if parts:
            y[:, first :: cell // shared] += (sum(parts[1:], parts[0]) / group).to(y.dtype)
    return y


def add_duplicated(y: Tensor, x: Tensor, time: int, space: int) -> Tensor:
    """y plus a coarser level's x at y's size and width, without parameters; in place.

    x's channels are repeated, then unfolded into cells of time x space x space points. A first frame alone is
    the last of its cells.
    """
    cell = time * space * space
    repeats = y.shape[1] * cell // x.shape[1]
    shared = math.gcd(repeats, cell)
    sources = [
        x[:, first :: cell // shared].contiguous(memory_format=layout(x)) for first in range(cell // shared)
    ]
    for at, place in enumerate(_places(y, time, space)):
        if place is None:
            continue
        for first in range(repeats // shared):
            place[:, first :: repeats // shared] += sources[(first * cell + at) // repeats]
    return y


def _places(x: Tensor, time: int, space: int) -> list[Tensor | None]:
    """The views of x, one point of each cell in every one, in the order cells are folded; None where a first
    frame has none.
    """
    absent = -x.shape[2] % time
    return [
        None if i < absent else x[:, :, i - absent :: time, j::space, k::space]
        for i, j, k in product(range(time), range(space), range(space))
    ]


def patchify(x: Tensor, patch: int) -> Tensor:
    """[b, 3, t, H, W] -> [b, 3 patch^2, t, H/patch, W/patch]; in the channels columns come before rows."""
    return rearrange(x, "b c t (h q) (w r) -> b (c r q) t h w", q=patch, r=patch)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=patch, r=patch)
