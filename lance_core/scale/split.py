"""One request drawn by several processes: guidance's branches apart, the target's tokens divided, or both.

Every process has both experts and computes the context whole. While denoising, `sequence` divides the
target's tokens: queries stay where they are, keys and values are gathered once a layer. With 2 key heads of
128 these are small, 50 MB a layer and branch at 121 frames of 480p; by heads no more than 2 could divide.
`guidance` computes a branch in each half of the processes and exchanges the velocity alone. ViT and VAE are
the first process's; several results are decoded by several.

Sums are over the same numbers in another order, so results agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..components import Components
from ..config import Grid, pixel_size
from ..errors import LanceError, RequestError
from ..model.attention import Attention
from ..model.decoder import run_layers
from ..model.dual_expert import DualExpert, Row
from ..model.kv_cache import AttendTargets, KeysValues
from ..model.layer_hooks import LayerHooks
from ..model.sequence import MARKERS, Branch, VisualSegment
from ..pipeline import Lance
from .groups import Team, from_first, gather, share


def joined(lance: Lance, mode: str) -> Lance:
    """The same model as part of a team: `generate` is called by every process, with the same request, and
    only the first one's frames are whole.

    Raises:
        RequestError: so many processes cannot divide the work in this way.
    """
    components = SplitComponents.__new__(SplitComponents)
    components.__dict__.update(lance.components.__dict__)
    components.team = Team.of(mode, components.device)
    return Lance(components)


class SplitComponents(Components):
    """Components of which the first process has all, and the others what they need."""

    team: Team

    def experts(self, *args: Any, **options: Any) -> DualExpert:
        """The decoder, its velocity computed by the team."""
        plain = super().experts(*args, **options)
        split = SplitExpert.__new__(SplitExpert)
        split.__dict__.update(plain.__dict__)
        split.team = self.team
        return split

    def vit_segment(self, *args: Any, **options: Any) -> VisualSegment:
        """As `Components.vit_segment`, computed by the first process."""
        found = self._first(lambda: super(SplitComponents, self).vit_segment(*args, **options))
        empty = torch.empty(0)
        segment, data = self._told(found, lambda one: (replace(one, data=empty), one.data))
        return replace(segment, data=data)

    def encode_vae(self, *args: Any, **options: Any) -> Tensor:
        """As `Components.encode_vae`, computed by the first process."""
        found = self._first(lambda: super(SplitComponents, self).encode_vae(*args, **options))
        return self._told(found, lambda latent: (None, latent))[1]

    def _first(self, compute: Any) -> Any:
        """What the first process computes, or the error it makes; None for the others."""
        if self.team.rank:
            return None
        try:
            return compute()
        except LanceError as error:
            return error

    def _told(self, found: Any, apart: Any) -> tuple[Any, Tensor]:
        """What the first process found, everywhere.

        Raises:
            LanceError: it found an error.
        """
        failed = isinstance(found, LanceError)
        value, tensor = (None, None) if failed or found is None else apart(found)
        (error, value), told = from_first((str(found) if failed else None, value), tensor, self.device)
        if failed:
            raise found
        if error is not None:
            raise RequestError(error)
        if told is None:
            raise TypeError("the first process told nothing")
        return value, told

    def decode_vae(self, latent: Tensor, *args: Any, **options: Any) -> Tensor:
        """As `Components.decode_vae` in the first process; the others' frames are empty. Several results are
        divided over the team.
        """
        group = self.team.everyone if len(latent) > 1 else None
        own, lengths = share(len(latent), group)
        if group is None:
            return super().decode_vae(latent, *args, **options) if self.team.rank == 0 else _no_frames(latent)
        if own.start < own.stop:
            part = super().decode_vae(latent[own], *args, **options)
        else:
            part = _no_frames(latent)[:0]
        return gather(part.to(self.device), lengths, group, 0).cpu()


def _no_frames(latent: Tensor) -> Tensor:
    """Frames of the right shape [b, T, H, W, 3], without memory."""
    b, t, h, w = latent.shape[:4]
    grid: Grid = (t, h, w)
    width, height, frames = pixel_size(grid)
    return torch.zeros(1).expand(b, frames, height, width, 3)


class AttendGathered:
    """An `Attend` for some of the target's queries, over the keys and values of all of them."""

    def __init__(self, whole: AttendTargets, gathered: Callable[[Tensor, Tensor], KeysValues]) -> None:
        self.whole, self.gathered = whole, gathered

    def place(self, layer: int) -> KeysValues | None:
        """Nowhere: what a process computes is a part of what is kept."""
        return None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return self.whole(layer, q, *self.gathered(k, v))


class SplitExpert(DualExpert):
    """A decoder whose velocity calls are divided over a team."""

    team: Team
    share = staticmethod(share)
    gather = staticmethod(gather)

    def velocity(
        self,
        rows: Sequence[Row],
        x: Tensor,
        t: Tensor,
        attention: Attention | None = None,
        hooks: LayerHooks | None = None,
    ) -> Tensor:
        """As `DualExpert.velocity`; every process of the team has the whole result."""
        if hooks is not None:
            raise RequestError("a split request cannot have hooks around its layers; leave out --split")
        chosen = self._branch_of(rows)
        if chosen is None:
            group = self.team.everyone if self.team.mode != "guidance" else None
            return self.divided(rows, x, t, group, attention)
        index = torch.tensor(chosen, device=x.device)
        own = self.divided([rows[i] for i in chosen], x[index], t[index], self.team.own, attention)
        both = self.gather(own[None], [1, 1], self.team.pair, 0)
        out = torch.empty_like(x, dtype=own.dtype)
        for branch, part in zip(Branch, both, strict=True):
            out[[i for i, row in enumerate(rows) if row.branch is branch]] = part
        return out

    def _branch_of(self, rows: Sequence[Row]) -> list[int] | None:
        """The rows of this process's branch; None where branches are not divided, or there is one only."""
        if self.team.branch is None:
            return None
        parts = [[i for i, row in enumerate(rows) if row.branch is branch] for branch in Branch]
        return parts[self.team.branch] if len(parts[0]) == len(parts[1]) else None

    def divided(
        self, rows: Sequence[Row], x: Tensor, t: Tensor, group: Any, attention: Attention | None = None
    ) -> Tensor:
        """Velocity with the target's tokens divided over a group."""
        first = rows[0].prepared
        expert = self.generation
        gen = expert.embed_latents(x, t, first.table, self.dtype)
        own, lengths = self.share(gen.shape[1], group)
        gen = gen[:, own].contiguous()
        und = first.markers.expand(len(rows), -1, -1)
        ropes = [row.prepared.rope[row.branch] for row in rows]
        cos, sin = (
            torch.cat([torch.cat([one[:, :MARKERS], one[:, MARKERS:][:, own]], 1) for one in part])
            for part in zip(*ropes, strict=True)
        )
        whole = AttendTargets(
            [(row.prepared.context, row.branch) for row in rows], attention or self.attention
        )

        def gathered(k: Tensor, v: Tensor) -> KeysValues:
            both = self.gather(torch.stack([k, v])[:, :, MARKERS:], lengths, group, 2)
            keys, values = (torch.cat([m[:, :MARKERS], g], 1) for m, g in zip((k, v), both, strict=True))
            return keys, values

        attend = whole if group is None else AttendGathered(whole, gathered)
        _, gen = run_layers(self.und.layers, expert.layers, und, gen, cos, sin, attend, self.side)
        v = self.gather(expert.llm2vae(expert.norm(gen)).float(), lengths, group, 1)
        return v.unflatten(1, x.shape[1:4])
