"""Optimiser steps, several ranks and LoRA gradients against the recorded ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_cases as cases
from safetensors.torch import load_file

from lance_core.checkpoint.quantize import FORMATS, QuantLinear
from lance_core.training import lora, loss, optimizer

CHANGES = {"steps_released": {}, "steps_fast": {}, "steps_cosine": {"total": 40, "least": 1e-5}}


@pytest.mark.parametrize("name", CHANGES)
def test_five_steps(name):
    run = cases.MANIFEST["steps"][name]
    told = run["optimizer"]
    schedule = optimizer.Schedule(
        told["lr"], told["schedule"], told["warmup_steps"], as_released=True, **CHANGES[name]
    )
    experts, made = cases.load_experts(), cases.batch(run["batch"])
    weights = cases.parameters(experts)
    start = {n: w.detach().clone() for n, w in weights.items()}
    chosen = optimizer.optimizer(weights, as_released=True)
    for i, expected in enumerate(run["steps"]):
        found = loss(experts, made.samples, made.noise, made.times, as_released=True)
        assert abs(float(found.total.detach()) - expected["loss"]) <= 1e-6 * expected["loss"]
        assert abs(float(found.ce.detach().mean()) - expected["ce"]) <= 2e-6 * expected["ce"]
        assert abs(float(found.mse.detach().mean()) - expected["mse"]) <= 2e-6 * expected["mse"]
        if "lr" not in expected:
            continue
        assert schedule.at(i) == pytest.approx(expected["lr"], rel=1e-12)
        found.total.backward()
        norm = optimizer.step(chosen, weights, schedule.at(i), told["max_grad_norm"])
        assert norm == pytest.approx(expected["grad_norm_before_clip"], rel=5e-6)
    if name == "steps_released":
        return  # its updates are below what float32 can tell
    for one, expected in load_file(cases.FOLDER / f"{name}.safetensors").items():
        kept = cases.places(start[one].numel())
        moved = expected - start[one].flatten()[kept]
        error = (weights[one].detach().flatten()[kept] - expected).abs().max()
        assert error <= 1e-3 * moved.abs().max(), one


@pytest.mark.parametrize("kind", ["", "sharded"])
def test_two_ranks(tmp_path, kind):
    """Each rank's loss, and the gradient averaged over both, by gloo; whole weights on both, or halves."""
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1"}
    outs = [tmp_path / f"{rank}.safetensors" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(here / "two_ranks.py"),
                str(rank),
                str(tmp_path / "meeting"),
                str(out),
                kind,
            ],
            env=env,
            stderr=subprocess.PIPE,
        )
        for rank, out in enumerate(outs)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]
    recorded = cases.tensors("two_ranks")
    for out, expected in zip(outs, cases.MANIFEST["two_ranks"], strict=True):
        found = load_file(out)
        assert abs(float(found["loss"]) - expected["loss"]) <= 1e-6 * expected["loss"]
        assert found["totals"].tolist() == [expected["total_ce_tokens"], expected["total_mse_tokens"]]
        assert found["own"].tolist() == [expected["own_ce_tokens"], expected["own_mse_tokens"]]
        gradients = {n.removeprefix("grad."): g for n, g in found.items() if n.startswith("grad.")}
        cases.check_gradients(gradients, recorded, cases.MANIFEST["two_ranks_gradients"])


@pytest.mark.parametrize("which", ["generation", "understanding", "both"])
def test_lora_gradients_follow_from_the_full_ones(which):
    """At B = 0: dB = s dW A^T, dA = 0."""
    made = cases.batch("packed_all_six")
    full = cases.load_experts()
    loss(full, made.samples, made.noise, made.times).total.backward()
    experts = cases.load_experts(trainable=False)
    adapters = lora.attach(experts, which, rank=4, alpha=8, seed=3)
    assert len(adapters) == 7 * 3 * (2 if which == "both" else 1)
    loss(experts, made.samples, made.noise, made.times).total.backward()
    for name, adapter in adapters.items():
        side, path = (full.und, name.removeprefix("understanding.")) if "und" in name else (full.gen, name)
        whole = side.get_submodule(path).weight.grad
        whole = torch.zeros_like(side.get_submodule(path).weight) if whole is None else whole
        expected = 2 * whole @ adapter.lora_A.T
        assert (adapter.lora_B.grad - expected).abs().max() <= 5e-5 * expected.abs().max(), name
        assert not adapter.lora_A.grad.any()
    trained = {id(w) for w in lora.trained(adapters).values()}
    others = [w for m in (experts.und, experts.gen) for w in m.parameters() if id(w) not in trained]
    assert all(w.grad is None for w in others)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_a_quantised_base_stays_quantised(format):
    """The gradient is that of the dequantised weights, and the base keeps its few bits."""
    base = torch.nn.Linear(128, 96)
    encoded = FORMATS[format].encode(base.weight.detach())
    layer = QuantLinear(FORMATS[format], 128, 96, True)
    for name, value in encoded.items():
        getattr(layer, name).data = value
    layer.bias.data = base.bias.detach().clone()
    base.weight.data = FORMATS[format].decode(encoded, torch.float32)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    results = []
    for inner in (layer, base.requires_grad_(False)):
        adapter = lora.LoraLinear(inner, 4, 4, torch.Generator().manual_seed(1))
        with torch.no_grad():
            adapter.lora_B.fill_(0.1)
        given = x.clone().requires_grad_()
        out = adapter(given)
        out.square().sum().backward()
        results.append((out.detach(), given.grad, adapter.lora_A.grad, adapter.lora_B.grad))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-4) for a, b in zip(*results, strict=True))
    assert layer.weight.dtype in (torch.int8, torch.float8_e4m3fn)
