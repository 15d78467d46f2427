"""Training is exact: every recorded batch of the released trainer, from token ids to gradients."""

from __future__ import annotations

import pytest
import torch
import training_cases as cases

from lance_core.training import loss
from lance_core.training.packed import Packed

BATCHES = [name for name, case in cases.CASES.items() if case["base"] == name]


@pytest.fixture(scope="module")
def experts():
    return cases.load_experts()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 5e-5 * expected.abs().max())


@pytest.mark.parametrize("name", BATCHES)
def test_ids_and_positions(name):
    """In reading order, which is the released one: start marker, visual tokens, end marker."""
    made, data = cases.batch(name), cases.tensors(name)
    packed = Packed.of(made.samples, 2, as_released=True)
    ids, places = [], []
    for sample in made.samples:
        sequence = sample.sequence.without_caption() if sample.caption_dropped else sample.sequence
        ids += sequence.token_ids()
        ids += sample.answer or [cases.checkpoint().tokenizer.im_end]  # after a target: never trained on
    in_order = packed.position[:, packed.order]
    at = 0
    for block in packed.blocks:
        span = in_order[:, block.start : block.stop]
        places.append(span if block.causal else torch.cat([span[:, :1], span[:, 2:], span[:, 1:2]], dim=1))
        at = block.stop
    assert at == in_order.shape[1]
    ends = _ends(made.samples)
    expected = data["position_ids"].long()
    kept = [i for i in range(expected.shape[1]) if i not in ends]
    assert ids == data["token_ids"].tolist()
    assert torch.equal(torch.cat(places, dim=1), expected[:, kept])


def _ends(samples) -> set[int]:
    """Places of the end tokens after targets, which our sequences leave out."""
    found, at = set(), 0
    for sample in samples:
        at += sample.length
        if not sample.answer:
            found.add(at)
            at += 1
    return found


@pytest.mark.parametrize("name", [n for n in BATCHES if "seen_keys" in cases.tensors(n)])
def test_blocks_are_the_recorded_mask(name):
    """How many keys every query sees; a block's markers are all alike to attention."""
    made = cases.batch(name)
    packed, ends = Packed.of(made.samples, 2, as_released=True), _ends(made.samples)
    recorded = cases.tensors(name)["seen_keys"].long()
    recorded = recorded[[i for i in range(len(recorded)) if i not in ends]]
    seen = [
        (i - block.first + 1) if block.causal else block.stop - block.first
        for block in packed.blocks
        for i in range(block.start, block.stop)
    ]
    assert seen == recorded.tolist()


@pytest.mark.parametrize("name", cases.CASES)
def test_losses_and_gradients(name, experts):
    case, data, made = cases.CASES[name], cases.tensors(name), cases.batch(name)
    weights = cases.parameters(experts)
    frozen = [n for n in weights if "moe_gen" not in n and n.startswith("language_model")]
    for one in weights:
        weights[one].grad = None
        weights[one].requires_grad_(not (name.endswith("freeze_und_params") and one in frozen))
    found = loss(
        experts,
        made.samples,
        made.noise,
        made.times,
        as_released=True,
        reweighted=name.endswith("reweighted"),
        detach_understanding=name.endswith("freeze_und"),
    )
    found.total.backward()
    for kind, mean in (("ce", case["ce"]), ("mse", case["mse"])):
        values = getattr(found, kind).detach()
        assert (len(values) > 0) == (f"{kind}_per_token" in data)
        if len(values):
            assert (
                close(values, data[f"{kind}_per_token"]) and abs(float(values.mean()) - mean) <= 1e-6 * mean
            )
    assert abs(float(found.total.detach()) - case["loss"]) <= 1e-6 * case["loss"]
    gradients = cases.gradients(weights)
    cases.check_gradients(gradients, data, case["gradients"])
    norms = data["gradient_norms"]
    for one, expected in zip(cases.MANIFEST["parameters"], norms.tolist(), strict=True):
        norm = float(gradients[one].norm())
        assert abs(norm - expected) <= 5e-5 * max(expected, 1e-4 * float(norms.max())), one


def test_recomputing_layers_changes_nothing(experts):
    made = cases.batch("packed_i2i_i2t")
    weights = cases.parameters(experts)
    results = []
    for checkpointing in (True, False):
        for weight in weights.values():
            weight.grad = None
        found = loss(experts, made.samples, made.noise, made.times, checkpointing=checkpointing)
        found.total.backward()
        results.append({n: w.grad.clone() for n, w in weights.items()})
    assert all(torch.equal(results[0][n], results[1][n]) for n in weights)
