"""ComfyUI's layer for quantised weights, made to hold ours: unrounded LoRAs, formats it does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lance_core.checkpoint.quantize import Format, marker
from . import comfy_compat

if TYPE_CHECKING:
    from comfy.ops import mixed_precision_ops as _Layer
else:
    _Layer = object  # which class stands behind is known only at run time

FORMAT_NAMES = {"fp8": "float8_e4m3fn"}  # of ComfyUI, where our files use an older form, which has none


@cache
def quantised_linear(dtype: torch.dtype, lora_adding: type) -> Any | None:
    """A ComfyUI subclass of its linear layer for quantised weights, which dequantises to a dtype; None where
    ComfyUI has no such layer, as 0.3.64.

    lora_adding: a class with `patched(weight)`, a dequantised weight with its LoRAs, `take_lora(key,
    patches)`, and `set_weight` for weights that are patched permanently.
    """
    if not comfy_compat.knows_quantised():
        return None
    native = comfy.ops.mixed_precision_ops(compute_dtype=dtype).Linear
    return type("ComfyQuantLinear", (_WeightOnly, lora_adding, native), {})


class _WeightOnly(_Layer):
    """In front of ComfyUI's quantised layer, whose `weight` is a tensor that knows its scales and how to
    dequantise itself.

    The names overridden here are private to ComfyUI and have changed before.
    """

    format: Format
    patched_dtype: torch.dtype
    matrix: tuple[int, int]
    weight: Any
    bias: Any
    patched: Callable[[Tensor], Tensor]
    take_lora: Callable[[str, dict | None], None]

    def __init__(
        self, format: Format, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
    ) -> None:
        # Without a device: ComfyUI moves what is loaded.
        super().__init__(in_features, out_features, bias=bias)
        self.format, self.patched_dtype, self.matrix = format, dtype, (out_features, in_features)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        named = dataclasses.replace(self.format, host=self.format.host or FORMAT_NAMES[self.format.name])
        try:
            super()._load_from_state_dict({**state, f"{prefix}comfy_quant": marker(named)}, prefix, *args)
        except (KeyError, ValueError):  # ComfyUI does not know this format; names are checked in Checkpoint
            parts = {name: state[prefix + name] for name in self.format.layout(*self.matrix)}
            weight = _quantised_tensor(self.format, parts, self.matrix, self.patched_dtype)
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.quant_format, self._full_precision_mm = named.host, True
            if self.bias is not None:
                self.bias = nn.Parameter(state[f"{prefix}bias"], requires_grad=False)

    def set_weight(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if not kwargs.get("return_weight"):
            return super().set_weight(weight)
        # To be saved, in the form that the layer has there.
        return _quantised_tensor(self.format, self.format.encode(weight), self.matrix, self.patched_dtype)

    def _forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.patched(_dequantised(weight)), bias)

    @property
    def weight_lowvram_function(self) -> None:
        """Where dynamic VRAM leaves a LoRA; ComfyUI would round the sum with it, see `quant.Quantised`."""
        return None

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, function: Any) -> None:
        self.take_lora(function.key if function else "", function.patches if function else None)


def _quantised_tensor(
    format: Format, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """A weight [N, K] of a format that ComfyUI does not know, as its kind of tensor, told how to dequantise
    it.
    """
    names = [name for name in format.layout(*shape) if name != "weight"]
    name, layout = _layout(format, tuple(names))
    scale, *others = (parts[name] for name in names)
    params = layout.Params(scale, dtype, shape, *others)
    return comfy_compat.quant_ops.QuantizedTensor(parts["weight"], name, params)


@cache
def _layout(format: Format, names: tuple[str, ...]) -> tuple[str, Any]:
    """ComfyUI's description of a format whose side tensors have these names, and the name it has there."""
    from comfy_kitchen.tensor import BaseLayoutParams

    fields = ("scale", *names[1:])  # ComfyUI's name for the first

    class Layout(comfy_compat.quant_ops.QuantizedLayout):
        Params = dataclasses.make_dataclass(
            "Params",
            [(name, Tensor) for name in fields[1:]],
            bases=(BaseLayoutParams,),
            frozen=True,
            namespace={"_tensor_fields": lambda self: list(fields)},
        )

        @classmethod
        def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
            beside = {name: getattr(params, field) for name, field in zip(names, fields, strict=True)}
            return format.decode({"weight": qdata, **beside}, params.orig_dtype)

        @classmethod
        def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
            pairs = zip(names, fields, strict=True)
            return {"": qdata} | {
                name.removeprefix("weight"): getattr(params, field) for name, field in pairs
            }

    name = f"Lance{format.name}"
    comfy_compat.quant_ops.register_layout_class(name, Layout)
    return name, Layout


def quantised_parts(layer: Any) -> dict[str, Tensor]:
    """The tensors of a quantised layer's weight, by their names in `Format.layout`."""
    if comfy_compat.is_quantised(layer.weight):
        return layer.weight.state_dict("weight")
    return {name: getattr(layer, name) for name in layer.layout}


def _dequantised(weight: Tensor) -> Tensor:
    """A weight for a product: quantised ones in full precision."""
    return weight.dequantize() if comfy_compat.is_quantised(weight) else weight
