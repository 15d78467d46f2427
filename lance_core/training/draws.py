"""Everything random in a training, each draw from its own place in it: the order of rows, what is dropped,
times and noise.

Nothing is remembered from one step to the next, so a run that goes on after a stop, or on more processes,
draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .objective import drawn_time

VALIDATION_TIMES = 4  # of every held-out target: the middles of as many equal parts of the distribution


def generator(*place: object) -> torch.Generator:
    """The random numbers of one place in a training, whatever was drawn elsewhere."""
    name = " ".join(map(str, place))
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


def row_at(numbers: Sequence[int], seed: int, index: int) -> int:
    """The row a stream of shuffled epochs has at `index`. numbers: an epoch's rows, repeats included."""
    epoch, place = divmod(index, len(numbers))
    order = torch.randperm(len(numbers), generator=generator("order", seed, epoch))
    return numbers[int(order[place])]


@dataclass(frozen=True, eq=False)
class Drawn:
    """A sample's draws."""

    time: float
    drop_caption: bool
    drop_references: bool
    noise: torch.Generator

    def noise_for(self, latent: Tensor) -> Tensor:
        """Noise of a latent's shape; call it once."""
        return torch.randn(latent.shape, generator=self.noise)


def of_sample(seed: int, step: int, place: int, caption_dropout: float, reference_dropout: float) -> Drawn:
    """What the sample at `place` of a step draws."""
    source = generator("sample", seed, step, place)
    normal = float(torch.randn((), generator=source))
    caption, references = torch.rand(2, generator=source).tolist()
    return Drawn(drawn_time(normal), caption < caption_dropout, references < reference_dropout, source)


def of_validation(seed: int, row: int, turn: int) -> Drawn:
    """A held-out row's draws, the same each time: `turn` of VALIDATION_TIMES spread times, fixed noise."""
    part = torch.tensor((turn + 0.5) / VALIDATION_TIMES)
    return Drawn(
        drawn_time(float(torch.special.ndtri(part))), False, False, generator("held", seed, row, turn)
    )


def hashed(text: str) -> str:
    """SHA-256 of text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
