"""Attention against its definition, on every path that this machine has."""

from __future__ import annotations

import pytest
import torch

from lance_core import ops


def plain(q, k, v, causal):
    """Softmax attention head by head in float64."""
    heads, groups = q.shape[2], k.shape[2]
    queries, keys = q.shape[1], k.shape[1]
    out = torch.empty_like(q, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // groups)
        scores = q[:, :, head].double() @ k[:, :, group].double().transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            allowed = torch.arange(keys)[None] <= torch.arange(queries)[:, None] + keys - queries
            scores = scores.masked_fill(~allowed, -torch.inf)
        out[:, :, head] = scores.softmax(-1) @ v[:, :, group].double()
    return out


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys", "heads", "groups"), [(5, 5, 4, 2), (3, 9, 6, 3), (1, 7, 4, 1), (8, 8, 2, 2), (1, 1, 4, 2)])
def test_attention(monkeypatch, native, causal, queries, keys, heads, groups):
    if native and not ops.NATIVE_GROUPS:
        pytest.skip("this torch has no grouped heads of its own (before 2.5)")
    monkeypatch.setattr(ops, "NATIVE_GROUPS", native)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 8, generator=g) for n, h in ((queries, heads), (keys, groups), (keys, groups)))
    torch.testing.assert_close(ops.attention(q, k, v, causal), plain(q, k, v, causal).float(), atol=1e-5, rtol=1e-5)


def test_flash_attention_is_used_on_cuda_half(monkeypatch):
    calls = []

    def flash(q, k, v, causal):
        calls.append(causal)
        return q

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(ops, "flash_attn_func", flash)
    q = torch.randn(1, 2, 2, 8)
    ops.attention(q, q, q, True)
    assert not calls  # not on the CPU
    half = q.to(torch.bfloat16).as_subclass(OnCuda)
    ops.attention(half, half, half, True)
    assert calls == [True]
