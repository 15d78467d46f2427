"""Contexts: computed in the call that needs them, kept while the run lasts, and for that model alone."""

from __future__ import annotations

import gc

import pytest
import torch
from small import edit, module, t2i


@pytest.fixture
def made(comfy, monkeypatch):
    """The contexts that are computed."""
    context = module(comfy, "lance_core.model.kv_cache").Context
    init, made = context.__init__, []
    monkeypatch.setattr(context, "__init__", lambda self, *a, **k: made.append(self) or init(self, *a, **k))
    return made


@pytest.fixture
def loaded(comfy, monkeypatch):
    """(contexts module, the MODEL ready for calls, its positive and negative)."""
    model, positive, negative = comfy.run(t2i(), [("loader", 0), ("text", 0), ("text", 1)]).values
    model.model.current_patcher = model
    # One of its own: the error of a job that failed before may still hold on to that job's.
    monkeypatch.setattr(model.model, "store", module(comfy, "nodes.contexts").Store())
    yield module(comfy, "nodes.contexts"), model.model, positive[0][1]["lance"], negative[0][1]["lance"]
    model.model.current_patcher = None


def rows(loaded, *prompts, grid=(1, 4, 4), owner=None, weights=None):
    contexts, model, *_ = loaded
    first, *others = (contexts.RowsCond.of(model.store, prompt, True) for prompt in prompts)
    cond = first.concat(others)
    experts = model.experts(torch.device("cpu"), {})
    return cond, lambda **changed: cond.rows(
        experts,
        changed.get("owner", owner or model),
        contexts.Place(changed.get("grid", grid)),
        changed.get("weights", weights),
    )


@torch.inference_mode()
def test_both_branches_of_an_encode_share_one_and_calls_find_it_again(loaded, made):
    _, _, positive, negative = loaded
    cond, run = rows(loaded, positive, negative)
    first, again = run(), run()
    assert len(made) == 1
    assert first.rows[0].prepared is first.rows[1].prepared is again.rows[0].prepared
    assert [row.branch for row in first.per_row(4)] == [positive.branch] * 2 + [negative.branch] * 2
    assert cond.size()[-1] == positive.encoded.context_tokens


@torch.inference_mode()
def test_another_size_model_or_weights_get_their_own(loaded, made):
    _, _, positive, _ = loaded
    _, run = rows(loaded, positive)
    run()
    for other in ({"grid": (1, 4, 6)}, {"owner": object()}, {"weights": "patched"}):
        run(**other)
    assert len(made) == 4
    run()
    assert len(made) == 4


@torch.inference_mode()
def test_the_least_recently_used_go(loaded, made):
    contexts, _, positive, _ = loaded
    _, run = rows(loaded, positive)
    for width in range(2, 2 + contexts.KEPT + 1):
        run(grid=(1, 4, width))
    assert len(made) == contexts.KEPT + 1
    run(grid=(1, 4, 3))  # still there
    assert len(made) == contexts.KEPT + 1
    run(grid=(1, 4, 2))  # gone, and made once more
    assert len(made) == contexts.KEPT + 2


def test_they_go_with_the_run(loaded, made):
    _, model, positive, _ = loaded
    cond, run = rows(loaded, positive)
    with torch.inference_mode():
        run()
    assert len(model.store._contexts) == 1
    del cond, run
    made.clear()
    gc.collect()
    assert not model.store._contexts


def test_training_computes_them_anew_without_gradients(loaded, made):
    """Several sizes, too: a trainer gives pictures of each."""
    _, _, positive, _ = loaded
    _, run = rows(loaded, positive)
    with torch.inference_mode(False), torch.enable_grad():
        for grid in ((1, 4, 4), (1, 4, 4), (1, 2, 6)):
            context = run(grid=grid).rows[0].prepared.context
            assert not any(t.requires_grad or t.is_inference() for t in (*context.keys, *context.values))
    assert len(made) == 3


def test_threads_and_inference_mode_do_not_share(loaded, made):
    """What is made in inference mode cannot be written to outside of it, as GPU threads do."""
    _, _, positive, negative = loaded
    _, run = rows(loaded, positive, negative)
    with torch.inference_mode():
        run()
    with torch.no_grad():
        context = run().rows[0].prepared.context
        assert not context.keys[0].is_inference()
    assert len(made) == 2


@torch.inference_mode()
def test_an_edit_is_planned_for_its_window(comfy, made):
    contexts, windows = module(comfy, "nodes.contexts"), module(comfy, "nodes.windows")
    model, positive, latent = comfy.run(edit(), [("loader", 0), ("text", 0), ("vision", 1)]).values
    model.model.current_patcher = model
    t, h, w = latent["samples"].shape[2:]
    cond = contexts.RowsCond.of(model.model.store, positive[0][1]["lance"], True)
    experts = model.model.experts(torch.device("cpu"), {})
    for first in (0, 1):  # columns this time
        window = windows.Window(4, tuple(range(first, first + w - 1)))
        row = cond.rows(experts, model.model, contexts.Place((t, h, w - 1), window), None).rows[0]
        (source,) = [s for s in row.prepared.plan.sequence.context if s.kind.value == "clean"]
        assert source.grid == (t, h, w - 1)
    assert len(made) == 2
    with pytest.raises(Exception, match="connect the LATENT"):
        cond.rows(experts, model.model, contexts.Place((t, h, w - 1)), None)
