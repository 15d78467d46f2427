"""Quantised layers as ComfyUI's: counted, cast and offloaded by it, with LoRAs, dequantised for each product.

Where ComfyUI has layers for quantised weights these are used, with its kernels for dequantising and its
dynamic VRAM; elsewhere our own are. Both are weight-only, which ComfyUI's are not in every case: 0.29
multiplies int8 weights by activations that it rounds to 8 bits, token by token, even where a file asks for
full precision. Single channels of a language model's activations can be so much larger than the others that
those would vanish.

Who adds a LoRA to a quantised weight, and when:

| ComfyUI | layer fully loaded                     | layer streamed                                        |
|---------|----------------------------------------|-------------------------------------------------------|
| 0.3.64  | our layer, in each product (`lora`)    | our layer, by `weight_function` as ComfyUI sets it    |
| newer   | ComfyUI's layer with `patched`, `lora` | the same, by `weight_lowvram_function` -> `take_lora` |

A LoRA of a conditioning hook comes by `hook`, on all four.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management as mm
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lance_core.checkpoint.quantize import Format
from . import comfy_compat, comfy_quant


class Patches(NamedTuple):
    """The LoRAs of one weight, as ComfyUI keeps them: all of a patcher's patches, and the weight's key in
    them.
    """

    key: str
    patches: dict


def _add(patches: Any, weight: Tensor) -> Tensor:
    return comfy.lora.calculate_weight(
        patches.patches[patches.key], weight, patches.key, intermediate_dtype=weight.dtype
    )


class Quantised:
    """What quantised layers of either kind share: LoRAs are added to the dequantised weight, in each product
    anew.

    ComfyUI rounds a patched weight to its format again. For a LoRA of 1 % of a (random) weight's norm that
    was measured to add, as seen in outputs, 1.2 (int8), 2.3 (fp8) and 18 (nvfp4) times the LoRA's own effect
    as noise; and int4 cannot be made anew at all. Keeping patched weights unrounded would take two to four
    times the memory, of which ComfyUI does not know. So neither is done.
    """

    format: Format
    patched_dtype: torch.dtype
    weight_function: list
    out_features: int
    in_features: int
    lora: Patches | None = None
    hook: Patches | None = None

    def patched(self, weight: Tensor) -> Tensor:
        """A dequantised weight with the LoRAs that ComfyUI has not added (see the table above)."""
        # A layer that is not fully loaded has had its LoRA by then.
        done = any(hasattr(function, "patches") for function in self.weight_function)
        for patches in (None if done else self.lora, self.hook):
            weight = weight if patches is None else _add(patches, weight)
        return weight

    def take_lora(self, key: str, patches: dict | None) -> None:
        """Where dynamic VRAM gives a layer its LoRA."""
        self.lora = None if patches is None else Patches(key, patches)

    def set_weight(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """If a patcher that is not ours writes a patched weight permanently, keep it in full precision until
        ComfyUI restores the backup.
        """
        if kwargs.get("return_weight"):
            return weight
        self.weight = nn.Parameter(weight.to(self.patched_dtype), requires_grad=False)
        return None


class OwnQuantLinear(Quantised, comfy.ops.manual_cast.Linear):
    """Where ComfyUI has no such layer. `weight` is the quantised tensor, with its scales beside it."""

    def __init__(
        self, format: Format, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        self.format, self.patched_dtype = format, dtype
        self.layout = format.layout(out_features, in_features)
        for name, (kind, shape) in self.layout.items():
            setattr(
                self, name, nn.Parameter(torch.empty(shape, dtype=kind, device="meta"), requires_grad=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_comfy_cast_weights(x)

    def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
        weight = mm.cast_to(self.weight, None, x.device)
        if weight.dtype == self.layout["weight"][0]:
            beside = {
                name: mm.cast_to(getattr(self, name), None, x.device)
                for name in self.layout
                if name != "weight"
            }
            weight = self.format.decode({"weight": weight, **beside}, x.dtype)
        else:  # patched permanently
            weight = weight.to(x.dtype)
        for (
            function
        ) in self.weight_function:  # called as it is, a LoRA would dequantise the weight a second time
            weight = _add(function, weight) if hasattr(function, "patches") else function(weight)
        bias = None if self.bias is None else mm.cast_to(self.bias, x.dtype, x.device)
        for function in self.bias_function:
            bias = function(bias)
        return F.linear(x, self.patched(weight), bias)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The quantised tensor, in whatever dtype ComfyUI has cast it to -> the weight it stands for,
        float32.
        """
        parts = {name: getattr(self, name).to(weight.device) for name in self.layout}
        parts["weight"] = weight.to(self.layout["weight"][0])
        return self.format.decode(parts, torch.float32)


def make(format: Format, linear: Any) -> nn.Module:
    """The quantised layer that takes the place of ComfyUI's plain one (see
    lance_core.checkpoint.quantize.swap).
    """
    dtype, bias = comfy_compat.planned(linear)
    dtype = dtype if dtype.itemsize > 1 else torch.bfloat16
    layer = comfy_quant.quantised_linear(dtype, Quantised) or OwnQuantLinear
    return layer(format, linear.in_features, linear.out_features, bias, dtype)
