"""What travels between our nodes where ComfyUI has no type for it: LANCE and LANCE_VISION; and the roles of
pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from comfy_api.latest import io

from ..lance_core.config import LanceConfig
from ..lance_core.inputs.tokenizer import Tokenizer
from ..lance_core.model.dual_expert import DualExpert
from ..lance_core.model.sequence import Segment
from . import comfy_compat

CATEGORY = "Lance"
LANCE = io.Custom("LANCE")
LANCE_VISION = io.Custom("LANCE_VISION")
EDIT, SUBJECT, QUESTION = "edit source", "subject reference", "question"
ROLES = (EDIT, SUBJECT, QUESTION)


@dataclass(eq=False)
class Reader:
    """What a LANCE is: the understanding expert and the vision tower, each with its own patcher, and the
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
        """The patchers, for ComfyUIs that account for cached outputs."""
        return [p for p in (self.und, self.vit) if p is not None]

    def understanding(self) -> DualExpert:
        """The understanding expert alone; load its patcher first."""
        return DualExpert(
            self.config.llm,
            self.und.model,
            None,
            attention=comfy_compat.attention,
            dtype=self.compute,
            device=self.und.load_device,
        )


@dataclass(eq=False)
class Vision:
    """What a LANCE_VISION is: pictures and clips as the model sees them.

    segments: per picture its ViT block and, unless it is for a question, its clean latent. video: a clip is
    among them.
    """

    role: str
    segments: tuple[Segment, ...] = field(repr=False)
    video: bool
    checkpoint: str
