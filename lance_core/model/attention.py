"""Grouped-query attention by the fastest kernel at hand: one function, which ComfyUI's own attention can
replace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from flash_attn import flash_attn_func  # optional, several times faster than some SDPA backends
except ImportError:
    flash_attn_func = None


NATIVE_GROUPS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 5)


# Entries of a causal mask at most (a long text behind a prefix is attended to in parts): 16 MiB as bool.
MASKED = 1 << 24

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Grouped-query attention; keys may be longer than queries, which then are the last of them.

    Args:
        q: [b, queries, heads, width].
        k, v: [b, keys, kv_heads, width], kv_heads dividing heads. They are never expanded.
        causal: query i sees keys up to keys - queries + i; otherwise every key.

    Returns: [b, queries, heads, width].
    """
    if flash_attn_func is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return flash_attn_func(q, k, v, causal=causal)
    queries, keys, heads, groups = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    causal = causal and queries > 1
    # Of CUDA's backends only flash and cuDNN know grouped heads, and neither takes a mask or float32; the
    # rest would expand the keys.
    native = NATIVE_GROUPS and not (q.is_cuda and (q.dtype == torch.float32 or (causal and queries != keys)))
    folded = heads != groups and not native
    if causal and (folded or queries != keys) and queries * keys > MASKED:
        parts = causal_parts(queries, keys, max(1, MASKED // keys))
        return torch.cat(
            [attention(q[:, some], k[:, :seen], v[:, :seen], True) for some, seen in parts], dim=1
        )
    if folded:
        return _folded(q, k, v, causal)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = causal_mask(queries, keys, q.device) if causal and queries != keys else None
    grouped = {"enable_gqa": True} if heads != groups else {}
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, **grouped
    ).transpose(1, 2)


def causal_parts(queries: int, keys: int, few: int) -> Iterator[tuple[slice, int]]:
    """The queries `few` at a time, each part with how many keys its last one sees: all but those of the
    queries that come after.
    """
    for start in range(0, queries, few):
        stop = min(start + few, queries)
        yield slice(start, stop), keys - queries + stop


@lru_cache(maxsize=2)
def causal_mask(queries: int, keys: int, device: torch.device, repeat: int = 1) -> Tensor:
    """bool [repeat * queries, keys]: query i sees keys up to keys - queries + i. Kept for the next layer."""
    with torch.inference_mode(False):  # autograd may want it, too
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        return mask.repeat(repeat, 1)


def fold_groups(q: Tensor, groups: int) -> Tensor:
    """Queries [b, n, heads, width] -> [b, groups, heads / groups * n, width]: heads that share a key head lie
    one after the other.

    So grouped heads need no expanded keys on a backend that knows nothing of them.
    """
    b, n, heads, width = q.shape
    return q.view(b, n, groups, heads // groups, width).permute(0, 2, 3, 1, 4).reshape(b, groups, -1, width)


def unfold_groups(out: Tensor, heads: int) -> Tensor:
    """The result of folded queries back to [b, n, heads, width]."""
    b, groups, _, width = out.shape
    return out.view(b, groups, heads // groups, -1, width).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _folded(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Grouped heads for backends that have none of their own."""
    heads, groups = q.shape[2], k.shape[2]
    mask = causal_mask(q.shape[1], k.shape[1], q.device, heads // groups) if causal else None
    out = F.scaled_dot_product_attention(
        fold_groups(q, groups), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return unfold_groups(out, heads)
