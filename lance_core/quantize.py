"""Quantised linear layers: the formats ComfyUI's own kernels read, made and undone in plain PyTorch.

| format | weight | beside it | bits |
|---|---|---|---|
| fp8 | float8_e4m3fn [N, K] | weight_scale float32 [] (on disk `scale_weight`, with a `scaled_fp8` marker) | 8 |
| int8 | int8 [N, K] | weight_scale float32 [N, 1], a row each | 8 |
| int4 | int8 [N, K/2], two to a byte, low nibble first | weight_scale, weight_zeros bfloat16 [K/64, N]; W = (q - 8) s + z | 4.5 |

Only attention and feed-forward of the experts' layers are ever quantised, less the first and the last: embeddings, heads, norms, latents in and
out, the time MLP, the ViT and the VAE stay as they are. All are weight-only: the product runs in the compute dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 64
FP8_MAX = 448.0  # largest float8_e4m3fn
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Format:
    """One way to keep a weight [N, K].

    host: its name in ComfyUI's `comfy_quant` (None for the older scaled fp8). layout: dtypes and shapes of its tensors.
    scales: weight -> the tensors beside it. levels: weight and those -> the quantised tensor. decode: back.
    """

    name: str
    host: str | None
    layout: Callable[[int, int], Layout]
    scales: Callable[[Tensor], dict[str, Tensor]]
    levels: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    decode: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for a weight."""
        weight = weight.float()
        beside = self.scales(weight)
        return {"weight": self.levels(weight, beside), **beside}

    def fits(self, n: int, k: int) -> bool:
        """Whether a weight of this shape can be kept so."""
        return self.name != "int4" or k % GROUP == 0


def _fp8_scales(weight: Tensor) -> dict[str, Tensor]:
    return {"weight_scale": (weight.abs().amax() / FP8_MAX).clamp(min=1e-12)}


def _fp8_levels(weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    return (weight / beside["weight_scale"]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _int8_scales(weight: Tensor) -> dict[str, Tensor]:
    return {"weight_scale": (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)}


def _int8_levels(weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    return (weight / beside["weight_scale"]).round().clamp(-127, 127).to(torch.int8)


def _scaled_decode(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    return parts["weight"].to(dtype) * parts["weight_scale"].to(dtype)


def _int4_scales(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))  # [N, K/64, 64]
    low, high = groups.amin(-1), groups.amax(-1)
    # bfloat16 before the levels are chosen, so that these are chosen against the scale and zero that will be used.
    scale = ((high - low) / 15).clamp(min=1e-12).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    return {"weight_scale": scale.T.contiguous(), "weight_zeros": zero.T.contiguous()}


def _int4_levels(weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    scale, zero = (beside[name].T.float()[..., None] for name in SIDE_TENSORS)
    levels = ((weight.unflatten(1, (-1, GROUP)) - zero) / scale).round().add(8).clamp(0, 15).flatten(1).to(torch.uint8)
    return (levels[:, 0::2] | levels[:, 1::2] << 4).view(torch.int8)


def _int4_decode(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    packed = parts["weight"].view(torch.uint8)
    levels = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)  # [N, K]
    groups = levels.unflatten(1, (-1, GROUP)).to(dtype) - 8
    return (groups * parts["weight_scale"].T[..., None].to(dtype) + parts["weight_zeros"].T[..., None].to(dtype)).flatten(1)


SIDE_TENSORS = ("weight_scale", "weight_zeros")
FORMATS = {
    f.name: f
    for f in (
        Format(
            "fp8",
            None,
            lambda n, k: {"weight": (torch.float8_e4m3fn, (n, k)), "weight_scale": (torch.float32, ())},
            _fp8_scales,
            _fp8_levels,
            _scaled_decode,
        ),
        Format(
            "int8",
            "int8_tensorwise",
            lambda n, k: {"weight": (torch.int8, (n, k)), "weight_scale": (torch.float32, (n, 1))},
            _int8_scales,
            _int8_levels,
            _scaled_decode,
        ),
        Format(
            "int4",
            "awq_w4a16",
            lambda n, k: {
                "weight": (torch.int8, (n, k // 2)),
                "weight_scale": (torch.bfloat16, (k // GROUP, n)),
                "weight_zeros": (torch.bfloat16, (k // GROUP, n)),
            },
            _int4_scales,
            _int4_levels,
            _int4_decode,
        ),
    )
}
ON_DISK = {"fp8": {"weight_scale": "scale_weight"}}  # ComfyUI's older name, which old and new hosts both read
IGNORED_SUFFIXES = ("comfy_quant", "scale_input", "input_scale")  # what says or serves other kernels, not the numbers


def marker(format: Format) -> Tensor | None:
    """The `comfy_quant` tensor that tells ComfyUI a layer's format; weight-only."""
    if format.host is None:
        return None
    text = json.dumps({"format": format.host, "full_precision_matrix_mult": True}, separators=(",", ":"))
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def formats_of(dtypes: Mapping[str, torch.dtype]) -> dict[str, Format]:
    """Which layers are quantised and how, told by their tensors' names and dtypes (module names, `weight_scale` form)."""
    found = {}
    for name in dtypes:
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight_scale":
            continue
        weight = dtypes.get(f"{layer}.weight")
        if f"{layer}.weight_zeros" in dtypes:
            found[layer] = FORMATS["int4"]
        elif weight is torch.int8:
            found[layer] = FORMATS["int8"]
        elif weight is torch.float8_e4m3fn:
            found[layer] = FORMATS["fp8"]
    return found


def quantisable(name: str, layers: int | None = None) -> bool:
    """Whether a module's tensor may be quantised: a matrix of a decoder layer's attention or feed-forward.

    Given the number of `layers`, the first and the last stay as they are: on random weights of 4 layers that drifted less than
    keeping the two in the middle (scripts/measure_quality.py); trained weights were not at hand.
    """
    if not (name.startswith("layers.") and name.endswith("_proj.weight")):
        return False
    return layers is None or name.split(".")[1] not in ("0", str(layers - 1))


class QuantLinear(nn.Module):
    """A linear layer whose weight is kept quantised and undone for each product."""

    def __init__(self, format: Format, in_features: int, out_features: int, bias: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.format = format
        for name, (kind, shape) in format.layout(out_features, in_features).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=kind, device=device), requires_grad=False))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.format.decode(dict(self.named_parameters(recurse=False)), x.dtype), self.bias)


def swap(module: nn.Module, formats: Mapping[str, Format], make: Callable[[Format, nn.Module], nn.Module] | None = None) -> nn.Module:
    """Replace the named linear layers by quantised ones without weights. `make` builds a host's own kind of layer."""
    for name, format in formats.items():
        parent, _, leaf = name.rpartition(".")
        linear = module.get_submodule(name)
        new = (
            make(format, linear) if make else QuantLinear(format, linear.in_features, linear.out_features, linear.bias is not None, "meta")
        )
        setattr(module.get_submodule(parent), leaf, new)
    return module


def error_of(weight: Tensor, format: Format) -> float:
    """Relative error ||decoded - weight|| / ||weight|| of keeping a weight in a format."""
    decoded = format.decode(format.encode(weight), torch.float32)
    return float((decoded - weight.float()).norm() / weight.float().norm())


def stored_names(format: Format, names: Iterable[str]) -> dict[str, str]:
    """Leaf names in the module -> on disk."""
    return {name: ON_DISK.get(format.name, {}).get(name, name) for name in names}
