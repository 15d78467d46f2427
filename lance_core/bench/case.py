"""What the benchmark asks of the model: sizes, and sequences of random tokens, pictures and latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..config import (
    LATENT_CHANNELS,
    RELEASED_LLM,
    RELEASED_VAE,
    RELEASED_VIT,
    LanceConfig,
    VAEConfig,
    ViTConfig,
    latent_grid,
)
from ..errors import RequestError
from ..inputs import tasks
from ..model.sequence import Kind, Role, Segment, Sequence, TargetSegment, TextSegment, VisualSegment

RELEASED = LanceConfig(RELEASED_LLM, RELEASED_VIT, RELEASED_VAE, "video")
OPENING, CLOSING = 40, 6  # tokens of a prompt's template before the caption and after it, about
# Side of what the ViT sees to what the VAE sees, of an image's and of a video's preset.
SEEN_SIDE = {False: 7 / 8, True: 0.9625}


@dataclass(frozen=True)
class Case:
    """One request to measure. grid: latent cells (t, h, w); seen: the ViT's patches (t, h, w)."""

    width: int
    height: int
    frames: int
    batch: int
    guidance: bool
    edit: bool
    context: int
    grid: tuple[int, int, int]
    seen: tuple[int, int, int]

    @property
    def label(self) -> str:
        return f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.frames > 1 else "")

    @property
    def tokens(self) -> int:
        """Latent tokens of one result."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def input_shape(self, name: str, config: LanceConfig) -> tuple[int, ...]:
        """Of what "vit", "encode" or "decode" takes: patches, pixels or a latent."""
        if name == "encode":
            return (1, 3, self.frames, self.height, self.width)
        if name == "decode":
            return (1, LATENT_CHANNELS, *self.grid)
        vit, (t, h, w) = vit_of(config), self.seen
        return (t * h * w, vit.in_channels * vit.temporal_patch_size * vit.patch_size**2)

    def sequence(self, config: LanceConfig) -> Sequence:
        """A generation request, an edit's if so asked."""
        visual: list[VisualSegment] = []
        if self.edit:
            clean = VisualSegment(Kind.CLEAN, Role.SOURCE, self.grid, noise(*self.grid, LATENT_CHANNELS))
            visual = [self._seen(config, Role.SOURCE), clean]
        context: tuple[Segment, ...] = (
            _text(config, OPENING),
            *visual,
            _text(config, self.context, Role.CAPTION),
            _text(config, CLOSING),
        )
        return Sequence(context, TargetSegment(self.grid), 0, 1, 2)

    def question(self, config: LanceConfig) -> Sequence:
        """An understanding request about a picture or clip of this size."""
        context = (
            _text(config, OPENING),
            self._seen(config, Role.QUESTION),
            _text(config, self.context),
            _text(config, CLOSING),
        )
        return Sequence(context, None, 0, 1, 2)

    def _seen(self, config: LanceConfig, role: Role) -> VisualSegment:
        t, h, w = self.seen
        merge = config.vit.spatial_merge_size if config.vit else 2
        grid = (t, h // merge, w // merge)
        return VisualSegment(Kind.VIT, role, grid, noise(grid[0] * grid[1] * grid[2], config.llm.hidden_size))


def case_of(
    config: LanceConfig,
    size: str,
    frames: int = 1,
    *,
    batch: int = 1,
    guidance: bool = True,
    edit: bool = False,
    context: int = 100,
) -> Case:
    """The case of one size ("768x768") and number of frames, lowered to what the model makes.

    Raises:
        RequestError: not a size, or out of range.
    """
    sides = size.lower().split("x")
    if len(sides) != 2 or not all(s.isascii() and s.isdecimal() for s in sides):
        raise RequestError(f"size {size!r} is not WIDTHxHEIGHT in pixels, such as 768x768")
    width, height = tasks.check_size(*map(int, sides))
    frames = tasks.resolve_frames(frames)
    checks.whole("batch", batch, 1, 64)
    checks.whole("context", context, 1, 1 << 20)
    patch, merge = (config.vit.patch_size, config.vit.spatial_merge_size) if config.vit else (14, 2)
    unit = patch * merge
    h, w = (max(1, int(side * SEEN_SIDE[frames > 1]) // unit) * merge for side in (height, width))
    pairs = -(-frames // (config.vit.temporal_patch_size if config.vit else 2))
    grid = latent_grid(width, height, frames)
    return Case(width, height, frames, batch, guidance, edit, context, grid, (pairs, h, w))


def vit_of(config: LanceConfig) -> ViTConfig:
    """The vision tower's sizes.

    Raises:
        RequestError: the checkpoint has none.
    """
    if config.vit is None:
        raise RequestError("the checkpoint has no vision tower, whose sizes this measures")
    return config.vit


def vae_of(config: LanceConfig) -> VAEConfig:
    """The VAE's sizes.

    Raises:
        RequestError: the checkpoint has none.
    """
    if config.vae is None:
        raise RequestError("the checkpoint has no VAE, whose sizes this measures")
    return config.vae


def noise(*shape: int) -> Tensor:
    """Standard normal numbers, float32 on the CPU; the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _text(config: LanceConfig, count: int, role: Role = Role.TEMPLATE) -> TextSegment:
    ids = torch.randint(config.llm.vocab_size, (count,), generator=torch.Generator().manual_seed(count))
    return TextSegment(role, tuple(ids.tolist()))
