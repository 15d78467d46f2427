"""Parts of a latent and stretched positions: what context windows and ScaleROPE ask of a plan."""

from __future__ import annotations

import pytest
import torch

from lance_core.model import rope
from lance_core.model.plan import Plan
from lance_core.model.sequence import (
    MARKERS,
    Branch,
    Kind,
    Role,
    Sequence,
    TargetSegment,
    TextSegment,
    VisualSegment,
)

GRID = (3, 2, 4)
TOKENS_PER_SECOND = 2.0


def sequence(source: bool) -> Sequence:
    data = torch.arange(3 * 2 * 4 * 48).view(3, 2, 4, 48).float()
    context = (
        TextSegment(Role.TEMPLATE, (1, 2, 3)),
        *((VisualSegment(Kind.CLEAN, Role.SOURCE, GRID, data),) if source else ()),
        TextSegment(Role.CAPTION, (4, 5)),
        TextSegment(Role.TEMPLATE, (6,)),
    )
    return Sequence(context, TargetSegment(GRID), 7, 8, 9)


@pytest.mark.parametrize("source", [False, True])
def test_cells_stand_at_shift_plus_scale_times_index(source):
    plain = Plan.of(sequence(source), TOKENS_PER_SECOND, True)
    stretch = rope.GridScale((0.5, 2.0, 1.5), (1.0, -3.0, 0.25))
    scaled = Plan.of(sequence(source), TOKENS_PER_SECOND, True, scale=stretch)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in GRID)).T.float()
    axes = torch.tensor([TOKENS_PER_SECOND, 1.0, 1.0])[:, None]
    wanted = cells * torch.tensor(stretch.scale)[:, None] + torch.tensor(stretch.shift)[:, None]
    for branch in Branch:
        first = plain.targets[branch][:, MARKERS : MARKERS + 1]
        assert torch.allclose(scaled.targets[branch][:, MARKERS:], first + wanted * axes)
        assert torch.equal(scaled.targets[branch][:, :MARKERS], plain.targets[branch][:, :MARKERS].float())
        if source:  # what is edited moves with the target, text does not
            assert torch.equal(scaled.prefix[1].position, scaled.targets[branch])
        before, after = plain.rests[branch], scaled.rests[branch]
        assert all(torch.equal(a.position, b.position) for a, b in zip(before, after, strict=True))


def test_no_scale_is_the_plain_plan():
    plain = Plan.of(sequence(True), TOKENS_PER_SECOND, True)
    same = Plan.of(sequence(True), TOKENS_PER_SECOND, True, scale=rope.GridScale())
    for branch in Branch:
        assert torch.equal(same.targets[branch], plain.targets[branch].float())


@pytest.mark.parametrize(("axis", "indices"), [(0, (2, 0)), (1, (1,)), (2, (0, 1, 3))])
def test_a_cut_segment_has_the_cells_asked_for(axis, indices):
    whole = sequence(True).context[1]
    assert isinstance(whole, VisualSegment)
    part = whole.cut(axis, indices)
    assert torch.equal(part.data, whole.data.index_select(axis, torch.tensor(indices)))
    assert part.grid == tuple(part.data.shape[:3]) and part.role is Role.SOURCE
    assert part.length == part.data[..., 0].numel() + MARKERS
