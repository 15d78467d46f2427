"""The layers and the attention everything is built from: the one seam for a host, a weight format or a faster kernel.

A module takes `ops`, an object with the layer classes below, and never names torch.nn layers itself. ComfyUI's
`comfy.ops.manual_cast` has the same classes, so weights can be cast, offloaded and patched by the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from flash_attn import flash_attn_func  # optional, several times faster than some SDPA backends
except ImportError:
    flash_attn_func = None

# Rows of the markers of a guided step and fewer. Measured with MKL: 3.2 times as fast for 2 rows, 1.6 for 4, and from 6 on no more.
FEW_ROWS = 4 if torch.backends.mkl.is_available() else 0
NATIVE_GROUPS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 5)


class _NoInit:
    """Weights always come from a file, so the time torch spends on initialising them is saved."""

    def reset_parameters(self) -> None:
        return None


class TorchOps:
    """Plain torch layers: the default `ops`."""

    class Linear(_NoInit, nn.Linear):
        """x W^T + b."""

        def forward(self, x: Tensor) -> Tensor:
            return few_rows(x, self.weight, self.bias) if are_few(x) else super().forward(x)

    class Embedding(_NoInit, nn.Embedding):
        pass

    class Conv2d(_NoInit, nn.Conv2d):
        pass

    class Conv3d(_NoInit, nn.Conv3d):
        pass

    class RMSNorm(_NoInit, nn.RMSNorm):
        """Root-mean-square norm over the last axis; torch reduces it in float32 whatever the weights' dtype."""


def are_few(x: Tensor) -> bool:
    """Whether `few_rows` is the faster way: for a few rows of float32 on a CPU, which the library else multiplies one after the other."""
    return x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling() and 1 < x.numel() // x.shape[-1] <= FEW_ROWS


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x [..., in], as weight [out, in] times x's rows as columns."""
    rows = (weight @ x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    return (rows if bias is None else rows + bias).view(*x.shape[:-1], -1)


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
    # Of CUDA's backends only flash and cuDNN know grouped heads, and neither takes a mask or float32; the rest would expand the keys.
    native = NATIVE_GROUPS and not (q.is_cuda and (q.dtype == torch.float32 or (causal and queries != keys)))
    if heads != groups and not native:
        return _folded(q, k, v, causal)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = causal_mask(queries, keys, q.device) if causal and queries != keys else None
    grouped = {"enable_gqa": True} if heads != groups else {}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, **grouped).transpose(1, 2)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: query i sees keys up to keys - queries + i."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def fold_groups(q: Tensor, groups: int) -> Tensor:
    """Queries [b, n, heads, width] -> [b, groups, heads / groups * n, width]: heads that share a key head lie one after the other.

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
    mask = causal_mask(q.shape[1], k.shape[1], q.device).repeat(heads // groups, 1) if causal else None
    out = F.scaled_dot_product_attention(fold_groups(q, groups), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return unfold_groups(out, heads)
