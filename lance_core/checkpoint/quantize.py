"""Quantised linear layers: the formats that ComfyUI's kernels read, encoded and decoded in plain PyTorch.

| format | weight | beside it | bits |
|---|---|---|---|
| fp8 | float8_e4m3fn [N, K] | weight_scale float32 [] (on disk `scale_weight`, with a `scaled_fp8` marker) |
8 |
| int8 | int8 [N, K] | weight_scale float32 [N, 1], a row each | 8 |
| int4 | int8 [N, K/2], two to a byte, low nibble first | weight_scale, weight_zeros bfloat16 [K/64, N]; W =
(q - 8) s + z | 4.5 |
| nvfp4 | uint8 [N, K/2], two to a byte, high nibble first | weight_scale float8_e4m3fn [N, K/16] in tiles,
weight_scale_2 float32 [] | 4.5 |

Only attention and feed-forward of the experts' layers are ever quantised, less the first and the last:
embeddings, heads, norms, latents in and out, the time MLP, the ViT and the VAE stay as they are. All are
weight-only: the product runs in the compute dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP, BLOCK = 64, 16  # weights of a row that share a scale, in int4 and in nvfp4
FP8_MAX = 448.0  # largest float8_e4m3fn
E2M1_MAX = 6.0  # largest float4_e2m1; the others are 0, 0.5, 1, 1.5, 2, 3 and 4
TILE_ROWS, TILE_COLUMNS = 128, 4  # of nvfp4's scales
ROWS = 128  # quantised at once where it takes many steps, so that these work within the processor's cache
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Format:
    """One way to keep a weight [N, K].

    host: its name in ComfyUI's `comfy_quant` (None for the older scaled fp8). layout: dtypes and shapes of
    its tensors.
    scales: weight -> the tensors beside it. levels: weight and those -> the quantised tensor. decode: back.
    multiple: N and K must be multiples of these. per_byte: weights in a byte of the quantised tensor.
    """

    name: str
    host: str | None
    layout: Callable[[int, int], Layout]
    scales: Callable[[Tensor], dict[str, Tensor]]
    levels: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    decode: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]
    multiple: tuple[int, int] = (1, 1)
    per_byte: int = 1

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for a weight."""
        weight = weight.float()
        beside = self.scales(weight)
        return {"weight": self.levels(weight, beside), **beside}

    def fits(self, n: int, k: int) -> bool:
        """Whether a weight of this shape can be kept so."""
        return n % self.multiple[0] == 0 and k % self.multiple[1] == 0


def _fp8_scales(weight: Tensor) -> dict[str, Tensor]:
    return {"weight_scale": (weight.abs().amax() / FP8_MAX).clamp(min=1e-12)}


