"""The third branch of guidance: a request without its caption and its references, for guidance on what is
shown.

Training leaves both out in a tenth of the samples each: the blocks are not there, everything after them moves
up, and the target has its natural position (an edit's does not take over the source's).
"""

from __future__ import annotations

from dataclasses import replace

from . import rope
from .dual_expert import DualExpert
from .plan import Plan, Prepared
from .sequence import MARKERS, Branch, Role, Sequence


def without_references(sequence: Sequence) -> Sequence:
    """A generation sequence with nothing left but its template and its target."""
    return replace(sequence, context=tuple(s for s in sequence.context if s.role is Role.TEMPLATE))


def prefill_without_references(model: DualExpert, prepared: Prepared, tokens_per_second: float) -> Prepared:
    """The dropped branch of a prepared request. The opening both have in common is copied, not computed."""
    plan = Plan.of(without_references(prepared.plan.sequence), tokens_per_second, guided=False)
    (prefix, rests), grid = plan.lengths, plan.grid
    context = model.new_context(prefix, rests, grid[0] * grid[1] * grid[2] + MARKERS)
    opening = plan.prefix[0].segment.length
    context.copy_prefix(prepared.context, opening)
    model.extend(context, context.prefix, plan.prefix[1:], prepared.markers)
    tables = {b: rope.tables(p, model.config, model.device) for b, p in plan.targets.items()}
    turned = {b: (cos[None], sin[None]) for b, (cos, sin) in tables.items()}
    return Prepared(plan, context, turned, prepared.markers, prepared.table, {Branch.CONDITIONAL})
