"""The best of several results: drawn with seeds that follow each other, then scored against the prompt."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .. import checks
from ..components import Components
from ..dialogue import scoring
from ..inputs.pixels import to_levels
from ..inputs.seen import Seen
from .draw import draw, read_sources
from .request import MAX_BATCH, Checked, Generated, Request, check


def draw_best(components: Components, request: Request, count: int, keep: int = 1) -> list[Generated]:
    """The `keep` best of `count` results with seeds from `request.seed` on, the best first.

    Pictures are drawn as one batch, clips one after another. Each result's request says its seed, its score,
    and of how many it was chosen.

    Raises:
        RequestError: more kept than drawn, or what `check` refuses.
    """
    count = checks.whole("best_of", count, 1, MAX_BATCH)
    keep = checks.whole("keep", keep, 1, count, f"a whole number from 1 to best_of, {count}")
    single = check(replace(request, batch_size=1), components.config.variant)
    results = _drawn(components, request, single, count)
    question, shown = _question(components, single)
    frames = [[*shown, Seen(to_levels(r.frames.numpy(), (0.0, 1.0)), r.frames.shape[0] > 1)] for r in results]
    values = scoring.scores(components, frames, scoring.wording(question, request.prompt))
    best = scoring.order(values)[:keep]
    for i in best:
        results[i].request |= {"score": values[i], "best_of": count}
    return [results[i] for i in best]


def _drawn(components: Components, request: Request, single: Checked, count: int) -> list[Generated]:
    if single.task.output == "image":
        made = draw(components, check(replace(request, batch_size=count), components.config.variant))
        if count == 1:
            return [made]
        pairs: list[tuple[Tensor, Tensor]] = list(zip(made.latent, made.frames, strict=True))
        return [
            Generated(latent, frames, made.fps, made.request | {"seed": single.seed + i})
            for i, (latent, frames) in enumerate(pairs)
        ]
    seeds = range(single.seed, single.seed + count)
    variant = components.config.variant
    return [draw(components, check(replace(request, batch_size=1, seed=s), variant)) for s in seeds]


def _question(components: Components, asked: Checked) -> tuple[str, list[Seen]]:
    """What is asked about a result, and what is shown before it."""
    if asked.task.system == "edit":
        clip = asked.task.takes == "video"
        return scoring.EDIT_QUESTION, [Seen(s, clip) for s in read_sources(components, asked)]
    if asked.task.takes == "references":
        return scoring.SUBJECT_QUESTION, [Seen(s, False) for s in read_sources(components, asked)]
    return scoring.QUESTION, []
