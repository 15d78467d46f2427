"""Denoising a prepared request: the rows of guidance and batch in one velocity call a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dual_expert import DualExpert, Prepared, Row
from .sampler import Guidance, euler
from .sequence import Branch


def denoise(
    model: DualExpert,
    prepared: Prepared,
    x: Tensor,
    times: Tensor,
    guidance: Guidance,
    *,
    first_frame: Tensor | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Noise x [b, t, h, w, 48] -> latent of the same shape, float32. x is not modified.

    Args:
        model, prepared: both experts, and the request's context from `DualExpert.prefill`.
        times, guidance: see `sampler`.
        first_frame: latent [1, h, w, 48] kept clean as the first frame of every row (image to video).
        callback: (step, total, latent) after each step, step from 1; raise in it to stop.

    Raises:
        NumericsError: NaN or infinity appeared; says in which step.
    """
    batch = x.shape[0]
    clean = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    if first_frame is not None:
        clean[:, 0] = True
        x = x.clone()
        x[:, :1] = first_frame.to(x.device)

    def velocity(x: Tensor, t: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        frames = t.to(x.device).expand(x.shape[:2]).masked_fill(clean, 0)
        rows = [Row(prepared, Branch.CONDITIONAL)] * batch
        if not guided:
            return model.velocity(rows, x, frames), None
        rows += [Row(prepared, Branch.UNCONDITIONAL)] * batch
        v = model.velocity(rows, torch.cat([x, x]), torch.cat([frames, frames]))
        return v[:batch], v[batch:]

    return euler(velocity, x, times, guidance, fixed=clean[..., None, None, None], callback=callback)
