"""Guidance on what is shown: off at 1 with today's numbers, and by the formula elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lance_core import RequestError
from lance_core.inputs import prompts
from lance_core.inputs.tasks import TASKS
from lance_core.model.denoise import Forward
from lance_core.model.dual_expert import DualExpert, Plan, Row
from lance_core.model.references import prefill_without_references, without_references
from lance_core.model.sampler import Guidance, schedule
from lance_core.model.sequence import Branch, Kind, Role

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
EDIT = {"image": PHOTO, "resolution": "image_256res", "steps": 3, "shift": 1.0}
SUBJECT = {
    "references": [PHOTO, PHOTO[::-1]],
    "resolution": "image_256res",
    "width": 48,
    "height": 32,
    "steps": 3,
}


def rows_of(run):
    return [len(rows) for rows, *_ in run.velocities]


@pytest.mark.parametrize(("task", "options"), [("image_edit", EDIT), ("subject_image", SUBJECT)])
def test_off_at_1_the_numbers_are_todays_and_nothing_more_is_computed(image_lance, recorded, task, options):
    today = recorded(image_lance, task, "blue", **options)
    off = recorded(image_lance, task, "blue", cfg_vision=1.0, **options)
    assert torch.equal(today.result.latent, off.result.latent)
    assert today.passes == off.passes and rows_of(today) == rows_of(off) and max(rows_of(off)) == 2
    assert "cfg_vision" not in off.result.request


@pytest.mark.parametrize("task, options", [("image_edit", EDIT), ("subject_image", SUBJECT)])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("negative", [None, "dull"])
def test_the_formula(image_lance, recorded, task, options, cfg, negative):
    """Every step again from the branches' velocities: w = u + s_v (r - u) + s (c - r), with u from a request
    built without caption and references.
    """
    more = options | {"renorm": "none", "cfg": cfg, "cfg_interval": (0.3, 1.0), "negative_prompt": negative}
    run = recorded(image_lance, task, "blue", cfg_vision=2.5, **more)
    model = image_lance.components.experts()
    plain = replace(run.sequence, context=tuple(s for s in run.sequence.context if s.role is Role.TEMPLATE))
    with torch.inference_mode():
        dropped = model.prefill(Plan.of(plain, image_lance.config.tokens_per_second, False))
        x, times = run.start[:1], schedule(3, options.get("shift", 3.5))
        for i in range(3):
            t = times[i].expand(1, x.shape[1])
            c = model.velocity([Row(run.prepared, Branch.CONDITIONAL)], x, t)
            v = c
            if times[i] > 0.3:
                r = model.velocity([Row(run.prepared, Branch.UNCONDITIONAL)], x, t)
                u = model.velocity([Row(dropped, Branch.CONDITIONAL)], x, t)
                v = u + 2.5 * (r - u) + cfg * (c - r)
            x = x - v * (times[i] - times[i + 1])
    torch.testing.assert_close(run.result.latent, x[0], atol=2e-4, rtol=1e-3)
    assert rows_of(run)[0] == 3 and run.result.request["cfg_vision"] == 2.5


def test_the_dropped_branch_is_a_sample_of_training(image_lance, recorded):
    """Neither caption nor references; the target stands where it stands without them, also in an edit."""
    run = recorded(image_lance, "image_edit", "blue", **EDIT)
    dropped = without_references(run.sequence)
    assert {s.kind for s in dropped.context} == {Kind.TEXT} and dropped.source is None
    plan = Plan.of(dropped, image_lance.config.tokens_per_second, False)
    before = sum(s.length for s in dropped.context)
    assert int(plan.targets[Branch.CONDITIONAL][0, 0]) == before
    t = image_lance.checkpoint.tokenizer
    opening = prompts.generation(t, TASKS["image_edit"].default_system_prompt, [], "", (1, 1, 1)).token_ids()
    assert dropped.token_ids()[:before] == opening[:before]


def test_what_the_branches_share_is_copied(image_lance, recorded):
    run = recorded(image_lance, "image_edit", "blue", **EDIT)
    seen = []

    def attention(q, k, v, causal):
        seen.append(q.shape[1])
        return image_lance.components.experts().attention(q, k, v, causal)

    model = image_lance.components.experts(attention=attention)
    with torch.inference_mode():
        dropped = prefill_without_references(model, run.prepared, image_lance.config.tokens_per_second)
        whole = model.prefill(dropped.plan)
    opening, *rest = (p.segment.length for p in dropped.plan.prefix)
    layers = image_lance.config.llm.num_layers
    assert seen[:layers] == [sum(rest)] * layers  # the opening is not run again
    part = slice(dropped.context.prefix.start, dropped.context.prefix.end)
    for ours, theirs in zip(dropped.context.keys, whole.context.keys, strict=True):
        torch.testing.assert_close(ours[part], theirs[part], atol=1e-5, rtol=1e-4)
    assert dropped.context.prefix.filled == opening + sum(rest)


@pytest.mark.parametrize("task", ["t2i", "t2v"])
def test_tasks_that_show_nothing_refuse_it(video_lance, task):
    with pytest.raises(RequestError, match="cfg_vision is 2"):
        video_lance.generate(task, "a", cfg_vision=2)
    with pytest.raises(RequestError, match="cfg_vision is -1"):
        video_lance.generate("image_edit", "a", image=PHOTO, cfg_vision=-1)


def test_guidance_combines_as_documented():
    generator = torch.Generator().manual_seed(0)
    c, r, u = (torch.randn(2, 3, 4, 5, 48, generator=generator) for _ in range(3))
    off = Guidance(4.0, renorm="global")
    assert torch.equal(off.combine(c, r, dropped=u), off.combine(c, r))
    on = Guidance(3.0, renorm="none", vision=1.5).combine(c, r, dropped=u)
    torch.testing.assert_close(on, u + 1.5 * (r - u) + 3 * (c - r))
    assert Guidance(1.0, vision=1.5).active and not Guidance(1.0).active


def test_out_of_memory_the_passes_run_one_after_another(image_lance, recorded, monkeypatch):
    together = recorded(image_lance, "image_edit", "blue", cfg_vision=2.0, **EDIT)
    velocity, calls = DualExpert.velocity, []

    def small(self, rows, x, t):
        calls.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("too much")
        return velocity(self, rows, x, t)

    monkeypatch.setattr(DualExpert, "velocity", small)
    apart = image_lance.generate("image_edit", "blue", cfg_vision=2.0, **EDIT)
    torch.testing.assert_close(apart.latent, together.result.latent, atol=1e-4, rtol=1e-3)
    assert calls[:4] == [3, 1, 1, 1] and calls.count(3) == 1
    assert Forward(None).together
