"""The optimiser's parts: learning rate by step, AdamW, a clipped step, and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RequestError
from . import sharding

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "adamw8bit")
BETAS, EPS = (0.9, 0.99), 1e-8
RELEASED_BETAS, RELEASED_EPS = (0.9, 0.95), 1e-15
RELEASED_WAVES = 5  # of the released "cosine", within one run


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step.

    kind: after the warm-up, "constant", or "cosine" down to `least` at `total` steps. warmup: steps up to
    `lr`; ours begin at lr / warmup, the released ones (`as_released`) at 0, and its cosine goes down and up
    five times.
    """

    lr: float
    kind: str = "constant"
    warmup: int = 0
    total: int = 0
    least: float = 0.0
    as_released: bool = False

    def at(self, step: int) -> float:
        """The rate of a step, from 0."""
        if step < self.warmup:
            return self.lr * (step + (0 if self.as_released else 1)) / self.warmup
        if self.kind == "constant":
            return self.lr
        part = min((step - self.warmup) / max(self.total - self.warmup, 1), 1.0)
        turns = 2 * RELEASED_WAVES if self.as_released else 1
        return self.least + (self.lr - self.least) * (1 + math.cos(math.pi * turns * part)) / 2


def optimizer(
    weights: Mapping[str, nn.Parameter], kind: str = "adamw", as_released: bool = False
) -> torch.optim.Optimizer:
    """AdamW without weight decay over named weights; "adamw8bit" keeps its state in 8 bits.

    Raises:
        RequestError: "adamw8bit" without bitsandbytes.
    """
    betas, eps = (RELEASED_BETAS, RELEASED_EPS) if as_released else (BETAS, EPS)
    options: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0}
    if kind == "adamw":
        return torch.optim.AdamW(list(weights.values()), **options)
    try:
        import bitsandbytes
    except ImportError as error:
        raise RequestError(
            f"optimizer adamw8bit needs bitsandbytes ({error}): pip install bitsandbytes, or use adamw"
        ) from None
    return bitsandbytes.optim.AdamW8bit(list(weights.values()), **options)


def step(chosen: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], lr: float, clip: float) -> float:
    """Clip the gradients to norm `clip` (0: not at all), step, and forget them; returns the norm before."""
    norm = float(gradient_norm(weights))
    if clip and norm > clip:
        for weight in weights.values():
            if weight.grad is not None:
                weight.grad.mul_(clip / (norm + 1e-6))
    for group in chosen.param_groups:
        group["lr"] = lr
    chosen.step()
    chosen.zero_grad(set_to_none=True)
    return norm


def gradient_norm(weights: Mapping[str, nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together."""
    return sharding.norm(w.grad for w in weights.values() if w.grad is not None)


class Average:
    """The exponential moving average of trained weights, float32. The first update copies them."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move towards the weights as they are now."""
        for name, weight in weights.items():
            if name in self.values:
                self.values[name].lerp_(weight.detach().float(), 1 - self.decay)
            else:
                self.values[name] = weight.detach().float().clone()
