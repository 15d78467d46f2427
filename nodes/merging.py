"""A MODEL's weights one by one, with their patches, under the names that files have: what merging and saving
go through.

ComfyUI's merge nodes take a second model's weights as patches of the first: pairs of a tensor and a function
that makes a weight of it, and further patches. Here the function does everything that is particular to us:
it dequantises, adds the LoRAs that are on a whole joined projection, and gives the rows one name stands for.
So whatever is on the second model comes through exactly, and fits on any other Lance MODEL, joined or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor

from . import comfy_compat
from .places import OWN_PREFIX, UND, UND_PREFIX, PatchKey
from .quant import Quantised

LEAVES = (".weight", ".bias")


@dataclass(frozen=True)
class Weight:
    """One weight of a file: that of a patcher by the `key` it has there, or `rows` of it.

    base: as stored, from the backup where a patched one is in its place. convert: what its layer makes a
    plain weight of it with. patches: as ComfyUI keeps them, of the whole weight.
    """

    key: str
    rows: slice | None
    base: Tensor
    convert: Any
    patches: tuple
    layer: Quantised | None
    device: torch.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what this stands for, dequantised."""
        if self.layer is not None:
            return (self.layer.out_features, self.layer.in_features)
        if self.rows is None:
            return tuple(self.base.shape)
        return (self.rows.stop - self.rows.start, *self.base.shape[1:])

    @property
    def patched(self) -> bool:
        """Whether anything has been put on it, on these rows or on others of its layer."""
        return bool(self.patches)

    def __call__(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The base, cast and copied -> what it stands for, with its patches. ComfyUI calls this."""
        if self.convert is not None:
            weight = self.convert(weight, inplace=inplace)
        if self.patches:
            # A plain tensor that may be written to: what a layer converts may be neither.
            weight = weight if inplace and self.convert is None else weight.clone()
            weight = comfy.lora.calculate_weight(
                list(self.patches), weight, self.key, intermediate_dtype=weight.dtype
            )
        return weight if self.rows is None else weight[self.rows]

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What it stands for, computed in float32 on the patcher's device, on the CPU and of its own."""
        with torch.no_grad():
            base = mm.cast_to_device(self.base, self.device, torch.float32, copy=True)
            return self(base, inplace=True).to(device="cpu", dtype=dtype).contiguous()


def weights(main: Any) -> Iterator[tuple[str, Weight]]:
    """All weights of both experts of a MODEL's patcher, by the names that LoRAs and merges know."""
    places = main.model.places
    experts = [("", main)] + [(UND_PREFIX, p) for p in main.additional_models.get(UND, [])]
    for prefix, patcher in experts:
        for key in patcher.model_state_dict():
            name = prefix + key
            if not (name.startswith(OWN_PREFIX) and name.endswith(LEAVES)):
                continue
            base, convert = comfy_compat.stored_weight(patcher, key)
            if base is None:
                continue
            owner, _, leaf = key.rpartition(".")
            layer = comfy.utils.get_attr(patcher.model, owner)
            quantised = layer if leaf == "weight" and isinstance(layer, Quantised) else None
            patches = tuple(patcher.patches.get(key, ()))
            for part, rows in places.parts(name):
                yield part, Weight(key, rows, base, convert, patches, quantised, patcher.load_device)


def key_patches(main: Any, prefix: str) -> dict[str, list]:
    """What ComfyUI's merge nodes ask the second model for."""
    return {name: [(weight.base, weight)] for name, weight in weights(main) if name.startswith(prefix)}


def shape_of(model: Any, key: Any) -> tuple[int, ...] | None:
    """The shape of one of a LanceModel's weights, by a patch's key, dequantised; None if there is none."""
    place = model.places.place(PatchKey.of(key))
    owner, _, leaf = place.name.rpartition(".")
    try:
        layer = comfy.utils.get_attr(model, owner)
    except AttributeError:
        return None
    found: Any = getattr(layer, leaf, None)
    if not isinstance(found, torch.Tensor):
        return None
    quantised = leaf == "weight" and isinstance(layer, Quantised)
    shape = (layer.out_features, layer.in_features) if quantised else tuple(found.shape)
    if place.offset is None:
        return shape
    axis, _, length = place.offset
    return (*shape[:axis], length, *shape[axis + 1 :])


def shape_given(value: Any) -> tuple[int, ...] | None:
    """The shape of a merge's weight, as merge nodes hand it to `add_patches`; None if it is no merge."""
    if not isinstance(value, list):
        return None
    base, convert = value[0]
    return convert.shape if isinstance(convert, Weight) else tuple(base.shape)
