"""Projections that share an input run as one product; files, LoRAs and messages know them apart."""

from __future__ import annotations

import copy

import pytest
import torch

from lance_core.checkpoint import Checkpoint, named_weights
from lance_core.convert import convert
from lance_core.decoder import JOINED, MLP, PIECE, SelfAttention, homes, join
from lance_core.tiny import LLM

APART = {part for parts in JOINED.values() for part in parts}


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_joined_projections_give_what_they_give_apart(dtype, tolerance, tokens):
    x = torch.randn(2, tokens, LLM.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    apart = filled(SelfAttention(LLM)).to(dtype), filled(MLP(LLM)).to(dtype)
    joined = [join(copy.deepcopy(module)) for module in apart]
    assert not APART & {name for module in joined for name, _ in module.named_modules()}
    for one, other in zip(apart[0].project(x), joined[0].project(x), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(apart[1](x), joined[1](x), rtol=tolerance, atol=tolerance)


def test_a_joined_feed_forward_in_pieces_gives_the_whole():
    module = join(filled(MLP(LLM)))
    x = torch.randn(1, PIECE + 3, LLM.hidden_size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x), module._piece(x), rtol=1e-6, atol=1e-6)


def test_joined_projections_can_be_trained():
    module, x = join(filled(MLP(LLM))).requires_grad_(True), torch.randn(1, 3, LLM.hidden_size)
    module(x).square().sum().backward()
    assert module.gate_up_proj.weight.grad.abs().sum(1).ne(0).all()


@pytest.mark.parametrize("part", ["und", "gen"])
def test_a_loaded_expert_is_joined_and_keeps_the_names_of_the_file(golden, part):
    checkpoint = Checkpoint(golden / "checkpoint" / "Lance_3B")
    module = checkpoint.load(part, dtype=torch.float32)
    names = dict(named_weights(module))
    assert names.keys() == checkpoint.parts[part].tensors.keys()
    assert len(homes(module)) == checkpoint.config.llm.num_layers * (3 * 2 + 2)
    assert checkpoint.count(part, module) == len(module.state_dict()) == len(list(module.parameters()))
    apart = checkpoint.build(part, dtype=torch.float32)
    assert {n: tuple(t.shape) for n, t in names.items()} == {n: tuple(t.shape) for n, t in apart.state_dict().items()}
    assert all(weight.is_contiguous() for weight in names.values())


def test_what_is_quantised_stays_apart(golden, tmp_path):
    convert(golden / "checkpoint" / "Lance_3B", tmp_path / "a.safetensors", "int8")
    checkpoint = Checkpoint(tmp_path / "a.safetensors")
    module = checkpoint.load("gen")
    quantised = {name.rpartition(".")[0] for name in checkpoint.parts["gen"].formats}
    assert quantised and not any(name.rpartition(".")[0].rpartition(".")[0] in quantised for name in homes(module))
    assert hasattr(module.layers[0].self_attn, "qkv_proj") and hasattr(module.layers[1].self_attn, "q_proj")
    assert dict(named_weights(module)).keys() == checkpoint.parts["gen"].tensors.keys()
