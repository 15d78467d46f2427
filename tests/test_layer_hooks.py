"""What a caller puts around the layers of a denoising step."""

from __future__ import annotations

import pytest
import torch
from golden_cases import GOLDEN

import lance_core
from lance_core.model.dual_expert import Plan, Row
from lance_core.model.sequence import Branch, Role, Sequence, TargetSegment, TextSegment

GRID = (1, 3, 4)


class Hooks:
    """Notes what it is given; leaves layers out, and scales what layers attended to."""

    def __init__(self, left_out: tuple[int, ...] = (), scale: dict[int, float] | None = None) -> None:
        self.left_out, self.scale = left_out, scale or {}
        self.around_seen: list = []
        self.attended_seen: list = []

    def around(self, index, und, gen, run):
        self.around_seen.append((index, tuple(und.shape), tuple(gen.shape)))
        return (und, gen) if index in self.left_out else run(und, gen)

    def attended(self, index, out, split):
        self.attended_seen.append((index, tuple(out.shape), split))
        out[:, split:] *= self.scale.get(index, 1.0)
        return out


@pytest.fixture(scope="module")
def model():
    return lance_core.load(GOLDEN / "checkpoint" / "Lance_3B", dtype=torch.float32).components.experts()


@pytest.fixture
def step(model):
    """velocity(**options) of two rows, both branches of one prompt."""
    context = (TextSegment(Role.TEMPLATE, (1, 2)), TextSegment(Role.CAPTION, (3, 4, 5)))
    plan = Plan.of(Sequence(context, TargetSegment(GRID), 6, 7, 8), 2.0, guided=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *GRID, 48, generator=generator)
    with torch.inference_mode():
        prepared = model.prefill(plan)
    rows = [Row(prepared, branch) for branch in Branch]

    def run(**options):
        with torch.inference_mode():
            return model.velocity(rows, x.clone(), torch.full((2, 1), 0.7), **options)

    return run


def test_hooks_that_change_nothing(model, step):
    hooks, config = Hooks(), model.config
    assert torch.equal(step(hooks=hooks), step())
    cells = GRID[1] * GRID[2]
    sizes = (2, 2, config.hidden_size), (2, cells, config.hidden_size)
    assert hooks.around_seen == [(i, *sizes) for i in range(config.num_layers)]
    heads = (2, 2 + cells, config.num_heads, config.head_dim)
    assert hooks.attended_seen == [(i, heads, 2) for i in range(config.num_layers)]


def test_a_layer_that_is_left_out_runs_no_attention(model, step):
    hooks = Hooks(left_out=(1,))
    assert not torch.allclose(step(hooks=hooks), step(), atol=1e-4)
    assert [i for i, *_ in hooks.attended_seen] == [i for i in range(model.config.num_layers) if i != 1]
    nothing = Hooks(left_out=tuple(range(model.config.num_layers)))
    assert not torch.allclose(step(hooks=nothing), step(hooks=hooks), atol=1e-4)


def test_what_a_layer_attended_to_can_be_changed(step):
    assert not torch.allclose(step(hooks=Hooks(scale={0: 0.5})), step(), atol=1e-4)


def test_an_attention_for_one_call(step, model):
    calls = []

    def counting(q, k, v, causal=False):
        calls.append(causal)
        return model.attention(q, k, v, causal)

    assert torch.equal(step(attention=counting), step())
    assert calls == [False] * 2 * model.config.num_layers
