"""Projections that share an input, as one linear layer: one product instead of two or three.

Files, LoRAs and messages know the projections apart (`q_proj`, `k_proj`, `v_proj`); the module has one layer,
`qkv_proj`, with their rows one below the other. `joined_rows` maps the names of the file to those rows,
`JoinsOnLoad` makes `load_state_dict` take them, and `named_weights` gives them back as views.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

JOINED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
LEAVES = ("weight", "bias")


class JoinedLinear(nn.Linear):
    """A linear layer whose rows belong to several projections, declared when it is made.

    rows: rows of each projection by name; biased: whether it has a bias, which some of ComfyUI's layers only
    get with their weights.
    """

    rows: dict[str, slice]
    biased: bool


@cache
def _joined_class(linear: type[nn.Linear]) -> type[JoinedLinear]:
    """`JoinedLinear` over one `ops`' Linear, so that ComfyUI may cast, patch and stream its weight."""
    return type("JoinedLinear", (linear, JoinedLinear), {})


def joined_linear(
    ops: Any, in_features: int, projections: Mapping[str, int], bias: bool, **options: Any
) -> JoinedLinear:
    """A joined layer of `ops`' kind. projections: output features by name; options: device and dtype."""
    layer = _joined_class(ops.Linear)(in_features, sum(projections.values()), bias=bias, **options)
    stops = list(accumulate(projections.values()))
    layer.rows = {
        name: slice(stop - size, stop) for (name, size), stop in zip(projections.items(), stops, strict=True)
    }
    layer.biased = bias
    return layer


def joined_in(path: str, joined: bool, apart: Collection[str]) -> set[str]:
    """Which of JOINED are one layer in the decoder layer at `path`: all whose projections may be.

    Args:
        joined: False keeps all projections apart, as files have them.
        apart: full names of layers that stay on their own, as quantised ones do, each with its own scales.
    """
    inside = {"qkv_proj": f"{path}.self_attn", "gate_up_proj": f"{path}.mlp"}
    return {
        name
        for name, parts in JOINED.items()
        if joined and not any(f"{inside[name]}.{part}" in apart for part in parts)
    }


class JoinsOnLoad(nn.Module):
    """A module with joined layers, whose `load_state_dict` takes the projections apart as well as joined."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, layer in self.named_children():
            if not isinstance(layer, JoinedLinear):
                continue
            for leaf in LEAVES:
                apart = [f"{prefix}{part}.{leaf}" for part in layer.rows]
                if all(key in state_dict for key in apart):
                    state_dict[f"{prefix}{name}.{leaf}"] = torch.cat([state_dict.pop(key) for key in apart])
        super()._load_from_state_dict(state_dict, prefix, *args)


class Rows(NamedTuple):
    """Where a projection's tensor is: rows of the joined tensor `name`, whose shape is `shape`."""

    name: str
    rows: slice
    shape: tuple[int, ...]


def joined_rows(module: nn.Module) -> dict[str, Rows]:
    """Tensors of joined projections by their names in a file, e.g. "layers.0.self_attn.k_proj.weight" -> rows
    of "layers.0.self_attn.qkv_proj.weight".
    """
    found = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, JoinedLinear):
            continue
        owner = path.rpartition(".")[0]
        shapes: dict[str, tuple[int, ...]] = {"weight": (layer.out_features, layer.in_features)}
        if layer.biased:
            shapes["bias"] = (layer.out_features,)
        for part, rows in layer.rows.items():
            for leaf, shape in shapes.items():
                name = f"{owner}.{part}.{leaf}".lstrip(".")
                found[name] = Rows(f"{path}.{leaf}", rows, shape)
    return found


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's weights under the names they have in a file, joined projections as views of their rows."""
    weights, joined = dict(module.named_parameters()), joined_rows(module)
    whole = {place.name for place in joined.values()}
    yield from ((name, weight) for name, weight in weights.items() if name not in whole)
    yield from ((name, weights[place.name][place.rows]) for name, place in joined.items())
