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
from .passes import Experts, run, target_noise
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
        checkpointing, detach_understanding: see `passes.run`.

    Raises:
        RequestError: no samples, or noise, times and samples that do not fit each other.
    """
    _check(samples, noise, times)
    packed = Packed.of(samples, experts.tokens_per_second, as_released)
    und, gen = run(experts, packed, noise, times, checkpointing, detach_understanding)
    ce, weights = _cross_entropy(experts, packed, und, reweighted)
    mse = _squared_error(experts, packed, gen, noise)
    all_ce, all_mse = totals or (float(weights.sum()), float(len(mse)))
    total = und.new_zeros((), dtype=torch.float32)
    if len(ce):
        total = total + CE_WEIGHT * world * (ce * weights).sum() / all_ce
    if len(mse):
        total = total + MSE_WEIGHT * world * mse.sum() / all_mse
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


def _cross_entropy(experts: Experts, packed: Packed, und: Tensor, reweighted: bool) -> tuple[Tensor, Tensor]:
    """float32 [k] of every answer token, and the tokens' weights."""
    if not len(packed.labels):
        nothing = und.new_zeros(0, dtype=torch.float32)
        return nothing, nothing
    before = und.index_select(0, packed.predicts.to(und.device))
    logits = experts.und.lm_head(before)[:, : experts.vocabulary].float()
    lengths = packed.answer_lengths.to(und.device)
    weights = lengths.float().rsqrt() if reweighted else torch.ones_like(lengths, dtype=torch.float32)
    return F.cross_entropy(logits, packed.labels.to(und.device), reduction="none"), weights


def _squared_error(
    experts: Experts,
    packed: Packed,
    gen: Tensor | None,
    noise: Sequence[Tensor | None],
) -> Tensor:
    """float32 [m]: mean over channels of (velocity - (noise - latent))^2 of every token with t > 0."""
    if gen is None or experts.gen is None:
        return torch.zeros(0, device=experts.device)
    wanted, chosen, start = [], [], 0
    for block in packed.latents:
        tokens = block.data[..., 0].numel()
        noisy = block.noisy_tokens
        if bool(noisy.any()):
            target = target_noise(noise, block.sample).to(gen.device) - block.data.float().to(gen.device)
            wanted.append(target.flatten(0, 2)[noisy.to(gen.device)])
        chosen.append(start + noisy.nonzero()[:, 0])
        start += tokens
    if not wanted:
        return torch.zeros(0, device=gen.device)
    velocity = experts.gen.llm2vae(gen.index_select(0, torch.cat(chosen).to(gen.device))).float()
    return (velocity - torch.cat(wanted)).square().mean(dim=-1)
