"""torch.compile for the decoder: what lies between a layer's matrix products, fused."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from ..errors import RequestError
from .decoder import MLP, ExpertLayer, Steps, add_attention, project


def compile_layers(module: nn.Module) -> nn.Module:
    """Have torch.compile fuse what lies between a layer's matrix products, in place; returns the module.

    All layers of both experts share three compiled functions. Sizes are symbolic: other prompts and pictures
    compile nothing anew, only once for one row and once for several, one token and several.
    """
    for layer in module.modules():
        if isinstance(layer, ExpertLayer):
            layer.steps = _compiled_steps()
    return module


def check_compiler(device: torch.device) -> None:
    """Compile a small function, so that a missing compiler is reported before any weight is read.

    Raises:
        RequestError: torch.compile does not work on this machine; says why.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except (
        Exception
    ) as error:  # a C++ compiler, Triton, Python's headers: whatever is missing has an exception of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"compile: torch.compile does not work here ({reason[:200]}); leave it off, or install what is "
            "missing"
        ) from None


@cache
def _compiled_steps() -> Steps:
    return Steps(
        torch.compile(project, dynamic=True),
        torch.compile(add_attention, dynamic=True),
        torch.compile(MLP.forward, dynamic=True),
    )
