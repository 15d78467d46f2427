"""Quantised layers as ComfyUI's: counted, cast and offloaded by the host, with LoRAs, undone for each
product.

Where the host has layers for quantised weights these are used, with the kernels it undoes them with and its
dynamic VRAM; elsewhere our own are. Both are weight-only, which the host's are not in every case: 0.29
multiplies int8 weights by activations that it rounds to 8 bits, token by token, even where a file asks for
full precision. Single channels of a language model's activations can be so much larger than the others that
those would vanish.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management as mm
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lance_core.checkpoint.quantize import Format, marker
from . import host

HOST_NAMES = {"fp8": "float8_e4m3fn"}  # where files use an older form, which has none


class Patches(NamedTuple):
    """What LoRAs do to one weight, as the host keeps it: all of a patcher's patches, and the weight's key in
    them.
    """

    key: str
    patches: dict


def _add(patches: Any, weight: Tensor) -> Tensor:
    return comfy.lora.calculate_weight(
        patches.patches[patches.key], weight, patches.key, intermediate_dtype=weight.dtype
    )


class Quantised:
    """What quantised layers of either kind share: LoRAs are added to the undone weight, in each product anew.

    Hosts round a patched weight to its format again. For a LoRA of 1 % of a (random) weight's norm that was
    measured to add, as seen in outputs, 1.2 (int8), 2.3 (fp8) and 18 (nvfp4) times the LoRA's own effect as
    noise; and int4 cannot be made anew at all. Keeping patched weights unrounded would take two to four times
    the memory, which the host does not know of. So neither is done.
    """

    format: Format
    patched_dtype: torch.dtype
    lora: Patches | None = None
    hook: Patches | None = None

    def patched(self, weight: Tensor) -> Tensor:
        """An undone weight with what `PatchesInForward` found to be done to it, and the host has not done."""
        done = any(
            hasattr(function, "patches") for function in self.weight_function
        )  # in a layer that is not fully loaded
        for patches in (None if done else self.lora, self.hook):
            weight = weight if patches is None else _add(patches, weight)
        return weight

    def set_weight(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """Where a patcher not of ours patches a weight for good, it stays unrounded until the host brings its
        backup back.
        """
        if kwargs.get("return_weight"):
            return weight
        self.weight = nn.Parameter(weight.to(self.patched_dtype), requires_grad=False)


class QuantLinear(Quantised, comfy.ops.manual_cast.Linear):
    """On hosts without such layers. `weight` is the quantised tensor, with its scales beside it."""

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
        else:  # patched for good
            weight = weight.to(x.dtype)
        for function in self.weight_function:  # a LoRA's own call would undo the weight a second time
            weight = _add(function, weight) if hasattr(function, "patches") else function(weight)
        bias = None if self.bias is None else mm.cast_to(self.bias, x.dtype, x.device)
        for function in self.bias_function:
            bias = function(bias)
        return F.linear(x, self.patched(weight), bias)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The quantised tensor, in whatever dtype the host has cast it to -> the weight it stands for,
        float32.
        """
        parts = {name: getattr(self, name).to(weight.device) for name in self.layout}
        parts["weight"] = weight.to(self.layout["weight"][0])
        return self.format.decode(parts, torch.float32)


@cache
def host_linear(dtype: torch.dtype) -> type | None:
    """The host's layer for quantised weights that undoes them to a dtype, with our LoRAs; None where it has
    none.
    """
    base = host.quantised_linear(dtype)
    return base and type("HostQuantLinear", (_HostLinear, base), {})


class _HostLinear(Quantised):
    """In front of the host's layer, whose `weight` is a tensor that knows its scales and how it is undone."""

    def __init__(
        self, format: Format, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(
            in_features, out_features, bias=bias
        )  # without a device: the host brings what is loaded to it
        self.format, self.patched_dtype, self.matrix = format, dtype, (out_features, in_features)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        named = replace(self.format, host=self.format.host or HOST_NAMES[self.format.name])
        try:
            super()._load_from_state_dict({**state, f"{prefix}comfy_quant": marker(named)}, prefix, *args)
        except (
            KeyError,
            ValueError,
        ):  # the host cannot undo this format: it is told how (names are checked in Checkpoint)
            parts = {name: state[prefix + name] for name in self.format.layout(*self.matrix)}
            weight = host.quantised_tensor(self.format, parts, self.matrix, self.patched_dtype)
            self.weight, self.quant_format, self._full_precision_mm = (
                nn.Parameter(weight, requires_grad=False),
                named.host,
                True,
            )
            if self.bias is not None:
                self.bias = nn.Parameter(state[f"{prefix}bias"], requires_grad=False)

    def set_weight(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if not kwargs.get("return_weight"):
            return super().set_weight(weight)
        # To be saved, in the form that the layer has there.
        return host.quantised_tensor(self.format, self.format.encode(weight), self.matrix, self.patched_dtype)

    def _forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.patched(host.undone(weight)), bias)

    @property
    def weight_lowvram_function(self) -> None:
        """Where dynamic VRAM leaves a LoRA; the host would round the sum with it, see `Quantised`."""
        return None

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, function: Any) -> None:
        self.lora = function and Patches(function.key, function.patches)


class PatchesInForward(host.Behaviour):
    """Patcher behaviour: what LoRAs do to a quantised weight is left for its layer to do (see `Quantised`)."""

    def _layer(self, key: str) -> Quantised | None:
        name, _, leaf = key.rpartition(".")
        layer = comfy.utils.get_attr(self.model, name) if leaf == "weight" else None
        return layer if isinstance(layer, Quantised) else None

    def _layers(self) -> dict[str, Quantised]:
        return {
            f"{name}.weight": layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, Quantised)
        }

    def model_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the scales, which newer hosts name here and then do not find when they look for what a hook
        may patch.
        """
        layers = self._layers()
        scale = lambda k: f"{k.rpartition('.')[0]}.weight" in layers and not k.endswith((".weight", ".bias"))  # noqa: E731
        return {k: v for k, v in super().model_state_dict(*args, **kwargs).items() if not scale(k)}

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer(key) if key in self.patches else None
        if layer is None or kwargs.get("return_weight"):
            return super().patch_weight_to_device(key, *args, **kwargs)
        layer.lora = Patches(key, self.patches)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for layer in self._layers().values():
                layer.lora = None

    def patch_hook_weight_to_device(self, *args: Any, **kwargs: Any) -> None:
        if self._layer(kwargs["key"] if "key" in kwargs else args[2]) is None:
            super().patch_hook_weight_to_device(*args, **kwargs)

    def patch_hooks(self, hooks: Any) -> None:
        super().patch_hooks(hooks)
        patches = self.get_combined_hook_patches(hooks)
        for key, layer in self._layers().items():
            layer.hook = Patches(key, patches) if key in patches else None

    def unpatch_hooks(self, *args: Any, **kwargs: Any) -> None:
        super().unpatch_hooks(*args, **kwargs)
        for layer in self._layers().values():
            layer.hook = None


def make(format: Format, linear: nn.Module) -> nn.Module:
    """The quantised layer that takes a host's plain one's place (see lance_core.quantize.swap)."""
    dtype, bias = host.planned(linear)
    dtype = dtype if dtype.itemsize > 1 else torch.bfloat16
    return (host_linear(dtype) or QuantLinear)(format, linear.in_features, linear.out_features, bias, dtype)
