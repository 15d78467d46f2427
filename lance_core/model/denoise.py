"""Denoising a prepared request: the rows of guidance and batch in one velocity call a step, window by
window.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .dual_expert import DualExpert, Prepared, Row
from .out_of_memory import is_out_of_memory
from .sampler import Guidance, euler
from .sequence import Branch
from .windows import Windows

log = logging.getLogger(__name__)


def denoise(
    model: DualExpert,
    prepared: Prepared,
    x: Tensor,
    times: Tensor,
    guidance: Guidance,
    *,
    first_frame: Tensor | None = None,
    kept: Mapping[int, Tensor] | None = None,
    dropped: Prepared | None = None,
    windows: Windows | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Noise x [b, t, h, w, 48] -> latent of the same shape, float32. x is not modified.

    Args:
        model, prepared: both experts, and the request's context from `DualExpert.prefill`; for the grid of
            one window where there are several.
        times, guidance: see `sampler`.
        first_frame: latent [1, h, w, 48] kept clean as the first frame of every row (image to video).
        kept: latents [h, w, 48] kept clean at other latent frames.
        dropped: the request without caption and references (`references.without_references`), for
            `guidance.vision`.
        windows: how x is cut, if it is longer than the model knows.
        callback: (step, total, latent) after each step, step from 1; raise in it to stop.

    Raises:
        NumericsError: NaN or infinity appeared; says in which step.
    """
    held = dict(kept or {}) | ({} if first_frame is None else {0: first_frame[0]})
    clean = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    if held:
        x = x.clone()
    for frame, latent in held.items():
        clean[:, frame] = True
        x[:, frame] = latent.to(x.device)
    branches = [Row(prepared, Branch.CONDITIONAL), Row(prepared, Branch.UNCONDITIONAL)]
    if dropped is not None:
        branches.append(Row(dropped, Branch.CONDITIONAL))
    forward = Forward(model)
    spans, weights = [(0, x.shape[1])], torch.ones(x.shape[1], device=x.device)
    if windows is not None:
        spans, weights = windows.spans(x.shape[1]), windows.weights(x.shape[1], x.device)

    def velocity(x: Tensor, t: Tensor, guided: bool) -> list[Tensor | None]:
        frames = t.to(x.device).expand(x.shape[:2]).masked_fill(clean, 0)
        rows = branches if guided else branches[:1]
        if len(spans) == 1:
            found: list[Tensor | None] = list(forward(rows, x, frames))
        else:
            found = list(blended(forward, rows, x, frames, spans, weights))
        return found if guided else [*found, None]

    return euler(velocity, x, times, guidance, fixed=clean[..., None, None, None], callback=callback)


def blended(
    forward: Forward,
    rows: list[Row],
    x: Tensor,
    frames: Tensor,
    spans: list[tuple[int, int]],
    weights: Tensor,
) -> list[Tensor]:
    """Velocities of overlapping windows as one each, the mean by `weights` where they overlap."""
    sums = [torch.zeros_like(x) for _ in rows]
    total = torch.zeros(x.shape[1], device=x.device)
    share = weights[:, None, None, None]
    for start, stop in spans:
        part = slice(start, stop)
        for into, v in zip(sums, forward(rows, x[:, part], frames[:, part]), strict=True):
            into[:, part] += v * share
        total[part] += weights
    return [one / total[:, None, None, None] for one in sums]


class Forward:
    """Velocities of several branches, each [b, t, h, w, 48]: in one pass, or one after another from the first
    time that memory does not hold all.
    """

    def __init__(self, model: DualExpert) -> None:
        self.model, self.together = model, True

    def __call__(self, branches: list[Row], x: Tensor, frames: Tensor) -> list[Tensor]:
        batch, count = x.shape[0], len(branches)
        if self.together or count == 1:
            try:
                rows = [row for row in branches for _ in range(batch)]
                many, times = (torch.cat([part] * count) for part in (x, frames))
                return list(self.model.velocity(rows, many, times).split(batch))
            except Exception as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
            # Out here the exception is gone, and with it the frames that held the failed pass's tensors.
            self.together = False
            log.warning("Out of memory with %d passes in one; now one after another, slower.", count)
        return [self.model.velocity([row] * batch, x, frames) for row in branches]
