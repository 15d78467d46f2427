"""The context's keys and values, computed once and read-only while denoising.

One buffer a layer serves both branches of guidance, whose contexts differ only from the caption on:

    [ unconditional rest | shared prefix | target | conditional rest ]

Once rope is applied, attention does not depend on order, so each branch with its target is one contiguous
slice of the buffer, and nothing is copied per step. Each row writes the target's place just before its
attention; rows of a batch therefore share it.

What a decoder layer attends to is an `Attend`, one of the three classes at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attention, fold_groups, unfold_groups
from .sequence import Branch

KeysValues = tuple[Tensor, Tensor]


class Attend(Protocol):
    """What a decoder layer attends to."""

    def place(self, layer: int) -> KeysValues | None:
        """Where a layer's keys and values can be written at once, [1, n, kv_heads, width] each; None where
        they are to be given to the call as they are.
        """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """The attention of q [b, n, heads, width] over k and v (what `place` gave, or others) and all before
        them: a result [1, n, heads, width] for each of the b.
        """


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
        """Attention that appends a block of `tokens` to a region: the shared prefix, or a branch's rest.

        The block sees the prefix, what stands before it in its region, and itself, causally or all to all. It
        becomes part of the context when the `with` body ends without an exception.
        """
        if tokens > region.free:
            raise ValueError(
                f"a block of {tokens} tokens does not fit: {region.free} of "
                f"{region.stop - region.start} are free"
            )
        yield AppendBlock(self, region, tokens, causal, attention)
        region.filled += tokens

    def copy_prefix(self, other: Context, tokens: int) -> None:
        """Take the first `tokens` of another context's prefix as those of this one, whose prefix is empty.

        Raises:
            ValueError: they are not computed there, or do not fit here.
        """
        if self.prefix.filled or not tokens <= min(other.prefix.filled, self.prefix.free):
            raise ValueError(f"{tokens} tokens of a context with {other.prefix.filled} cannot be copied here")
        take = slice(other.prefix.start, other.prefix.start + tokens)
        put = slice(self.prefix.start, self.prefix.start + tokens)
        for theirs, ours in ((other.keys, self.keys), (other.values, self.values)):
            for old, new in zip(theirs, ours, strict=True):
                new[put] = old[take]
        self.prefix.filled = tokens

    def attend_target(
        self, layer: int, branch: Branch, q: Tensor, k: Tensor, v: Tensor, attention: Attention
    ) -> Tensor:
        """Attention of one row's target block, all [1, target, heads, width], over its branch's context and
        itself.
        """
        keys, values = self.keys[layer], self.values[layer]
        if torch.is_grad_enabled() and k.requires_grad:  # training: autograd keeps what each row attended to
            prefix, rest = (slice(r.start, r.stop) for r in (self.prefix, self.rests[branch]))
            k, v = (torch.cat([b[prefix], b[rest], n[0]])[None] for b, n in ((keys, k), (values, v)))
            return attention(q, k, v, False)
        _write(keys[self.target], k[0])
        _write(values[self.target], v[0])
        view = self.views[branch]
        return attention(q, keys[view][None], values[view][None], False)


def _write(place: Tensor, new: Tensor) -> None:
    """Copy, unless `new` is what is there: written at once, by `Attend.place`."""
    same = place.storage_offset() == new.storage_offset() and place.stride() == new.stride()
    if not (same and place.untyped_storage()._cdata == new.untyped_storage()._cdata):
        place.copy_(new)


class AppendBlock:
    """An `Attend` that writes a block's keys and values behind a region, and attends to all before them."""

    def __init__(
        self, context: Context, region: Region, tokens: int, causal: bool, attention: Attention
    ) -> None:
        self.context, self.causal, self.attention = context, causal, attention
        self.shared = region is context.prefix
        self.prefix = slice(context.prefix.start, context.prefix.end)
        self.new, self.own = slice(region.end, region.end + tokens), slice(region.start, region.end + tokens)

    def place(self, layer: int) -> KeysValues | None:
        if torch.is_grad_enabled():
            return None
        return self.context.keys[layer][self.new][None], self.context.values[layer][self.new][None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        keys = self._append(self.context.keys[layer], k)
        return [self.attention(q, keys, self._append(self.context.values[layer], v), self.causal)]

    def _append(self, buffer: Tensor, new: Tensor) -> Tensor:
        _write(buffer[self.new], new[0])
        seen = buffer[self.own] if self.shared else torch.cat([buffer[self.prefix], buffer[self.own]])
        return seen[None]


class AttendTargets:
    """An `Attend` for rows of noisy latents, each with its own (context, branch)."""

    def __init__(self, rows: Sequence[tuple[Context, Branch]], attention: Attention) -> None:
        self.rows, self.attention = rows, attention

    def place(self, layer: int) -> KeysValues | None:
        if len(self.rows) > 1 or torch.is_grad_enabled():  # rows of one prompt share the target's place
            return None
        context = self.rows[0][0]
        return context.keys[layer][context.target][None], context.values[layer][context.target][None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        rows = zip(self.rows, q.split(1), k.split(1), v.split(1), strict=True)
        return [
            context.attend_target(layer, branch, one_q, one_k, one_v, self.attention)
            for (context, branch), one_q, one_k, one_v in rows
        ]


class AppendToken:
    """An `Attend` that appends one token to the prefix, and attends to the whole buffer with the free slots
    masked. Shapes and addresses are the same for every token, so that it can be recorded as a graph.

    The caller moves `slot` on and keeps the region's count.
    """

    def __init__(self, context: Context, device: torch.device, dtype: torch.dtype) -> None:
        self.context, begin = context, context.prefix.end
        self.slot = torch.full((1,), begin, device=device)
        bias = torch.full((1, 1, 1, context.prefix.stop), float("-inf"), device=device, dtype=dtype)
        self.bias = bias.index_fill_(-1, torch.arange(begin, device=device), 0)
        for buffer in (*context.keys, *context.values):  # a masked NaN would still be one
            buffer[begin:].zero_()

    def show(self) -> None:
        """Unmask the slot that the token about to come is written to."""
        self.bias.index_fill_(-1, self.slot, 0)

    def place(self, layer: int) -> KeysValues | None:
        return None  # which slot it is, only the device knows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        keys, values = self.context.keys[layer], self.context.values[layer]
        keys.index_copy_(0, self.slot, k[0])
        values.index_copy_(0, self.slot, v[0])
        heads, groups = q.shape[2], keys.shape[1]
        # Queries of one key head side by side: backends that take a mask know no grouped heads.
        out = F.scaled_dot_product_attention(
            fold_groups(q, groups), keys[None].transpose(1, 2), values[None].transpose(1, 2), self.bias
        )
        return [unfold_groups(out, heads)]
