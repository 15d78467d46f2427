"""Quantised layers as ComfyUI's: cast and offloaded by the host, patched by LoRAs, undone for each product.

Works on every host version; where a host has kernels of its own for a format, they are not used yet.
"""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.model_management as mm
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lance_core.quantize import Format


class QuantLinear(comfy.ops.manual_cast.Linear):
    """A linear layer of the host whose weight is kept in one of lance_core.quantize's formats.

    `weight` is the quantised tensor, with its scales beside it, so the host counts and moves what is really there.
    """

    def __init__(self, format: Format, in_features: int, out_features: int, bias: bool, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.format = format
        self.patched_dtype = dtype or torch.bfloat16
        self.layout = format.layout(out_features, in_features)
        for name, (kind, shape) in self.layout.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=kind, device=device), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_comfy_cast_weights(x)

    def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
        weight = mm.cast_to(self.weight, None, x.device)
        if weight.dtype == self.layout["weight"][0]:
            beside = {name: mm.cast_to(getattr(self, name), None, x.device) for name in self.layout if name != "weight"}
            weight = self.format.decode({"weight": weight, **beside}, x.dtype)
        else:  # patched for good
            weight = weight.to(x.dtype)
        for patch in self.weight_function:
            weight = _patched(patch, weight)
        bias = None if self.bias is None else mm.cast_to(self.bias, x.dtype, x.device)
        for patch in self.bias_function:
            bias = patch(bias)
        return F.linear(x, weight, bias)

    # What the host calls to patch a weight for good: it hands over `weight` as float32 and takes back what to keep.

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The quantised tensor, in whatever dtype the host has cast it to -> the weight it stands for, float32."""
        parts = {name: getattr(self, name).to(weight.device) for name in self.layout}
        parts["weight"] = weight.to(self.layout["weight"][0])
        return self.format.decode(parts, torch.float32)

    def set_weight(self, weight: Tensor, inplace_update: bool = False, seed: Any = None, return_weight: bool = False, **kwargs: Any):
        """A patched weight stays unquantised while the patch is on: rounding it to the old levels would undo most of a LoRA.

        The host's backup of the quantised `weight` brings the layer back as it was.
        """
        if return_weight:
            return weight
        self.weight = nn.Parameter(weight.to(self.patched_dtype), requires_grad=False)


def _patched(patch: Any, weight: Tensor) -> Tensor:
    """A low-VRAM LoRA on the decoded weight; the host's own call would decode it a second time."""
    if hasattr(patch, "patches") and hasattr(patch, "key"):
        return comfy.lora.calculate_weight(patch.patches[patch.key], weight, patch.key, intermediate_dtype=weight.dtype)
    return patch(weight)


def make(format: Format, linear: nn.Module) -> QuantLinear:
    """The quantised layer that takes a host's plain one's place (see lance_core.quantize.swap)."""
    return QuantLinear(format, linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
