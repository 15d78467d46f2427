"""Nodes made for other kinds of models: what they are told where Lance has nothing that they change."""

from __future__ import annotations

import logging
from typing import Any

from ..lance_core.errors import RequestError
from .layer_patches import LayerPatches


class Structure(dict):
    """What ComfyUI calls a unet_config. Nodes that look up what only UNets have are told so."""

    def __missing__(self, name: str) -> Any:
        raise RequestError(
            f"A node asks for the model's {name!r}, which only UNets have (FreeU and its like change their "
            "blocks); Lance is a transformer. Take the node out."
        )


def warn(model: Any, patches: LayerPatches) -> None:
    """Say once a sampling run what nothing in the model looks at."""
    if not model.unused:
        model.unused = patches.unused_text()
        logging.warning(
            "Lance has no layers for what a node has put on the model, so it does nothing: "
            f"{model.unused}. Such nodes are made for UNets or for models of other layers."
        )


def explain(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper: a node that fails because its patches were never called is named."""
    main = executor.class_obj.model_patcher
    for one in (main, *main.additional_models.get("multigpu", [])):
        one.model.unused = ""
    try:
        return executor(*args, **kwargs)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        if not main.model.unused:
            raise
        raise RequestError(
            f"A node made for another kind of model failed: it changes layers that Lance does not have "
            f"({main.model.unused}), and says: {error}. Take it out between Lance Loader and the sampler."
        ) from error
