"""What travels between our nodes where ComfyUI has no type for it: LANCE, LANCE_VISION and LANCE_CHAT; and
the roles of pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from comfy_api.latest import io

from ..lance_core.checks import shown
from ..lance_core.config import LanceConfig
from ..lance_core.dialogue.conversation import Conversation
from ..lance_core.errors import RequestError
from ..lance_core.inputs.tokenizer import Tokenizer
from ..lance_core.model.dual_expert import DualExpert
from ..lance_core.model.sequence import Segment
from . import comfy_compat

CATEGORY = "Lance"
LANCE = io.Custom("LANCE")
LANCE_VISION = io.Custom("LANCE_VISION")
LANCE_CHAT = io.Custom("LANCE_CHAT")
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
class Chat:
    """What a LANCE_CHAT is: a conversation, and the checkpoint it was held with."""

    conversation: Conversation = field(repr=False)
    checkpoint: str


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


# -- what a queued prompt may hold
# ----------------------------------------------------------------------------


def _is_conditioning(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(c, list | tuple) and len(c) == 2 and isinstance(c[1], dict) for c in value
    )


# What a connected input holds, by its type's name: a test, and the node that makes one.
LINKED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "MODEL": (lambda v: hasattr(v, "model") and hasattr(v, "clone"), "the MODEL of Lance Loader"),
    "CONDITIONING": (_is_conditioning, "Lance Text Encode"),
    "LATENT": (
        lambda v: isinstance(v, dict) and isinstance(v.get("samples"), torch.Tensor),
        "Empty Lance Latent",
    ),
    "VAE": (lambda v: hasattr(v, "decode") and hasattr(v, "encode"), "the VAE of Lance Loader"),
    "IMAGE": (lambda v: isinstance(v, torch.Tensor) and v.ndim in (3, 4), "Load Image"),
    "MASK": (lambda v: isinstance(v, torch.Tensor) and v.ndim in (2, 3, 4), "Load Image's MASK"),
    "VIDEO": (lambda v: hasattr(v, "get_components"), "Load Video"),
    "LANCE": (lambda v: isinstance(v, Reader), "the LANCE of Lance Loader"),
    "LANCE_VISION": (lambda v: isinstance(v, Vision), "Lance Vision Encode"),
    "LANCE_CHAT": (lambda v: isinstance(v, Chat), "the chat of another Lance Understand"),
}


def checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """A node's `execute` behind a check of what a queued prompt gave it by hand: a constant where a
    connection belongs, or a choice that is not in the list, which some ComfyUIs let through.

    Raises:
        RequestError: names the input, what came, and what to connect or choose.
    """

    @wraps(execute)
    def run(cls: Any, **values: Any) -> io.NodeOutput:
        for given in cls.define_schema().inputs:
            value = values.get(given.id)
            if value is None and (given.optional or given.id not in values):
                continue
            kind = given.get_io_type()
            if kind in LINKED and not LINKED[kind][0](value):
                raise RequestError(
                    f"The input {given.id!r} holds {shown(value)}: connect {LINKED[kind][1]} to it, which "
                    f"gives {kind}."
                )
            options = getattr(given, "options", None)
            if (
                isinstance(given, io.Combo.Input)
                and options
                and given.id != "checkpoint"
                and value not in options
            ):
                listed = ", ".join(map(str, options))
                listed = listed if len(listed) < 300 else f"{listed[:300]}…"
                raise RequestError(f"The input {given.id!r} is {shown(value)}, expected one of {listed}.")
        return execute(cls, **values)

    return run
