"""The understanding expert follows the generation expert: to its device, into its computing dtype, and, with
several GPUs, to each of them with the same patches.

ComfyUI's nodes for devices and dtypes change the patcher of the MODEL and not those it brings along.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from . import comfy_compat


def beside(main: Any, brought: Any) -> Any:
    """The patcher of a model that `main` brings along, fit to run beside it: itself, or a clone."""
    cast = main.force_cast_weights and not brought.force_cast_weights
    if brought.load_device == main.load_device and not cast:
        return brought
    # On the CPU ComfyUI takes plain patchers.
    plain = comfy_compat.is_dynamic(brought) and not comfy_compat.is_dynamic(main)
    follower = brought.clone(disable_dynamic=True) if plain else brought.clone()
    follower.load_device, follower.offload_device = main.load_device, main.offload_device
    if cast:
        follower.force_cast_weights = True
        follower.patches_uuid = uuid.uuid4()  # so that it is loaded anew, casting
    return follower


def follow(key: str) -> Callable[..., Any]:
    """A PREPARE_SAMPLING wrapper that fits the models brought along under `key` to their main model."""

    def prepare(executor: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        brought = model.additional_models.get(key, [])
        fit = [beside(model, patcher) for patcher in brought]
        if any(a is not b for a, b in zip(fit, brought, strict=True)):
            model.set_additional_models(key, fit)
        return executor(model, *args, **kwargs)

    return prepare


def match(main: Any, copy: Any, key: str) -> None:
    """Bring the patches of what `main` brings along to its counterparts on another device, as ComfyUI does
    for the main model alone. copy: `main`'s patcher there.
    """
    matched = []
    for ours, theirs in zip(main.additional_models[key], copy.additional_models[key], strict=True):
        n = ours.clone(model_override=theirs.get_clone_model_override())
        n.load_device, n.hook_backup = theirs.load_device, theirs.hook_backup
        matched.append(n)
    copy.set_additional_models(key, matched)


@contextmanager
def loaded_once(patchers: Sequence[Any]) -> Iterator[None]:
    """Let ComfyUI make copies of patchers of one checkpoint (`patcher.reloadable`) and read it once."""
    before = [p.cached_patcher_init for p in patchers]
    if any(init is None or init[:2] != before[0][:2] for init in before):
        yield
        return
    load = cache(before[0][0])
    try:
        for patcher, (_, *rest) in zip(patchers, before, strict=True):
            patcher.cached_patcher_init = (load, *rest)
        yield
    finally:
        for patcher, init in zip(patchers, before, strict=True):
            patcher.cached_patcher_init = init
