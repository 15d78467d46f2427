"""Projections that share an input run as one product; files, LoRAs and messages know them apart."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import lance_core
from lance_core import RequestError
from lance_core.checkpoint.checkpoint import Checkpoint
from lance_core.checkpoint.convert import convert
from lance_core.checkpoint.tiny import LLM
from lance_core.model import rope
from lance_core.model.compiling import check_compiler
from lance_core.model.decoder import CPU_FEED_CHUNK, MLP, ExpertLayer, SelfAttention, add_attention
from lance_core.model.dual_expert import Plan, Row
from lance_core.model.joined import JOINED, JoinedLinear, joined_rows, named_weights
from lance_core.model.ops import TorchOps
from lance_core.model.sequence import Branch, Role, Sequence, TargetSegment, TextSegment
from lance_core.model.token_loop import TokenLoop

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
    apart = [filled(kind(LLM, joined=False)).to(dtype) for kind in (SelfAttention, MLP)]
    joined = [kind(LLM, dtype=dtype) for kind in (SelfAttention, MLP)]
    for one, other in zip(apart, joined, strict=True):
        other.load_state_dict(one.state_dict())  # by the names that projections have apart
    assert not APART & {name for module in joined for name, _ in module.named_modules()}
    for one, other in zip(apart[0].project(x), joined[0].project(x), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(apart[1](x), joined[1](x), rtol=tolerance, atol=tolerance)


def test_a_long_sequence_goes_through_in_pieces_and_comes_out_the_same():
    layer, generator = filled(ExpertLayer(LLM)), torch.Generator().manual_seed(1)
    x = torch.randn(2, CPU_FEED_CHUNK + 3, LLM.hidden_size, generator=generator)
    heads = torch.randn(2, CPU_FEED_CHUNK + 3, LLM.num_heads, LLM.head_dim, generator=generator)
    with torch.no_grad():
        whole, normed = add_attention(layer, x.clone(), heads)
        whole = whole + layer.mlp(normed)
        torch.testing.assert_close(layer.finish(x.clone(), heads), whole, rtol=1e-6, atol=1e-6)


def test_heads_are_rotated_alike_in_pieces_and_whole():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, rope.CPU_ROPE_CHUNK + 3, 2, 8, generator=generator)
    angles = torch.randn(1, rope.CPU_ROPE_CHUNK + 3, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)
    out = torch.empty_like(x)
    rope.rotate_into(out, x, cos, sin)
    torch.testing.assert_close(out, x * cos[:, :, None] + turned * sin[:, :, None])


def test_joined_projections_can_be_trained():
    module, x = filled(MLP(LLM)).requires_grad_(True), torch.randn(1, 3, LLM.hidden_size)
    module(x).square().sum().backward()
    assert module.gate_up_proj.weight.grad.abs().sum(1).ne(0).all()


@pytest.mark.parametrize("part", ["und", "gen"])
def test_a_loaded_expert_is_joined_and_keeps_the_names_of_the_file(golden, part):
    checkpoint = Checkpoint(golden / "checkpoint" / "Lance_3B")
    module = checkpoint.load(part, dtype=torch.float32)
    names = dict(named_weights(module))
    assert names.keys() == checkpoint.parts[part].tensors.keys()
    assert len(joined_rows(module)) == checkpoint.config.llm.num_layers * (3 * 2 + 2)
    assert checkpoint.count(part, module) == len(module.state_dict()) == len(list(module.parameters()))
    apart = checkpoint.build(part, dtype=torch.float32, joined=False)
    assert {n: tuple(t.shape) for n, t in names.items()} == {
        n: tuple(t.shape) for n, t in apart.state_dict().items()
    }
    assert all(weight.is_contiguous() for weight in names.values())


def test_what_is_quantised_stays_apart(golden, tmp_path):
    convert(golden / "checkpoint" / "Lance_3B", tmp_path / "a.safetensors", "int8")
    checkpoint = Checkpoint(tmp_path / "a.safetensors")
    module = checkpoint.load("gen")
    quantised = {name.rpartition(".")[0] for name in checkpoint.parts["gen"].formats}
    assert quantised and not any(
        name.rpartition(".")[0].rpartition(".")[0] in quantised for name in joined_rows(module)
    )
    assert hasattr(module.layers[0].self_attn, "qkv_proj") and hasattr(module.layers[1].self_attn, "q_proj")
    assert dict(named_weights(module)).keys() == checkpoint.parts["gen"].tensors.keys()


@pytest.mark.parametrize("part", ["und", "gen"])
def test_an_expert_can_be_loaded_apart_as_training_wants_it(golden, part):
    checkpoint = Checkpoint(golden / "checkpoint" / "Lance_3B")
    apart = checkpoint.load(part, dtype=torch.float32, joined=False)
    assert apart.state_dict().keys() == checkpoint.parts[part].tensors.keys()
    assert not any(isinstance(module, JoinedLinear) for module in apart.modules())
    joined = checkpoint.load(part, dtype=torch.float32)
    for name, weight in named_weights(joined):
        assert torch.equal(weight, apart.state_dict()[name])
    empty = checkpoint.build(part, device="cpu", dtype=torch.float32)
    empty.load_state_dict(dict(named_weights(joined)))  # saved under the file's names, and back
    assert all(torch.equal(a, b) for a, b in zip(empty.parameters(), joined.parameters(), strict=True))


def test_a_joined_layer_without_one_of_its_projections_is_refused():
    state = filled(MLP(LLM, joined=False)).state_dict()
    del state["up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_up_proj[\s\S]*Unexpected key.*gate_proj"):
        MLP(LLM).load_state_dict(state)


def test_a_joined_layer_is_of_the_kind_it_was_asked_for():
    """So that ComfyUI's layers cast and stream it, and a copy keeps its rows."""
    layer = copy.deepcopy(SelfAttention(LLM, ops=TorchOps).qkv_proj)
    assert isinstance(layer, JoinedLinear) and isinstance(layer, TorchOps.Linear)
    assert list(layer.rows) == ["q_proj", "k_proj", "v_proj"]
    assert [rows.stop - rows.start for rows in layer.rows.values()] == [
        heads * LLM.head_dim for heads in (LLM.num_heads, LLM.num_kv_heads, LLM.num_kv_heads)
    ]


