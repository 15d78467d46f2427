"""Triton's kernels against the plain steps, on a CPU by its interpreter. Run by tests/test_kernels.py in a
process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import golden_cases

import lance_core
from lance_core.model import kernels, triton_kernels
from lance_core.model.ops import TorchOps
from lance_core.model.rope import rotate_into
from lance_core.vae.streaming import ChannelNorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A unit in the last place where sums differ; three for bfloat16, which the interpreter cuts off instead of
# rounding, up to three times.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 3 * 2**-7, torch.float16: 2**-9}

pytestmark = pytest.mark.usefixtures("no_autograd")


@pytest.fixture
def no_autograd():
    with torch.inference_mode():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=CLOSE[wanted.dtype], atol=CLOSE[wanted.dtype])


def test_the_interpreter_is_used():
    assert kernels.usable(random(2)) and not kernels._broken
    with torch.inference_mode(False), torch.enable_grad():
        assert not kernels.usable(random(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), [(1, 7), (5, 1024), (3, 1500)])
def test_silu_mul(dtype, rows, inner):
    joined = random(rows, 2 * inner, dtype=dtype)
    gate, up = joined.chunk(2, -1)
    found = kernels.silu_mul(gate, up)
    close(found, F.silu(gate) * up)
    close(kernels.silu_mul(gate.contiguous(), up), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100])
def test_add_norm(dtype, width):
    x, add = random(2, 3, width, dtype=dtype), random(2, 3, width, dtype=dtype) * 2
    norm = TorchOps.RMSNorm(width, eps=1e-6, dtype=dtype)
    norm.weight.copy_(random(width))
    summed = x + add
    found = kernels.add_norm(x, add, norm)
    close(x, summed)
    close(found, norm(summed))
    sliced = random(2, 3, width, dtype=dtype)[:, 1:]
    assert kernels.add_norm(sliced, sliced, norm) is None, "rows that are apart are left to the plain path"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (3, 1, 32), (2, 2, 8)])
@pytest.mark.parametrize("joined", [True, False])
def test_norm_rope(dtype, heads, kv_heads, width, joined):
    b, n = 2, 5
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    projected = list(random(b, n, sum(sizes), dtype=dtype).split(sizes, -1))
    if not joined:
        projected = [t.contiguous() for t in projected]
    norms = [TorchOps.RMSNorm(width, eps=1e-6, dtype=dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.copy_(random(width) + 1)
    for tables in (1, b):
        angles = random(tables, n, width // 2).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        room = [torch.full((b, n + 3, h, width), 9.0, dtype=dtype) for h in (heads, kv_heads, kv_heads)]
        wanted = [t.clone() for t in room]
        assert kernels.norm_rope(projected, norms, cos, sin, [t[:, 2 : 2 + n] for t in room])
        q, k, v = (t.unflatten(-1, (-1, width)) for t in projected)
        rotate_into(wanted[0][:, 2 : 2 + n], norms[0](q), cos, sin)
        rotate_into(wanted[1][:, 2 : 2 + n], norms[1](k), cos, sin)
        wanted[2][:, 2 : 2 + n] = v
        for one, other in zip(room, wanted, strict=True):
            close(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("silu", [True, False])
def test_channel_norm_silu(dtype, channels, silu):
    norm = ChannelNorm(channels, 3, dtype=dtype)
    norm.gamma.copy_(random(channels, 1, 1, 1) + 1)
    x = random(2, channels, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    x[0, :, 0, 0, 0] = 0
    room = torch.full((2, channels, 5, 4, 5), 9.0, dtype=dtype).contiguous(
        memory_format=torch.channels_last_3d
    )
    assert kernels.channel_norm_silu(x, norm.gamma, room[:, :, 2:], silu)
    plain = x.float() / x.float().norm(dim=1, keepdim=True).clamp_min(1e-12) * channels**0.5
    plain = (plain.to(dtype) * norm.gamma).to(dtype)
    close(room[:, :, 2:], F.silu(plain) if silu else plain)
    assert (room[:, :, :2] == 9).all()
    other = x.contiguous(memory_format=torch.contiguous_format)
    assert not kernels.channel_norm_silu(other, norm.gamma, room[:, :, 2:], silu)


@pytest.mark.parametrize("name", golden_cases.DRAWN[:2])
def test_a_golden_picture_is_drawn_by_the_kernels(name, monkeypatch):
    """The golden request through the kernels, and through the plain steps: latents within rounding, and the
    kernels were really run.
    """
    case = golden_cases.MANIFEST[name]
    task, text, options = golden_cases.request_of(case)
    folder = golden_cases.GOLDEN / "checkpoint" / case["checkpoint"]
    ran: list[str] = []
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda kind, *a, **kw: ran.append(kind) or launch(kind, *a, **kw))
    lance = lance_core.load(folder, dtype=torch.float32, device="cpu")
    fused = lance.generate(task, text, **options | {"steps": 2})
    assert {"norm_rope", "add_norm", "silu_mul"} <= set(ran)
    monkeypatch.setattr(kernels, "_broken", True)
    plain = lance.generate(task, text, **options | {"steps": 2})
    away = (fused.latent - plain.latent).abs().max() / plain.latent.abs().max()
    assert 0 < away < 1e-5


def test_a_kernel_that_cannot_be_built_switches_all_off_with_one_warning(monkeypatch, caplog):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(triton_kernels, "silu_mul", Broken())
    gate = random(3, 8)
    assert kernels.silu_mul(gate, gate) is None
    assert not kernels.usable(gate)
    assert len(caplog.records) == 1 and "silu_mul fails here (no C compiler)" in caplog.text
    monkeypatch.setattr(kernels, "_broken", False)
