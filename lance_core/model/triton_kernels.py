"""Triton kernels for what lies between the matrix products. Imported by kernels.py, only where Triton is.

Each does in one pass over memory what the plain path does in several, and rounds where that rounds: the
results differ by the order of a sum at most. A program works on whole rows; widths are padded to a power of
two and masked.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu_mul(gate, up, out, inner, gate_stride, up_stride, out_stride, BLOCK: tl.constexpr):
    """out = silu(gate) * up over rows of `inner` numbers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0)
    wide = g.to(tl.float32)
    gated = (wide / (1.0 + tl.exp(-wide))).to(g.dtype).to(tl.float32)
    tl.store(out + row * out_stride + at, (gated * u.to(tl.float32)).to(g.dtype), mask=inside)


@triton.jit
def add_norm(x, add, weight, normed, width, eps, x_stride, add_stride, BLOCK: tl.constexpr):
    """x += add; normed = the RMS norm of x times weight. normed has contiguous rows."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    old = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    more = tl.load(add + row * add_stride + at, mask=inside, other=0.0)
    new = (old.to(tl.float32) + more.to(tl.float32)).to(old.dtype)
    tl.store(x + row * x_stride + at, new, mask=inside)
    wide = new.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + at, (wide * scale * w).to(old.dtype), mask=inside)


@triton.jit
def _norm_rope_heads(
    source, target, weight, cos_low, sin_low, eps, heads, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """One token's heads, [heads, 2 HALF] contiguous: RMS norm of each, then the rotation of its halves."""
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < HALF)
    place = head * (2 * HALF) + at
    low = tl.load(source + place, mask=inside, other=0.0)
    high = tl.load(source + place + HALF, mask=inside, other=0.0)
    a, b = low.to(tl.float32), high.to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
    a = (a * scale * tl.load(weight + at).to(tl.float32)).to(low.dtype).to(tl.float32)
    b = (b * scale * tl.load(weight + HALF + at).to(tl.float32)).to(low.dtype).to(tl.float32)
    tl.store(target + place, (a * cos_low - b * sin_low).to(low.dtype), mask=inside)
    tl.store(target + place + HALF, (b * cos_low + a * sin_low).to(low.dtype), mask=inside)


@triton.jit
def norm_rope(
    q, k, v, q_weight, k_weight, cos, sin, q_out, k_out, v_out, eps, tokens, heads, kv_heads,
    q_row, k_row, v_row, table_batch, table_row,
    q_batch, q_token, k_batch, k_token, v_batch, v_token,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token: norm and rotate its queries and keys, copy its values, each to its own place.

    q, k, v: rows of all tokens of all results; *_out: [batch, token] strides, heads contiguous; cos, sin:
    float32 tables that repeat themselves after HALF.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    at = tl.arange(0, HALF)[None, :]
    table = batch * table_batch + token * table_row
    c, s = tl.load(cos + table + at), tl.load(sin + table + at)
    _norm_rope_heads(
        q + row * q_row, q_out + batch * q_batch + token * q_token, q_weight, c, s, eps, heads, HEADS, HALF
    )
    _norm_rope_heads(
        k + row * k_row, k_out + batch * k_batch + token * k_token, k_weight, c, s, eps, kv_heads, KV_HEADS,
        HALF,
    )  # fmt: skip
    whole = tl.arange(0, KV_HEADS)[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    inside = whole < kv_heads * (2 * HALF)
    values = tl.load(v + row * v_row + whole, mask=inside, other=0.0)
    tl.store(v_out + batch * v_batch + token * v_token + whole, values, mask=inside)


@triton.jit
def channel_norm_silu(
    x, gamma, out, points, channels, factor, x_batch, out_batch,
    SILU: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Points of `channels` contiguous numbers: x times factor over its length, times gamma, through SiLU."""
    batch = tl.program_id(1).to(tl.int64)
    point = (tl.program_id(0) * POINTS + tl.arange(0, POINTS)).to(tl.int64)[:, None]
    at = tl.arange(0, CHANNELS)[None, :]
    inside = (point < points) & (at < channels)
    place = point * channels + at
    given = tl.load(x + batch * x_batch + place, mask=inside, other=0.0)
    wide = given.to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), 1e-12)[:, None]
    y = (wide * (factor / length)).to(given.dtype)
    g = tl.load(gamma + at, mask=at < channels, other=0.0).to(given.dtype)
    y = (y.to(tl.float32) * g.to(tl.float32)).to(given.dtype)
    if SILU:
        w = y.to(tl.float32)
        y = (w / (1.0 + tl.exp(-w))).to(given.dtype)
    tl.store(out + batch * out_batch + place, y, mask=inside)
