"""The loss: cross-entropy of answers and squared error of velocities, every token of a step weighing the
same.

Source: the released fine-tuning code's weights (0.25 and 1.0) and its mean over all tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RequestError
from .packed import Packed
from .passes import Experts, target_noise
from .sample import Sample

CE_WEIGHT, MSE_WEIGHT = 0.25, 1.0
TIME_SHIFT = 4.0  # of training; inference uses 3.5


@dataclass(frozen=True, eq=False)
class Loss:
    """The losses of a batch.

    total: what is differentiated. ce: [k], of every answer token; mse: [m], of every denoised token, the mean
    over its 48 channels; weights: [k], of the answer tokens (ones unless reweighted). packed: the layout.
    """

    total: Tensor
    ce: Tensor
    mse: Tensor
    weights: Tensor
    packed: Packed

    @property
    def sums(self) -> tuple[float, float]:
        """Weighted sum of (ce, mse) over the batch's tokens."""
        return float((self.ce * self.weights).sum().detach()), float(self.mse.sum().detach())


def loss(
    experts: Experts,
    samples: Sequence[Sample],
    noise: Sequence[Tensor | None],
    times: Sequence[float | None],
    *,
    as_released: bool = False,
    totals: tuple[float, float] | None = None,
    world: int = 1,
    reweighted: bool = False,
    checkpointing: bool = True,
    detach_understanding: bool = False,
    padding: int = 0,
) -> Loss:
    """The loss of samples at given noise and times, ready for `total.backward()`.

        total = 0.25 world sum(ce) / totals[0] + world sum(mse) / totals[1]

    with velocity v = noise - latent at x = (1 - t) latent + t noise.

    Args:
        samples: see `sample.py`. They are packed into one pass and do not see each other.
        noise: for each sample with a target, noise shaped like its latent; else None.
        times: for each sample with a target, t in 0..1 (see `drawn_time`); else None.
        as_released: the released trainer's places; see `sample.py`.
        totals: tokens with (cross-entropy, squared error) in the whole step, where this is one rank's or
            one accumulated batch's part of it; by default this batch's own. A kind without tokens counts 0.
        world: ranks whose gradients are averaged afterwards.
        reweighted: an answer's tokens weigh 1 / sqrt(its length), and `totals[0]` counts weights.
        checkpointing, detach_understanding: see `passes.Network`.
        padding: so many samples at the end count nothing, but give every weight they reach a gradient of 0.

    Raises:
        RequestError: no samples, or noise, times and samples that do not fit each other.
    """
    _check(samples, noise, times)
    packed = Packed.of(samples, experts.tokens_per_second, as_released)
    logits, velocity = experts.network(packed, noise, times, checkpointing, detach_understanding)
    ce, weights = _cross_entropy(packed, logits, reweighted)
    mse = _squared_error(packed, velocity, noise)
    kept = [sum(s.loss_tokens[kind] for s in samples[: len(samples) - padding]) for kind in (0, 1)]
    own = (float(weights[: kept[0]].sum()), float(kept[1]))
    total = velocity.new_zeros(())
    for values, weight, count, some in (
        (ce * weights, CE_WEIGHT, kept[0], (totals or own)[0]),
        (mse, MSE_WEIGHT, kept[1], (totals or own)[1]),
    ):
        if count:
            total = total + weight * world * values[:count].sum() / some
        if len(values) > count:
            total = total + 0 * values[count:].sum()
    ce, weights, mse = ce[: kept[0]], weights[: kept[0]], mse[: kept[1]]
    return Loss(total, ce, mse, weights, packed)


def drawn_time(normal: float) -> float:
    """The time of a target from a draw of N(0, 1): t = 4 s / (1 + 3 s), s = sigmoid(normal).

    Source: logit-normal times with a shift (SD3, arXiv 2403.03206), as the released code draws them.
    """
    s = torch.sigmoid(torch.tensor(normal, dtype=torch.float32))
    return float(TIME_SHIFT * s / (1 + (TIME_SHIFT - 1) * s))


def _check(samples: Sequence[Sample], noise: Sequence[Tensor | None], times: Sequence[float | None]) -> None:
    if not len(samples) == len(noise) == len(times):
        raise RequestError(
            f"{len(samples)} samples came with {len(noise)} noises and {len(times)} times; each needs one of "
            "both, None for an answer"
        )
    for i, (sample, one, time) in enumerate(zip(samples, noise, times, strict=True)):
        if sample.latent is None:
            continue
        if one is None or one.shape != sample.latent.shape:
            found = None if one is None else list(one.shape)
            raise RequestError(
                f"noise {i} has shape {found}, expected its latent's, {list(sample.latent.shape)}"
            )
        if time is None or not 0 <= time <= 1:
            raise RequestError(f"time {i} is {time}, expected a number from 0 to 1")


def _cross_entropy(packed: Packed, logits: Tensor, reweighted: bool) -> tuple[Tensor, Tensor]:
    """float32 [k] of every answer token, and the tokens' weights."""
    lengths = packed.answer_lengths.to(logits.device)
    weights = lengths.float().rsqrt() if reweighted else torch.ones_like(lengths, dtype=torch.float32)
    return F.cross_entropy(logits, packed.labels.to(logits.device), reduction="none"), weights


def _squared_error(packed: Packed, velocity: Tensor, noise: Sequence[Tensor | None]) -> Tensor:
    """float32 [m]: mean over channels of (velocity - (noise - latent))^2 of every token with t > 0."""
    wanted = []
    for block in packed.latents:
        if block.clean_frames is not None:
            target = target_noise(noise, block.sample).to(velocity.device)
            target = target - block.data.to(velocity.device, torch.float32)
            wanted.append(target.flatten(0, 2)[block.noisy_tokens.to(velocity.device)])
    if not wanted:
        return velocity.new_zeros(0)
    return (velocity - torch.cat(wanted)).square().mean(dim=-1)
