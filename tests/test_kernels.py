"""The Triton kernels: against the plain steps by Triton's interpreter, and where they are not used."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lance_core.model import kernels

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(600)
def test_every_kernel_gives_what_the_plain_steps_give():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    environment.pop("PYTEST_CURRENT_TEST", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout[-6000:]
    print(done.stdout.splitlines()[-1])


def test_a_cpu_takes_the_plain_steps(monkeypatch):
    with torch.inference_mode():
        assert not kernels.usable(torch.zeros(2))
        meta = torch.empty(2, device="meta")
        assert not kernels.usable(meta), "unless it is counted"
        with kernels.counted_on_meta(lambda *told: None):
            assert kernels.usable(meta) and not kernels.usable(meta.long())
        assert not kernels.usable(meta)
    with kernels.counted_on_meta(lambda *told: None), torch.enable_grad():
        assert not kernels.usable(meta), "autograd needs every step"


def test_a_weight_that_is_not_at_hand_leaves_the_plain_steps(monkeypatch):
    """Elsewhere (streamed), or to be cast or patched first, as ComfyUI's layers say."""
    norm = torch.nn.RMSNorm(8, device="meta")
    x = torch.empty(3, 8, device="meta")
    assert kernels.weight_of(norm, x) is norm.weight
    assert kernels.weight_of(norm, torch.zeros(3, 8)) is None
    norm.ready_weight = lambda: None
    assert kernels.weight_of(norm, x) is None
    with torch.inference_mode(), kernels.counted_on_meta(lambda *told: None):
        assert kernels.add_norm(x, x, norm) is None


def test_what_is_counted_is_what_is_read_and_written():
    told = []
    with torch.inference_mode(), kernels.counted_on_meta(lambda *one: told.append(one)):
        gate = torch.empty(3, 8, device="meta")
        out = kernels.silu_mul(gate, gate)
        norm = torch.nn.RMSNorm(8, device="meta")
        kernels.add_norm(gate, gate, norm)
    (name, read, written), (_, _, rewritten) = told
    assert name == "silu_mul" and len(read) == 2 and written[0] is out and out.shape == (3, 8)
    assert rewritten[1] is gate
