"""What a training is asked for, checked before any work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import checks
from ..errors import RequestError
from ..inputs.sizes import PRESETS
from ..text_generation import MAX_SEED
from .lora import EXPERTS, TARGETS
from .optimizer import OPTIMIZERS, SCHEDULES

MAX_STEPS, MAX_RANK, MAX_TOKENS = 10_000_000, 4096, 1 << 20
TASKS = ("auto", "i2v", "x2t_image", "x2t_video")
LORA_LR, FULL_LR = 1e-4, 1e-5
# What may differ between a run and the one that goes on with it: nothing that its result depends on.
MAY_CHANGE = ("steps", "save_every", "sample_every", "sample_prompts", "sample_steps", "max_tokens")


@dataclass(frozen=True)
class Settings:
    """Options of `train` that are no files.

    steps: optimiser steps. batch: samples a step, of all ranks together; max_tokens: tokens of one pass, so
    that a batch beyond it is accumulated. experts: whose adapters are trained, or weights with `full`.
    lr: None for 1e-4, with `full` 1e-5. caption_dropout, reference_dropout: how often a sample has none.
    ema: decay of an average that is saved, too; 0 for none. validation: rows held out (below 1: a share).
    """

    steps: int = 1000
    rank: int = 16
    alpha: float | None = None
    lr: float | None = None
    experts: str = "generation"
    targets: tuple[str, ...] = tuple(TARGETS)
    seed: int = 0
    resolution: str | None = None
    num_frames: int | None = None
    task: str = "auto"
    question: str | None = None
    batch: int = 1
    max_tokens: int = 16384
    schedule: str = "constant"
    warmup: int = 10
    optimizer: str = "adamw"
    clip: float = 1.0
    caption_dropout: float = 0.1
    reference_dropout: float = 0.1
    ema: float = 0.0
    validation: float | None = None
    save_every: int = 100
    sample_every: int | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int = 30
    full: bool = False
    as_released: bool = False

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)  # the class is frozen

        put("steps", checks.whole("steps", self.steps, 1, MAX_STEPS))
        put("rank", checks.whole("rank", self.rank, 1, MAX_RANK))
        put("alpha", checks.real("alpha", self.rank if self.alpha is None else self.alpha, above=0))
        lr = (FULL_LR if self.full else LORA_LR) if self.lr is None else self.lr
        put("lr", checks.real("lr", lr, 0, 10, above=0))
        checks.choice("experts", self.experts, EXPERTS)
        put("targets", tuple(checks.choice("targets", one, TARGETS) for one in self.targets))
        if not self.targets:
            raise RequestError(f"targets is empty, expected some of {', '.join(TARGETS)}")
        put("seed", checks.whole("seed", self.seed, 0, MAX_SEED))
        if self.resolution is not None:
            checks.choice("resolution", self.resolution, PRESETS)
        if self.num_frames is not None:
            put("num_frames", checks.whole("num_frames", self.num_frames, 5, 121))
        checks.choice("task", self.task, TASKS)
        if self.question is not None:
            checks.text("question", self.question)
        put("batch", checks.whole("batch", self.batch, 1, 65536))
        put("max_tokens", checks.whole("max_tokens", self.max_tokens, 1, MAX_TOKENS))
        checks.choice("schedule", self.schedule, SCHEDULES)
        put("warmup", checks.whole("warmup", self.warmup, 0, MAX_STEPS))
        checks.choice("optimizer", self.optimizer, OPTIMIZERS)
        put("clip", checks.real("clip", self.clip, 0))
        for name in ("caption_dropout", "reference_dropout"):
            put(name, checks.real(name, getattr(self, name), 0, 1))
        put("ema", checks.real("ema", self.ema, 0, 0.999999))
        if self.validation is not None:
            put("validation", checks.real("validation", self.validation, 0, 1_000_000))
        put("save_every", checks.whole("save_every", self.save_every, 1, MAX_STEPS))
        every = self.save_every if self.sample_every is None else self.sample_every
        put("sample_every", checks.whole("sample_every", every, 1, MAX_STEPS))
        put("sample_prompts", tuple(checks.text("sample_prompts", one) for one in self.sample_prompts))
        put("sample_steps", checks.whole("sample_steps", self.sample_steps, 1, 1000))

    @property
    def rate(self) -> float:
        """The learning rate, which is a number by now."""
        return float(self.lr or 0)

    def told(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def check_continues(self, before: dict[str, Any], where: str) -> None:
        """Refuse to go on with a run that was asked for something else.

        Raises:
            RequestError: names what differs.
        """
        own = self.told()
        # A cosine depends on its end.
        free = set(MAY_CHANGE) - ({"steps"} if self.schedule == "cosine" else set())
        differ = [
            f"{name} was {checks.shown(before.get(name))} and is {checks.shown(value)}"
            for name, value in own.items()
            if name not in free and before.get(name) != value
        ]
        if differ:
            raise RequestError(
                f"{where} is of a run with other options: {'; '.join(differ)[:250]}; give the same ones, or "
                "leave --resume out to start anew"
            )


def settings_of(options: dict[str, Any]) -> Settings:
    """Checked settings from keyword arguments.

    Raises:
        RequestError: an unknown name, or a value out of range.
    """
    unknown = options.keys() - Settings.__dataclass_fields__.keys()
    if unknown:
        raise RequestError(
            f"train has no option {min(unknown)!r}; it has {', '.join(Settings.__dataclass_fields__)}"
        )
    return Settings(**options)


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """bfloat16 or float32, by name or as torch has it.

    Raises:
        RequestError: anything else.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.bfloat16, torch.float32):
        raise RequestError(f"dtype is {dtype}, expected bfloat16 or float32")
    return found
