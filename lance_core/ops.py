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


class _NoInit:
    """Weights always come from a file, so the time torch spends on initialising them is saved."""

    def reset_parameters(self) -> None:
        return None


class TorchOps:
    """Plain torch layers: the default `ops`."""

    class Linear(_NoInit, nn.Linear):
        pass

    class Embedding(_NoInit, nn.Embedding):
        pass

    class Conv2d(_NoInit, nn.Conv2d):
        pass

    class Conv3d(_NoInit, nn.Conv3d):
        pass

    class RMSNorm(_NoInit, nn.RMSNorm):
        """Root-mean-square norm over the last axis, reduced in float32 whatever the weights' dtype."""

        def forward(self, x: Tensor) -> Tensor:
            return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, reduced in float32 and returned in x's dtype (Zhang & Sennrich 2019)."""
    return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight


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
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if causal and queries > 1 and queries != keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and queries == keys and queries > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