# -- compiled, and with steps of one shape -------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler():
    """Skips, aloud, where torch.compile has nothing to compile with."""
    try:
        check_compiler(torch.device("cpu"))
    except RequestError as error:
        pytest.skip(str(error))


def test_compiled_layers_give_what_plain_ones_give_and_are_compiled_once(golden, compiler):
    folder = golden / "checkpoint" / "Lance_3B"
    plain, fast = (lance_core.load(folder, dtype=torch.float32, compile=compile) for compile in (False, True))
    photo = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for prompt, width, height, batch in (
        ("a", 64, 96, 2),
        ("quite another, longer prompt", 96, 64, 1),
        ("b", 128, 64, 3),
    ):
        size = {"width": width, "height": height, "batch_size": batch, "steps": 2}
        one, other = (lance.generate("t2i", prompt, **size).latent for lance in (plain, fast))
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    answers = [
        lance.understand("What?", image=photo, resolution="image_256res", max_new_tokens=4).token_ids
        for lance in (plain, fast)
    ]
    assert answers[0] == answers[1]
    assert graphs[0] > 0 and graphs[-1] <= graphs[0] + 3, f"compiled anew for other sizes: {graphs}"


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@torch.inference_mode()
def test_no_weight_is_copied_for_a_batch(golden, request, compile):
    """What torch does to multiply rows it cannot join; a guided step became seven times as slow by it."""
    if compile:
        request.getfixturevalue("compiler")
    model = lance_core.load(
        golden / "checkpoint" / "Lance_3B", dtype=torch.float32, compile=compile
    ).components.experts()
    text, target = (
        TextSegment(Role.CAPTION, tuple(range(5, 25))),
        TargetSegment((1, 4, 6)),
    )
    sequence = Sequence((text,), target, 0, 1, 2)
    prepared = model.prefill(Plan.of(sequence, 2.0, guided=True))
    rows, x, t = (
        [Row(prepared, b) for b in Branch],
        torch.randn(2, 1, 4, 6, 48),
        torch.full((2, 1), 0.5),
    )
    model.velocity(rows, x, t)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as recorded:
        model.velocity(rows, x, t)
    names = [event.name for event in recorded.events()]
    assert names.count("aten::mm") + names.count("aten::addmm") >= 2 * LLM.num_layers * 4
    widest = LLM.hidden_size * LLM.intermediate_size
    copied = [
        event.input_shapes[0]
        for event in recorded.events()
        if event.name == "aten::copy_" and event.input_shapes
    ]
    assert (
        copied
        and not [shape for shape in copied if torch.Size(shape).numel() >= widest]
        and "aten::bmm" not in names
    )


