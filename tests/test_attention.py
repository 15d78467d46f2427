"""Attention against its definition, on every path that this machine has."""

from __future__ import annotations

import pytest
import torch

from lance_core.model import attention as module
from lance_core.model import ops


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
@pytest.mark.parametrize("most", [1, 9, 40, 75])
def test_a_long_text_behind_a_prefix_is_attended_to_in_parts(monkeypatch, native, most):
    """No causal mask has more than MASKED entries; the parts together are the whole."""
    if native and not module.NATIVE_GROUPS:
        pytest.skip("this torch has no grouped heads of its own (before 2.5)")
    monkeypatch.setattr(module, "NATIVE_GROUPS", native)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 8, generator=g) for n, h in ((7, 4), (11, 2), (11, 2)))
    sizes = []
    made = module.causal_mask
    monkeypatch.setattr(module, "causal_mask", lambda a, b, *more: sizes.append((a, b)) or made(a, b, *more))
    monkeypatch.setattr(module, "MASKED", most)
    torch.testing.assert_close(
        module.attention(q, k, v, True).double(), plain(q, k, v, True), rtol=1e-5, atol=1e-5
    )
    assert all(a * b <= most for a, b in sizes) and len(sizes) >= (most >= 22)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups"),
    [(5, 5, 4, 2), (3, 9, 6, 3), (1, 7, 4, 1), (8, 8, 2, 2), (1, 1, 4, 2)],
)
def test_attention(monkeypatch, native, causal, queries, keys, heads, groups):
    if native and not module.NATIVE_GROUPS:
        pytest.skip("this torch has no grouped heads of its own (before 2.5)")
    monkeypatch.setattr(module, "NATIVE_GROUPS", native)
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, h, 8, generator=g) for n, h in ((queries, heads), (keys, groups), (keys, groups))
    )
    torch.testing.assert_close(
        module.attention(q, k, v, causal), plain(q, k, v, causal).float(), atol=1e-5, rtol=1e-5
    )


def test_flash_attention_is_used_on_cuda_half(monkeypatch):
    calls = []

    def flash(q, k, v, causal):
        calls.append(causal)
        return q

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(module, "flash_attn_func", flash)
    q = torch.randn(1, 2, 2, 8)
    module.attention(q, q, q, True)
    assert not calls  # not on the CPU
    half = q.to(torch.bfloat16).as_subclass(OnCuda)
    module.attention(half, half, half, True)
    assert calls == [True]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="few rows take the plain way without MKL")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 5), (2, 5), (1, 2, 5), (2, 2, 5), (4, 1, 5), (5, 5), (3, 2, 5), (0, 5)], ids=str
)
def test_few_rows_are_multiplied_as_columns(monkeypatch, shape, bias):
    g = torch.Generator().manual_seed(0)
    layer = ops.TorchOps.Linear(5, 7, bias=bias)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g)
    x, calls = torch.randn(shape, generator=g), []
    monkeypatch.setattr(ops, "few_rows", lambda *args, few=ops.few_rows: (calls.append(1), few(*args))[1])
    out = layer(x)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert out.is_contiguous() and bool(calls) == (2 <= x.numel() // 5 <= ops.FEW_ROWS == 4)
    calls.clear()
    layer.bfloat16()(x.bfloat16())
    assert not calls  # the half-precision library has no such weakness
    if x.numel():
        layer.float()(x.requires_grad_()).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(shape).detach())
