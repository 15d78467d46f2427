"""The context's keys and values, computed once and read-only while denoising.

One buffer a layer serves both guidance branches, whose contexts differ only from the caption on:

    [ second branch's rest | shared prefix | target | first branch's rest ]

Once rope is applied, attention does not care about order, so each branch is one contiguous slice of the
buffer, its target keys included, and nothing is copied per step. The target's slot is written by each row in
turn just before its attention; rows of a batch therefore share it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from .attention import Attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Context:
    """Keys and values of one prompt's context in every layer.

    Args:
        layers, kv_heads, head_dim: of the decoder.
        prefix: tokens both branches share.
        rests: tokens after the prefix of one or two branches.
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
        self.prefix = slice(left, left + prefix)
        self.target = slice(left + prefix, left + prefix + target)
        capacity = left + prefix + target + rests[0]
        self.rests = (slice(self.target.stop, capacity), slice(0, left))[: len(rests)]
        self.views = (slice(left, capacity), slice(0, self.target.stop))[: len(rests)]
        self.keys = [
            torch.empty(capacity, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(layers)
        ]
        self.values = [torch.empty_like(k) for k in self.keys]
        self.filled = {None: 0, 0: 0, 1: 0}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    @contextmanager
    def extend(self, branch: int | None, tokens: int, causal: bool, attention: Attention):
        """An `Attend` that appends a block of `tokens` to the shared prefix (branch None) or to a branch's
        rest.

        The block sees everything before it and itself, causally or all to all. Blocks become part of the
        context when the `with` body ends without an exception.
        """
        region = self.prefix if branch is None else self.rests[branch]
        begin = region.start + self.filled[branch]
        end = begin + tokens
        if end > region.stop:
            raise ValueError(
                f"a block of {tokens} tokens does not fit: {region.stop - begin} of "
                f"{region.stop - region.start} are free"
            )
        before = slice(self.prefix.start, self.prefix.start + self.filled[None])
        own = slice(region.start, end)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            both = []
            for buffer, new in ((self.keys[layer], k), (self.values[layer], v)):
                buffer[begin:end] = new[0]
                both.append(buffer[own] if branch is None else torch.cat([buffer[before], buffer[own]]))
            return attention(q, both[0][None], both[1][None], causal)

        yield attend
        self.filled[branch] += tokens

    def attend_target(
        self, layer: int, branch: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention
    ) -> Tensor:
        """Attention of one row's target block, all [1, target, heads, width], over its branch's context and
        itself.
        """
        keys, values = self.keys[layer], self.values[layer]
        if torch.is_grad_enabled() and k.requires_grad:  # training: autograd keeps what each row attended to
            rest, prefix = self.rests[branch], self.prefix
            return attention(
                q, *(torch.cat([b[prefix], b[rest], n[0]])[None] for b, n in ((keys, k), (values, v))), False
            )
        keys[self.target] = k[0]
        values[self.target] = v[0]
        view = self.views[branch]
        return attention(q, keys[view][None], values[view][None], False)
