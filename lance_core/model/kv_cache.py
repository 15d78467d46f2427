"""The context's keys and values, computed once and read-only while denoising.

One buffer a layer serves both guidance branches, whose contexts differ only from the caption on:

    [ second branch's rest | shared prefix | target | first branch's rest ]

Once rope is applied, attention does not care about order, so each branch is one contiguous slice of the
buffer, its target keys included, and nothing is copied per step. The target's slot is written by each row in
turn just before its attention; rows of a batch therefore share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Attention
from .sequence import Branch

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v -> attention's result


@dataclass(eq=False)
class Region:
    """A stretch of the buffers, [start, stop), whose first `filled` tokens are computed."""

    start: int
    stop: int
    filled: int = 0

    @property
    def end(self) -> int:
        """Where the next token goes."""
        return self.start + self.filled

    @property
    def free(self) -> int:
        """Tokens that still fit."""
        return self.stop - self.end


class Context:
    """Keys and values of one prompt's context in every layer: `prefix`, and a region in `rests` per branch.

    Args:
        layers, kv_heads, head_dim: of the decoder.
        prefix: tokens both branches share.
        rests: tokens after the prefix of one or two branches, in `Branch`'s order.
        target: tokens of the target block, 0 for understanding.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        prefix: int,
        rests: tuple[int, ...] = (0,),
        target: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= len(rests) <= 2:
            raise ValueError(f"a context has one or two branches, got {len(rests)}")
        left = rests[1] if len(rests) == 2 else 0
        self.prefix = Region(left, left + prefix)
        self.target = slice(left + prefix, left + prefix + target)
        capacity = left + prefix + target + rests[0]
        places = (Region(self.target.stop, capacity), Region(0, left))
        views = (slice(left, capacity), slice(0, self.target.stop))
        self.rests = dict(zip(Branch, places[: len(rests)], strict=False))
        self.views = dict(zip(Branch, views[: len(rests)], strict=False))
        self.keys = [
            torch.empty(capacity, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(layers)
        ]
        self.values = [torch.empty_like(k) for k in self.keys]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    @contextmanager
    def extend(self, region: Region, tokens: int, causal: bool, attention: Attention) -> Iterator[Attend]:
        """An `Attend` that appends a block of `tokens` to a region: the shared prefix, or a branch's rest.

        The block sees the prefix, what stands before it in its region, and itself, causally or all to all.
        Blocks become part of the context when the `with` body ends without an exception.
        """
        begin, end = region.end, region.end + tokens
        if tokens > region.free:
            raise ValueError(
                f"a block of {tokens} tokens does not fit: {region.free} of "
                f"{region.stop - region.start} are free"
            )
        before, own = slice(self.prefix.start, self.prefix.end), slice(region.start, end)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            both = []
            for buffer, new in ((self.keys[layer], k), (self.values[layer], v)):
                buffer[begin:end] = new[0]
                seen = buffer[own] if region is self.prefix else torch.cat([buffer[before], buffer[own]])
                both.append(seen[None])
            return attention(q, *both, causal)

        yield attend
        region.filled += tokens

    def attend_target(
        self, layer: int, branch: Branch, q: Tensor, k: Tensor, v: Tensor, attention: Attention
    ) -> Tensor:
        """Attention of one row's target block, all [1, target, heads, width], over its branch's context and
        itself.
        """
        keys, values = self.keys[layer], self.values[layer]
        if torch.is_grad_enabled() and k.requires_grad:  # training: autograd keeps what each row attended to
            prefix, rest = (slice(r.start, r.stop) for r in (self.prefix, self.rests[branch]))
            whole = [torch.cat([b[prefix], b[rest], n[0]])[None] for b, n in ((keys, k), (values, v))]
            return attention(q, *whole, False)
        keys[self.target] = k[0]
        values[self.target] = v[0]
        view = self.views[branch]
        return attention(q, keys[view][None], values[view][None], False)
