"""How ComfyUI's LoRA loaders read files for Lance.

ComfyUI asks a model for the names that LoRAs have for its layers, and then the file for these names. What it
knows of a family that is not its own are two forms of our module names. There is no place where a model could
say more, so its two functions are wrapped: for a Lance MODEL a file's names are translated first
(`lora_names`), what does not fit is refused, and PEFT's DoRA is computed as PEFT does. For every other model
they do what they did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import comfy.lora
import comfy.model_management as mm
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ..lance_core.errors import RequestError
from ..lance_core.model.joined import JOINED
from . import comfy_compat
from .lora_names import LENT, Names, refusal
from .merging import shape_of
from .model import LanceModel


class LanceKeys(dict):
    """ComfyUI's table of LoRA names, which says whose it is."""

    def __init__(self, keys: Mapping[str, Any], model: LanceModel) -> None:
        super().__init__(keys)
        self.model = model


class PeftDoRA(LoRAAdapter):
    """PEFT's DoRA: the rows of weight and LoRA together get the lengths that are stored.

    With W' = W + s B A, row i of the result is m_i W'_i / |W'_i| (arXiv 2402.09353, eq. 5). ComfyUI divides
    by the lengths of W, which other trainers' files mean. weights: see LoRAAdapter; [4] holds m, [out, 1].
    """

    name = "lora"

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        up, down, magnitude = (
            mm.cast_to_device(self.weights[i], weight.device, intermediate_dtype) for i in (0, 1, 4)
        )
        scale = 1.0 if self.weights[2] is None else self.weights[2] / down.shape[0]
        whole = weight.to(intermediate_dtype) + scale * up.flatten(1) @ down.flatten(1)
        done = magnitude * whole / whole.norm(dim=1, keepdim=True).clamp(min=1e-12)
        weight += function(strength * (done - weight)).to(weight.dtype)
        return weight


def _keys(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def model_lora_keys_unet(model: Any, *args: Any, **kwargs: Any) -> Any:
        keys = original(model, *args, **kwargs)
        return LanceKeys(keys, model) if isinstance(model, LanceModel) else keys

    return model_lora_keys_unet


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load_lora(lora: Any, to_load: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(to_load, LanceKeys):
            return original(lora, to_load, *args, **kwargs)
        return _loaded(original, lora, to_load, *args, **kwargs)

    return load_lora


def _loaded(original: Callable[..., Any], lora: Any, keys: LanceKeys, *args: Any, **kwargs: Any) -> Any:
    """A LoRA file's patches for a Lance MODEL.

    Raises:
        RequestError: none of it is for Lance, or it is for Lance of another size.
    """
    renamed = names_of(keys).rename(lora)
    patches = original(renamed.tensors, keys, *args, **kwargs)
    if not patches:
        raise refusal(lora)
    for module, magnitude in renamed.magnitudes.items():
        key = keys.get(module)
        adapter = patches.get(key)
        if isinstance(adapter, LoRAAdapter):
            weights = (*adapter.weights[:4], magnitude, *adapter.weights[5:])
            patches[key] = PeftDoRA(adapter.loaded_keys, weights)
    for key, patch in patches.items():
        _check_size(keys.model, key, patch)
    return patches


def names_of(keys: LanceKeys) -> Names:
    """The names of the model's modules, with the joined layers that it has not."""
    modules = {name.removeprefix(LENT) for name, key in keys.items() if key == f"{name}.weight"}
    apart: dict[str, list[tuple[str, slice]]] = {}
    for joined, parts in JOINED.items():
        owners = [n.removesuffix(f".{parts[0]}") for n in modules if n.endswith(f".{parts[0]}")]
        for owner in owners:
            if f"{owner}.{joined}" in modules:
                continue
            start, rows = 0, []
            for part in parts:
                shape = shape_of(keys.model, f"{LENT}{owner}.{part}.weight") or (0,)
                rows.append((f"{owner}.{part}", slice(start, start + shape[0])))
                start += shape[0]
            apart[f"{owner}.{joined}"] = rows
    return Names(modules, apart)


def _check_size(model: LanceModel, key: Any, patch: Any) -> None:
    """ComfyUI writes a line into its log where a patch does not fit, and goes on without."""
    found = _size(patch)
    expected = shape_of(model, key) if found else None
    if found is not None and expected is not None and found != expected:
        raise RequestError(
            f"The LoRA is for another size of model: it has {list(found)} for {key}, which is "
            f"{list(expected)} here. Choose one that was made for this checkpoint."
        )


def _size(patch: Any) -> tuple[int, ...] | None:
    """The shape of the weight a patch is for; None where it cannot be told."""
    if isinstance(patch, LoRAAdapter):
        up, down, _, mid, _, reshape, *_ = patch.weights
        return None if mid is not None or reshape is not None else (up.shape[0], *down.shape[1:])
    if isinstance(patch, tuple) and len(patch) == 2 and patch[0] in ("diff", "set"):
        return tuple(patch[1][0].shape)
    return None


def install() -> None:
    """Put our functions in front of ComfyUI's."""
    comfy_compat.stand_before(comfy.lora, "model_lora_keys_unet", _keys)
    comfy_compat.stand_before(comfy.lora, "load_lora", _load)