def _fp8_levels(weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    return (weight / beside["weight_scale"]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _int8_scales(weight: Tensor) -> dict[str, Tensor]:
    return {"weight_scale": (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)}


def _int8_levels(weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    return (weight / beside["weight_scale"]).round().clamp(-127, 127).to(torch.int8)


def _fp8_decode(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    return parts["weight"].to(dtype).mul_(parts["weight_scale"].to(dtype))


def _int8_decode(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    # Multiplied in float32 and rounded once; `out` saves a copy of the weight in float32.
    weight = parts["weight"]
    return torch.mul(weight, parts["weight_scale"].float(), out=torch.empty_like(weight, dtype=dtype))


def _int4_scales(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))  # [N, K/64, 64]
    low, high = groups.amin(-1), groups.amax(-1)
    # bfloat16 before the levels are chosen, so that these are chosen against the scale and zero that will be
    # used.
    scale = ((high - low) / 15).clamp(min=1e-12).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    return {"weight_scale": scale.T.contiguous(), "weight_zeros": zero.T.contiguous()}


def _int4_levels(weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    scale, zero = (beside[name].T.float()[..., None] for name in ("weight_scale", "weight_zeros"))
    levels = (
        ((weight.unflatten(1, (-1, GROUP)) - zero) / scale)
        .round()
        .add(8)
        .clamp(0, 15)
        .flatten(1)
        .to(torch.uint8)
    )
    return (levels[:, 0::2] | levels[:, 1::2] << 4).view(torch.int8)


def _int4_decode(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    packed = parts["weight"].view(torch.uint8)
    levels = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)  # [N, K]
    scale, zero = (parts[name].T[..., None].to(dtype) for name in ("weight_scale", "weight_zeros"))
    return levels.unflatten(1, (-1, GROUP)).to(dtype).sub_(8).mul_(scale).add_(zero).flatten(1)


def _tiled(scales: Tensor) -> Tensor:
    """Block scales [N, K/16] -> the order tensor cores read, both sizes padded to whole tiles of 128x4.

    Row r, column c of a tile lies at (r % 32) * 16 + r // 32 * 4 + c (NVIDIA, cuBLAS, "1D block scaling
    factors layout").
    """
    n, k = scales.shape
    padded = F.pad(scales, (0, -k % TILE_COLUMNS, 0, -n % TILE_ROWS))
    tiles = padded.view(
        padded.shape[0] // TILE_ROWS, 4, 32, -1, TILE_COLUMNS
    )  # tile, r // 32, r % 32, tile, c
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape)


def _untiled(scales: Tensor, n: int, k: int) -> Tensor:
    """What `_tiled` was given, [n, k]."""
    tiles = scales.view(scales.shape[0] // TILE_ROWS, -1, 32, 4, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(scales.shape)[:n, :k]


def _e2m1(blocks: Tensor, scale: Tensor) -> Tensor:
    """The nearest float4_e2m1 values; halfway between two, the one whose last bit is 0. blocks [N, K/16, 16],
    scale [N, K/16].
    """
    scaled = (
        (blocks / scale[..., None]).nan_to_num_(0, 0, 0).clamp_(-E2M1_MAX, E2M1_MAX)
    )  # 0 where the scale is
    size = scaled.abs()
    step = (size >= 2).float().add_(1).div_(2).add_(size >= 4)  # 1/2 below 2, 1 below 4, then 2
    return scaled.div_(step).round_().mul_(step)


def _nvfp4_scales(weight: Tensor) -> dict[str, Tensor]:
    # A power of two, which costs no digits: with it every product of the three factors is exact, in bfloat16,
    # too.
    whole = torch.ldexp(
        torch.ones((), device=weight.device), torch.frexp(weight.abs().amax() / (FP8_MAX * E2M1_MAX)).exponent
    )
    scale = torch.cat([_block_scales(rows.unflatten(1, (-1, BLOCK)), whole) for rows in weight.split(ROWS)])
    return {"weight_scale": _tiled(scale).to(torch.float8_e4m3fn), "weight_scale_2": whole}


def _block_scales(blocks: Tensor, whole: Tensor) -> Tensor:
    """[rows, K/16, 16] -> the better of two scales for each block, [rows, K/16] of float8_e4m3fn's values.

    They make a block's largest weight a 6 or a 4: the grid is coarsest between these two, so the rest decides
    which fits better.
    """
    choices = [
        (blocks.abs().amax(-1) / (top * whole)).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float()
        for top in (6, 4)
    ]
    errors = [
        (_e2m1(blocks, c * whole).mul_((c * whole)[..., None]) - blocks).square_().sum(-1) for c in choices
    ]
    return torch.where(errors[1] < errors[0], choices[1], choices[0])


def _nvfp4_scale(parts: Mapping[str, Tensor], n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Of each block, [N, K/16]."""
    return _untiled(parts["weight_scale"], n, k // BLOCK).to(dtype) * parts["weight_scale_2"].to(dtype)


# A float8_e5m2 has every digit of a float4_e2m1, in other places and with its exponent 14 higher: no table is
# needed.


def _nvfp4_levels(weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    n, k = weight.shape
    scale = _nvfp4_scale(beside, n, k, torch.float32)
    return torch.cat(
        [
            _codes(rows.unflatten(1, (-1, BLOCK)), s)
            for rows, s in zip(weight.split(ROWS), scale.split(ROWS), strict=True)
        ]
    )


def _codes(blocks: Tensor, scale: Tensor) -> Tensor:
    """[rows, K/16, 16] -> two to a byte, [rows, K/2]."""
    wide = _e2m1(blocks, scale).flatten(1).mul_(2**-14).to(torch.float8_e5m2).view(torch.uint8)
    codes = wide >> 4 & 8 | wide >> 1 & 7
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def _nvfp4_decode(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    packed = parts["weight"]
    n, k = packed.shape[0], packed.shape[1] * 2
    high, low = packed & 128 | packed >> 3 & 14, packed << 4 & 128 | packed << 1 & 14
    values = torch.stack([high, low], dim=-1).view(torch.float8_e5m2).to(dtype).mul_(2**14)
    return values.view(n, -1, BLOCK).mul_(_nvfp4_scale(parts, n, k, dtype)[..., None]).flatten(1)


SIDE_TENSORS = ("weight_scale", "weight_zeros", "weight_scale_2")
FORMATS = {
    f.name: f
    for f in (
        Format(
            "fp8",
            None,
            lambda n, k: {"weight": (torch.float8_e4m3fn, (n, k)), "weight_scale": (torch.float32, ())},
            _fp8_scales,
            _fp8_levels,
            _fp8_decode,
        ),
        Format(
            "int8",
            "int8_tensorwise",
            lambda n, k: {"weight": (torch.int8, (n, k)), "weight_scale": (torch.float32, (n, 1))},
            _int8_scales,
            _int8_levels,
            _int8_decode,
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
            multiple=(1, GROUP),
            per_byte=2,
        ),
        Format(
            "nvfp4",
            "nvfp4",
            lambda n, k: {
                "weight": (torch.uint8, (n, k // 2)),
                "weight_scale": (
                    torch.float8_e4m3fn,
                    (n + -n % TILE_ROWS, k // BLOCK + -(k // BLOCK) % TILE_COLUMNS),
                ),
                "weight_scale_2": (torch.float32, ()),
            },
            _nvfp4_scales,
            _nvfp4_levels,
            _nvfp4_decode,
            multiple=(BLOCK, BLOCK),
            per_byte=2,
        ),
    )
}
ON_DISK = {"fp8": {"weight_scale": "scale_weight"}}  # ComfyUI's older name, which old and new hosts both read
IGNORED_SUFFIXES = (
    "comfy_quant",
    "scale_input",
    "input_scale",
)  # what says or serves other kernels, not the numbers


def marker(format: Format) -> Tensor | None:
    """The `comfy_quant` tensor that tells ComfyUI a layer's format; weight-only."""
    if format.host is None:
        return None
    text = json.dumps({"format": format.host, "full_precision_matrix_mult": True}, separators=(",", ":"))
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def formats_of(dtypes: Mapping[str, torch.dtype]) -> dict[str, Format]:
    """Which layers are quantised and how, from their tensors' names and dtypes (module names,
    `weight_scale` form).
    """
    found = {}
    for name in dtypes:
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight_scale":
            continue
        weight = dtypes.get(f"{layer}.weight")
        if f"{layer}.weight_zeros" in dtypes:
            found[layer] = FORMATS["int4"]
        elif f"{layer}.weight_scale_2" in dtypes:
            found[layer] = FORMATS["nvfp4"]
        elif weight is torch.int8:
            found[layer] = FORMATS["int8"]
        elif weight is torch.float8_e4m3fn:
            found[layer] = FORMATS["fp8"]
    return found


def quantisable(name: str, layers: int | None = None) -> bool:
    """Whether a module's tensor may be quantised: a matrix of a decoder layer's attention or feed-forward.

    Given the number of `layers`, the first and the last stay as they are: on random weights of 4 layers that
    drifted less than keeping the two in the middle (`bench quality`); trained weights were not at
    hand.
    """
    if not (name.startswith("layers.") and name.endswith("_proj.weight")):
        return False
    return layers is None or name.split(".")[1] not in ("0", str(layers - 1))


class QuantLinear(nn.Module):
    """A linear layer whose weight is kept quantised, and dequantised for each product."""

    def __init__(
        self, format: Format, in_features: int, out_features: int, bias: bool, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.format = format
        for name, (kind, shape) in format.layout(out_features, in_features).items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, dtype=kind, device=device), requires_grad=False)
            )
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
            if bias
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.format.decode(dict(self.named_parameters(recurse=False)), x.dtype), self.bias)


def swap(
    module: nn.Module,
    formats: Mapping[str, Format],
    make: Callable[[Format, nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """Replace the named linear layers by quantised ones without weights. `make` builds ComfyUI's kind of
    layer instead.
    """
    for name, format in formats.items():
        parent, _, leaf = name.rpartition(".")
        linear: Any = module.get_submodule(name)  # nn.Linear, or what ComfyUI has for it
        new = (
            make(format, linear)
            if make
            else QuantLinear(format, linear.in_features, linear.out_features, linear.bias is not None, "meta")
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
