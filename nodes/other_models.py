"""Nodes made for other kinds of models: what they are told where Lance has nothing that they change."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..lance_core.errors import RequestError
from .layer_patches import LayerPatches
from .windows import Window


class Structure(dict):
    """What ComfyUI calls a unet_config. Nodes that look up what only UNets have are told so."""

    def __missing__(self, name: str) -> Any:
        raise RequestError(
            f"A node asks for the model's {name!r}, which only UNets have (FreeU and its like change their "
            "blocks); Lance is a transformer. Take the node out."
        )


def warn_once(model: Any, text: str) -> None:
    """Once a sampling run."""
    if text not in model.warned:
        model.warned.add(text)
        logging.warning(text)


def warn_unused(model: Any, patches: LayerPatches) -> None:
    """Say what nothing in the model looks at."""
    if not model.unused:
        model.unused = patches.unused_text()
        warn_once(
            model,
            "Lance has no layers for what a node has put on the model, so it does nothing: "
            f"{model.unused}. Such nodes are made for UNets or for models of other layers.",
        )


def warn_apart(model: Any, patches: LayerPatches, options: Mapping[str, Any]) -> None:
    """Say that Normalized Attention Guidance, which compares rows of one call, has none to compare."""
    names = [str(getattr(f, "__qualname__", "")).lower() for f in patches.attended]
    if any("nag" in name for name in names) and len(set(options.get("cond_or_uncond") or ())) == 1:
        warn_once(
            model,
            "Normalized Attention Guidance does nothing in this run: it compares positive and negative, and "
            "they do not run in one batch here, for want of memory or because they are on different GPUs.",
        )


def warn_not_retained(model: Any, window: Window | None) -> None:
    """Say that a window has no place for a first frame that it is to begin with."""
    if window is not None and not window.anchored and window.indices[0] != 0:
        warn_once(
            model,
            "The first frame is not retained in the context windows that it is not in: there is only room "
            "for it in front of them, so turn causal_window_fix on.",
        )


def explain(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper: a node that fails because its patches were never called is named."""
    main = executor.class_obj.model_patcher
    for one in (main, *main.additional_models.get("multigpu", [])):
        one.model.unused, one.model.warned = "", set()
    try:
        return executor(*args, **kwargs)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        if not main.model.unused:
            raise
        raise RequestError(
            f"A node made for another kind of model failed: it changes layers that Lance does not have "
            f"({main.model.unused}), and says: {error}. Take it out between Lance Loader and the sampler."
        ) from error
