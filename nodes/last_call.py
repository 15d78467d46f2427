"""The model's last predictions, for guidance that calls it again with patches that change nothing here.

Perturbed-Attention Guidance and its like run the positive once more with some UNet layers changed, and go by
the difference. Lance has no such layers, so the prediction would be the one just made, at its full price.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEPT = 64  # predictions: a step's conditionings, times its windows


@dataclass(frozen=True, eq=False)
class Part:
    """One conditioning's rows of a call.

    key: the conditioning and the part of the latent. given: what else than x and timesteps decides the
    result.
    """

    key: Any
    x: Tensor
    t: Tensor
    given: Any

    def same(self, other: Part) -> bool:
        """Whether the model would give the same."""
        pairs = ((self.x, other.x), (self.t, other.t))
        return self.given == other.given and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


class LastCall:
    """Each conditioning's last prediction, for each window of the latent: a few latents' worth of memory."""

    def __init__(self) -> None:
        self._made: OrderedDict[Any, tuple[Part, Tensor]] = OrderedDict()

    def of(self, options: Mapping[str, Any], x: Tensor, t: Tensor, place: Any, given: Any) -> list[Part]:
        """A call in parts; none where it does not say what its rows belong to, or is to be trained."""
        uuids = options.get("uuids") or ()
        if not uuids or len(x) % len(uuids) or torch.is_grad_enabled():
            return []
        chunks = zip(uuids, x.chunk(len(uuids)), t.chunk(len(uuids)), strict=True)
        return [Part((uuid, place), some, times, given) for uuid, some, times in chunks]

    def known(self, call: list[Part]) -> Tensor | None:
        """What the call would give, if all of it is known."""
        found = [self._made.get(part.key) for part in call]
        outs = [
            made[1] for part, made in zip(call, found, strict=True) if made is not None and made[0].same(part)
        ]
        return torch.cat(outs) if outs and len(outs) == len(call) else None

    def keep(self, call: list[Part], out: Tensor) -> None:
        """Remember what a call gave."""
        for part, some in zip(call, out.chunk(len(call)) if call else (), strict=True):
            self._made[part.key] = part, some
            self._made.move_to_end(part.key)
        while len(self._made) > KEPT:
            self._made.popitem(last=False)
