"""Videos longer than the model knows, in overlapping windows: at every step each window is a video of its
own, and where windows overlap their velocities are blended (as MultiDiffusion blends views, arXiv
2302.08113).

All windows have one length, so they share one context. Lengths here are in latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..config import MAX_FRAMES, latent_frames
from ..errors import RequestError

BLENDS = ("pyramid", "flat")


@dataclass(frozen=True)
class Windows:
    """How a long video is cut.

    length, overlap: pixel frames of a window, and of what it shares with the next one; counted in latent
    frames of four, length lowered to 4k+1. blend: "pyramid" lets a window fade in and out over the overlap,
    "flat" takes the mean there.

    Raises:
        RequestError: a length beyond what the model knows, or no overlap left of it.
    """

    length: int = MAX_FRAMES
    overlap: int = 32
    blend: str = "pyramid"

    def __post_init__(self) -> None:
        checks.whole("the window's length", self.length, 5, MAX_FRAMES)
        checks.choice("blend", self.blend, BLENDS)
        checks.whole("the windows' overlap", self.overlap, 4, MAX_FRAMES)
        if self.shared >= self.size:
            raise RequestError(
                f"windows of {self.length} frames overlap by {self.overlap}; expected an overlap of at "
                f"least 4 "
                "and less than the window"
            )

    @property
    def size(self) -> int:
        """Latent frames of a window."""
        return latent_frames(self.length)

    @property
    def shared(self) -> int:
        """Latent frames two neighbours share."""
        return self.overlap // 4

    def spans(self, frames: int) -> list[tuple[int, int]]:
        """The windows of a video of so many latent frames, [start, stop); the last is moved back to its
        end.
        """
        if frames <= self.size:
            return [(0, frames)]
        starts = [*range(0, frames - self.size, self.size - self.shared), frames - self.size]
        return [(start, start + self.size) for start in starts]

    def weights(self, frames: int, device: torch.device | str | None = None) -> Tensor:
        """A window's share in the blend at each of its latent frames, float32 [size], above 0 everywhere."""
        size = min(frames, self.size)
        if self.blend == "flat":
            return torch.ones(size, device=device)
        ramp = torch.arange(1, size + 1, device=device, dtype=torch.float32)
        return torch.minimum(ramp, ramp.flip(0)).clamp(max=self.shared + 1)
