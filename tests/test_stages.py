"""What every golden case goes through on its way, held against the recording: ids, blocks, positions, noise,
velocities.
"""

from __future__ import annotations

import pytest
import torch

from lance_core import pipeline
from lance_core.model import rope
from lance_core.model.dual_expert import latent_positions
from lance_core.model.sampler import Guidance, schedule
from lance_core.model.sequence import Branch, Kind, Role

MODES = {Kind.TEXT: "causal", Kind.VIT: "full", Kind.CLEAN: "full_noise", Kind.TARGET: "noise"}
MODALITIES = {Role.TEMPLATE: -1, Role.CAPTION: 0, Role.TARGET: 1, Role.SOURCE: 2, Role.SUBJECT: 3}


def natural(position: torch.Tensor, segment) -> torch.Tensor:
    """Positions [3, n] stored markers first, in reading order."""
    return (
        position
        if segment.kind is Kind.TEXT
        else torch.cat([position[:, :1], position[:, 2:], position[:, 1:2]], dim=1)
    )


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.shape == expected.shape and bool((got - expected).abs().max() <= 5e-5 * expected.abs().max())


def branches(run) -> list[list[tuple]]:
    """(segment, positions) of the whole context, conditional and, where there is guidance, unconditional."""
    return [run.plan.prefix + rest for rest in run.plan.rests.values()]


def test_token_ids(drawn):
    end = drawn.lance.checkpoint.tokenizer.im_end
    assert [*drawn.sequence.token_ids(), end] == drawn.tensors["token_ids"].tolist()


def test_blocks(drawn):
    segments = drawn.sequence.segments
    assert [*(s.length for s in segments), 1] == drawn.case["split_lens"]
    assert [*(MODES[s.kind] for s in segments), "causal"] == drawn.case["attn_modes"]


def test_modalities(drawn):
    ids = [
        4 if s.kind is Kind.VIT else MODALITIES[s.role]
        for s in drawn.sequence.segments
        for _ in range(s.length)
    ]
    assert [*ids, -1] == drawn.tensors["modality"].tolist()


def test_latent_indexes(drawn):
    at, latents = 0, []
    for s in drawn.sequence.segments:
        latents += range(at + 1, at + 1 + s.visual) if s.kind in (Kind.CLEAN, Kind.TARGET) else []
        at += s.length
    assert latents == drawn.tensors["vae_token_indexes"].tolist()
    t, h, w = drawn.sequence.target.grid
    fixed = h * w if drawn.first_frame is not None else 0
    assert latents[fixed - t * h * w :] == drawn.tensors["target_token_indexes"].tolist()


def test_calls(drawn):
    """Every pass of the released decoder, in its order: block by block, conditional then unconditional."""
    seen: list[dict] = []
    parts = [[(s, p) for s, p in branch] + [(drawn.sequence.target, None)] for branch in branches(drawn)]
    kv = [0] * len(parts)
    for segment, _ in parts[0]:
        for i, branch in enumerate(parts):
            if any(s is segment for s, _ in branch):
                mode = "gen" if segment.kind in (Kind.CLEAN, Kind.TARGET) else "und"
                seen.append(
                    {"tokens": segment.length, "mode": mode, "causal": segment.kind is Kind.TEXT, "kv": kv[i]}
                )
                kv[i] += segment.length
    assert seen == drawn.case["calls"]


def test_passes(drawn):
    """What ours runs: the shared prefix once, then each branch's rest, each pass over all before it."""
    prefix, rests = drawn.plan.lengths
    assert sum(tokens for branch, tokens, *_ in drawn.passes if branch is None) == prefix
    for i, rest in zip(Branch, rests, strict=False):
        done = prefix
        for _, tokens, _, before in (p for p in drawn.passes if p[0] == i):
            assert before == done
            done += tokens
        assert done == prefix + rest
    targets = [call["kv"] for call in drawn.case["calls"]][-len(rests) :]
    views = [
        view.stop - view.start - drawn.sequence.target.length
        for view in drawn.prepared.context.views.values()
    ]
    assert views == targets


def test_context_positions(drawn):
    ours, released = (
        [],
        {
            i: drawn.tensors[f"prefill_{i}_position_ids"]
            for i in range(len(drawn.case["calls"]) - len(drawn.plan.rests))
        },
    )
    for segment, position in branches(drawn)[0]:
        for branch in branches(drawn):
            ours += [natural(p, s) for s, p in branch if s is segment]
        assert position.dtype == torch.int64
    assert len(ours) == len(released)
    assert all(torch.equal(ours[i], released[i].long()) for i in released)