def test_nothing_to_compile_with_is_told_before_loading(golden, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler found\nat length")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RequestError, match=r"no compiler found\); leave it off"):
        lance_core.load(golden / "checkpoint" / "Lance_3B", compile=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.inference_mode()
def test_a_loop_of_one_shape_writes_what_the_plain_one_writes(golden, dtype, tolerance):
    model = lance_core.load(golden / "checkpoint" / "Lance_3B", dtype=dtype).components.experts(
        generation=False
    )
    sequence = Sequence((TextSegment(Role.CAPTION, tuple(range(5, 25))),), None, 0, 1, 2)
    loops = []
    for fixed in (False, True):
        context, _, position = model.read(sequence, 2.0, 6)
        for buffer in (*context.keys, *context.values):  # what memory nobody has written may hold
            buffer[20:] = float("nan")
        loops.append(TokenLoop(model, context, position, fixed))
    for token in (3, 9, 4, 4, 250, 17):
        one, other = (loop(token).clone() for loop in loops)
        assert bool(torch.isfinite(one).all())
        assert float((one - other).norm() / one.norm()) < tolerance
    assert [loop.context.prefix.filled for loop in loops] == [26, 26]
    for loop in loops:
        with pytest.raises(ValueError, match="6 tokens fit"):
            loop(1)


@torch.inference_mode()
def test_a_loop_goes_on_as_one_pass_over_everything_would(golden):
    """The logits after a written token are those of a prompt that ends with it."""
    model = lance_core.load(golden / "checkpoint" / "Lance_3B", dtype=torch.float32).components.experts(
        generation=False
    )
    ids = tuple(range(5, 25))
    said = [3, 9, 4]

    def read(ids, room):
        return model.read(Sequence((TextSegment(Role.CAPTION, ids),), None, 0, 1, 2), 2.0, room)

    context, _, position = read(ids, len(said))
    loop = TokenLoop(model, context, position)
    for i, token in enumerate(said):
        torch.testing.assert_close(loop(token), read((*ids, *said[: i + 1]), 0)[1], rtol=1e-4, atol=1e-5)


class Recording(TorchDispatchMode):
    """A stand-in for a CUDA graph: runs the operations again that it has seen, on the same tensors, with
    nothing of Python's between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = {
            t.untyped_storage().data_ptr()
            for t in tree_flatten((args, kwargs))[0]
            if isinstance(t, torch.Tensor)
        }
        new = [
            t
            for t in tree_flatten(out)[0]
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in places
        ]
        self.seen.append((func, args, kwargs or {}, new))
        return out

    def replay(self) -> None:
        for func, args, kwargs, new in self.seen:
            found = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, torch.Tensor)]
            for place, value in zip(new, found if new else (), strict=True):
                place.copy_(value)


@torch.inference_mode()
def test_a_step_can_be_recorded_and_run_again(golden, monkeypatch):
    """Nothing that changes from step to step may be a number of Python's, or stand in a tensor that only this
    step has.
    """
    model = lance_core.load(golden / "checkpoint" / "Lance_3B", dtype=torch.float32).components.experts(
        generation=False
    )
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda x: x if isinstance(x, Recording) else nullcontext())
    for name, made in (("Stream", stream), ("current_stream", stream)):
        monkeypatch.setattr(torch.cuda, name, lambda made=made: made)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    sequence = Sequence((TextSegment(Role.CAPTION, tuple(range(5, 25))),), None, 0, 1, 2)
    loops = []
    for fixed in (False, True):
        context, _, position = model.read(sequence, 2.0, 8)
        loops.append(TokenLoop(model, context, position, fixed))
    assert loops[1].recorded is None  # on a CPU
    loops[1].recorded = loops[1]._record()
    monkeypatch.setattr(loops[1], "_fixed", lambda: pytest.fail("not replayed"))
    for token in (3, 9, 4, 4, 250, 17, 8, 1):
        one, other = (loop(token).clone() for loop in loops)
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: recording a graph was not tested")
@torch.inference_mode()
def test_a_recorded_loop_writes_what_the_plain_one_writes(golden):
    lance = lance_core.load(golden / "checkpoint" / "Lance_3B", device="cuda", dtype=torch.float32)
    model = lance.components.experts(generation=False)
    sequence = Sequence((TextSegment(Role.CAPTION, tuple(range(5, 25))),), None, 0, 1, 2)
    loops = []
    for fixed in (False, True):
        context, _, position = model.read(sequence, 2.0, 8)
        loops.append(TokenLoop(model, context, position, fixed))
    for token in (3, 9, 4, 4, 250, 17, 8, 1):
        one, other = (loop(token).clone() for loop in loops)
        assert float((one - other).norm() / one.norm()) < 1e-4
