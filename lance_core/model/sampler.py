"""Flow-matching: time schedule, guidance, renormalisation and the Euler solver, over any velocity function.

The state is float32 throughout. Velocity is noise - data, time runs from 1 (noise) to 0 (data).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..config import LATENT_CHANNELS, RELEASED_SAMPLING, RENORMS, Grid
from ..errors import NumericsError

MAX_STEPS = 1_000_000
MIN_SHIFT, MAX_SHIFT = 1e-4, 1e4  # beyond these float32 times are no schedule any more
MAX_SCALE = 1e4
STEPS_EXPECTED = f"a whole number of at least 1; the model's default is {RELEASED_SAMPLING.steps}"
SHIFT_EXPECTED = f"a positive number; the model's default is {RELEASED_SAMPLING.shift}"


def schedule(steps: int, shift: float = RELEASED_SAMPLING.shift) -> Tensor:
    """Times [steps + 1], float32, 1 down to 0, bent by `shift` towards noise (SD3, arXiv 2403.03206, eq. 23).

    Raises:
        RequestError: no whole number of steps from 1, or no positive shift.
    """
    steps = checks.whole("steps", steps, 1, MAX_STEPS, STEPS_EXPECTED)
    shift = checks.real("shift", shift, MIN_SHIFT, MAX_SHIFT, expected=SHIFT_EXPECTED)
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def seeded_noise(seed: int, grid: Grid, before: int = 0) -> Tensor:
    """The target's starting noise [t, h, w, 48], float32 on the CPU.

    One row is drawn per latent token of the whole sequence, as in the released code; the first `before`
    belong to references and are dropped.
    """
    t, h, w = grid
    rows = torch.randn((before + t * h * w, LATENT_CHANNELS), generator=torch.Generator().manual_seed(seed))
    return rows[before:].view(t, h, w, LATENT_CHANNELS)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance.

    scale: 1 means no unconditional pass at all.
    interval: (low, high]; guidance applies while low < t <= high, compared in float32.
    renorm: "global", "channel" or "none"; how the guided velocity is scaled back, never below `renorm_min`.
    vision: scale of the references, for edits and subjects; 1 means no pass without them.
    """

    scale: float = RELEASED_SAMPLING.cfg
    interval: tuple[float, float] = RELEASED_SAMPLING.cfg_interval
    renorm: str = RELEASED_SAMPLING.renorm
    renorm_min: float = RELEASED_SAMPLING.renorm_min
    vision: float = 1.0

    def __post_init__(self) -> None:
        # Python's own numbers, whatever came: they go into a result's metadata. The class is frozen, hence
        # setattr.
        object.__setattr__(self, "scale", checks.real("cfg", self.scale, 0, MAX_SCALE))
        object.__setattr__(self, "interval", checks.interval("cfg_interval", self.interval, 0, 1))
        object.__setattr__(self, "renorm", checks.choice("renorm", self.renorm, RENORMS))
        object.__setattr__(self, "renorm_min", checks.real("renorm_min", self.renorm_min, 0, 1))
        object.__setattr__(self, "vision", checks.real("cfg_vision", self.vision, 0, MAX_SCALE))

    @property
    def active(self) -> bool:
        """Whether any step can need an unconditional pass."""
        return self.scale != 1 or self.shows

    @property
    def shows(self) -> bool:
        """Whether any step can need a pass without references."""
        return self.vision != 1

    def applies(self, t: Tensor) -> bool:
        """Whether time t (a float32 scalar) lies in the interval."""
        low, high = torch.tensor(self.interval, dtype=torch.float32)
        return self.active and bool((low < t) & (t <= high))

    def combine(
        self,
        cond: Tensor,
        uncond: Tensor,
        channels: int = -1,
        floor: float | Tensor = 1e-8,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Guided velocity, each row on its own: w = u + s_v (r - u) + s (c - r), then renorm.

        c is `cond`, r is `uncond` (references, no caption), u is `dropped` (neither); without `dropped`, and
        at s_v = 1, that is r + s (c - r).

        channels: the axis of the latent's channels. floor: added to the norm divided by; scales with the
            velocity's unit.
        """
        guided = uncond + self.scale * (cond - uncond)
        if dropped is not None:
            guided = guided + (self.vision - 1) * (uncond - dropped)
        if self.renorm == "none":
            return guided
        dims = (channels,) if self.renorm == "channel" else tuple(range(1, guided.dim()))
        ratio = norm(cond, dims) / (norm(guided, dims) + floor)
        return guided * ratio.clamp(self.renorm_min, 1.0)


def norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over `dims`, kept for broadcasting."""
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True)


Velocity = Callable[[Tensor, Tensor, bool], Sequence[Tensor | None]]


def euler(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    guidance: Guidance,
    *,
    fixed: Tensor | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Integrate dx/dt = v from times[0] to times[-1].

    Args:
        velocity: (x, t, guided) -> conditional velocity and, if guided, the unconditional one, and then
            perhaps the one without references; t is a float32 scalar.
        x: noise [b, t, h, w, c], float32. Not modified.
        times: from `schedule`.
        fixed: mask broadcastable to x; True where the state must not move (image-to-video's first frame).
        callback: (step, total, x) after each step, step from 1; raise in it to stop.

    Returns: x at times[-1], float32.

    Raises:
        NumericsError: NaN or infinity appeared; says in which step.
    """
    total = len(times) - 1
    # The first bad step stays on the device, and the times are copied once: no step waits for the device.
    failed = torch.full((), total, dtype=torch.long, device=x.device)
    x, at = x.clone(), times.to(x.device)
    for i in range(total):
        cond, uncond, *more = velocity(x, at[i], guidance.applies(times[i]))
        assert cond is not None
        v = cond if uncond is None else guidance.combine(cond, uncond, dropped=more[0] if more else None)
        if fixed is not None:
            v = v.masked_fill(fixed, 0)
        x -= v * (at[i] - at[i + 1])
        failed = torch.where(torch.isfinite(x).all(), failed, failed.clamp(max=i))
        if callback is not None:
            callback(i + 1, total, x)
    if int(failed) < total:
        raise NumericsError(
            f"denoising gave NaN or infinity in step {int(failed) + 1} of {total}: the weights or the "
            "starting latents are damaged, or float16 overflowed; check the checkpoint with `info`, "
            "or use bfloat16"
        )
    return x
