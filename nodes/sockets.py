"""What travels between our nodes where ComfyUI has no word for it: LANCE and LANCE_VISION."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..lance_core.config import LanceConfig
from ..lance_core.inputs.tokenizer import Tokenizer
from ..lance_core.model.dual_expert import DualExpert
from ..lance_core.model.sequence import Segment
from . import host

EDIT, SUBJECT, QUESTION = "edit source", "subject reference", "question"
ROLES = (EDIT, SUBJECT, QUESTION)


@dataclass(eq=False)
class Lance:
    """What reads: the understanding expert and the vision tower, each with its own patcher, and the
    tokeniser.

    compute: dtype of activations. name: of the checkpoint, for messages.
    """

    config: LanceConfig
    tokenizer: Tokenizer
    und: Any
    vit: Any | None
    compute: torch.dtype
    name: str

    def get_models(self) -> list[Any]:
        """The patchers, for hosts that account for cached outputs."""
        return [p for p in (self.und, self.vit) if p is not None]

    def reader(self) -> DualExpert:
        """The understanding expert alone; load its patcher first."""
        return DualExpert(
            self.config.llm,
            self.und.model,
            None,
            attention=host.attention,
            dtype=self.compute,
            device=self.und.load_device,
        )


@dataclass(eq=False)
class Vision:
    """Pictures and clips as the model reads them.

    segments: per picture its ViT block and, unless it is for a question, its clean latent. video: a clip is
    among them.
    """

    role: str
    segments: tuple[Segment, ...] = field(repr=False)
    video: bool
    checkpoint: str