def test_target_positions(drawn):
    names = ["position_ids_target_cond", "position_ids_target_uncond"]
    assert [n in drawn.tensors for n in names] == [True, len(drawn.plan.targets) == 2]
    for name, position in zip(names, drawn.plan.targets.values(), strict=False):
        assert torch.equal(natural(position, drawn.sequence.target), drawn.tensors[name].long())


def test_grids(drawn):
    """Grids of all visual blocks as the released positions use them: latent cells doubled in space."""
    grids = [
        [s.grid[0], 2 * s.grid[1], 2 * s.grid[2]] for s in drawn.sequence.segments if s.kind is not Kind.TEXT
    ]
    assert grids == drawn.tensors["video_grid_thw"].view(-1, 3).tolist()


def test_noise(drawn):
    noise, before = (
        drawn.tensors["noise"],
        sum(s.visual for s in drawn.sequence.context if s.kind is Kind.CLEAN),
    )
    fixed = 0 if drawn.first_frame is None else drawn.first_frame[..., 0].numel()
    assert torch.equal(drawn.start.flatten(0, 3)[fixed:], noise[before + fixed :])
    assert torch.equal(pipeline.seeded_noise(drawn.case["seed"], (1, 1, len(noise))).flatten(0, 2), noise)


def test_condition_latents(drawn):
    ours = [s.data for s in drawn.sequence.context if s.kind is Kind.CLEAN]
    ours += [] if drawn.first_frame is None else [drawn.first_frame]
    assert len(ours) == sum(name.startswith("condition_latent_") for name in drawn.tensors)
    assert all(close(latent, drawn.tensors[f"condition_latent_{i}"]) for i, latent in enumerate(ours))


def test_first_velocities(drawn):
    rows, _, t, v = drawn.velocities[0]
    assert rows == list(Branch)[: len(drawn.plan.targets)]
    assert close(v[0].flatten(0, 2), drawn.tensors["velocity_step0_cond"])
    assert len(rows) == 1 or close(v[1].flatten(0, 2), drawn.tensors["velocity_step0_uncond"])
    expected = torch.ones_like(t)
    expected[:, 0] = 0 if drawn.first_frame is not None else 1
    assert torch.equal(t, expected)


def test_velocity_calls(drawn):
    assert len(drawn.velocities) == drawn.case["steps"]
    assert sum(len(rows) for rows, *_ in drawn.velocities) == drawn.case["velocity_calls"]


def test_question_ids(answered):
    begin = int(answered.tensors["ce_start"]) + 1
    assert answered.sequence.token_ids() == answered.tensors["token_ids"].tolist()[:begin]
    opening, seen, *rest = answered.sequence.segments
    lengths = answered.case["split_lens"]
    assert [opening.length, seen.length] == lengths[:2] and sum(s.length for s in rest) == begin - sum(
        lengths[:2]
    )
    assert [MODES[opening.kind], MODES[seen.kind], MODES[rest[0].kind]] == answered.case["attn_modes"]


def test_question_sees(answered):
    seen = answered.sequence.segments[1]
    assert close(seen.data, answered.tensors["vit_embeds"])
    assert [[seen.grid[0], 2 * seen.grid[1], 2 * seen.grid[2]]] == answered.tensors["vit_grid"].view(
        -1, 3
    ).tolist()


def test_question_positions_have_no_offset(answered):
    laid = rope.positions(answered.sequence, 2)
    opening = answered.sequence.segments[0].length
    assert (
        laid[1][:, 0].tolist() == [opening] * 3
    )  # the start marker goes on where the text ended, on every axis
    assert laid[2][:, 0].tolist() == [int(laid[1].max()) + 1] * 3


def test_schedules(units):
    for row in units["schedules"]:
        assert schedule(row["steps"], row["shift"]).tolist() == row["sigmas"]


def test_latent_position_table(units):
    unit = units["latent_position_embedding"]
    table = latent_positions((unit["t"], unit["h"], unit["w"]), unit["hidden"])
    assert len(table) == unit["t"] * unit["h"] * unit["w"] and unit["rows"]
    for row, values in unit["rows"].items():
        assert torch.equal(table[int(row)], torch.tensor(values, dtype=torch.float64).float()), row


@pytest.mark.parametrize("steps, guided", [(30, 26), (50, 42)])
def test_guided_steps_of_the_default_interval(steps, guided):
    assert sum(Guidance().applies(t) for t in schedule(steps)[:-1]) == guided
