"""A MODEL -> the tensors of a checkpoint file: both experts under the released names, with whatever is on the
weights; for ComfyUI's own save nodes and for ours.

A weight that nothing is on is written as it is kept, quantised ones in their form. The others are computed in
float32 and rounded to the nearest value of the dtype they are kept in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..lance_core.checkpoint.checkpoint import released_name
from ..lance_core.checkpoint.convert import constant, fp8_mark, plan_quantised, stored_name
from ..lance_core.checkpoint.finding import CONFIG_TENSOR
from ..lance_core.checkpoint.writing import Planned
from ..lance_core.config import vae_config
from ..lance_core.errors import CheckpointError, RequestError
from ..lance_core.vae.wan import WanVAE
from . import comfy_quant
from .merging import Weight, weights
from .places import OWN_PREFIX, UND_PREFIX
from .quant import Quantised


def planned(main: Any) -> list[Planned]:
    """Both experts of a MODEL's patcher, each tensor made when its turn comes."""
    found = []
    fp8 = False
    for name, weight in weights(main):
        generation = not name.startswith(UND_PREFIX)
        stored = released_name(name.removeprefix(OWN_PREFIX if generation else UND_PREFIX), generation)
        if weight.layer is None:
            dtype = _dtype(weight.base.dtype)
            found.append(Planned(stored, dtype, weight.shape, partial(_plain, weight, dtype)))
            continue
        format = weight.layer.format
        fp8 = fp8 or format.name == "fp8"
        make = _encoded(weight) if weight.patched else _as_kept(weight.layer)
        found += plan_quantised(stored.removesuffix("weight"), _matrix(weight), format, make)
    return [*found, fp8_mark()] if fp8 else found


def _dtype(kept: torch.dtype) -> torch.dtype:
    """fp8 without a scale, which the loader's weight_dtype makes, is no format of a file."""
    return kept if kept.itemsize > 1 else torch.bfloat16


def _matrix(weight: Weight) -> tuple[int, int]:
    n, k = weight.shape
    return n, k


def _plain(weight: Weight, dtype: torch.dtype) -> Tensor:
    if weight.patched:
        return weight.value(dtype)
    kept = weight.base.detach() if weight.rows is None else weight.base.detach()[weight.rows]
    return kept.to(device="cpu", dtype=dtype).contiguous()


def _as_kept(layer: Quantised) -> Callable[[str], Callable[[], Tensor]]:
    return lambda leaf: lambda: comfy_quant.quantised_parts(layer)[leaf].detach().cpu().contiguous()


def _encoded(weight: Weight) -> Callable[[str], Callable[[], Tensor]]:
    """Anew, for each of its tensors: they lie apart in a file, and all together would be a second model."""
    assert weight.layer is not None
    format = weight.layer.format

    def make(leaf: str) -> Tensor:
        value = weight.value()
        if not bool(torch.isfinite(value).all()):
            raise RequestError(
                f"{weight.key} has NaN or infinity in it with its LoRAs, which cannot be saved as "
                f"{format.name}: take them out, or lower their strength."
            )
        return format.encode(value)[leaf]

    return lambda leaf: partial(make, leaf)


def beside(part: str, tensors: Mapping[str, Tensor]) -> Iterator[Planned]:
    """The tensors of the "vit" or the "vae"."""
    for name, tensor in tensors.items():
        kept = tensor.detach().to("cpu", _dtype(tensor.dtype)).contiguous()
        yield constant(stored_name(part, name), kept)


def vae_tensors(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A VAE's state dict, if it is one that belongs in a checkpoint.

    Raises:
        RequestError: it is not Wan2.2's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    try:
        expected = WanVAE(vae_config(shapes, "the VAE"), device="meta").state_dict()
    except CheckpointError:
        expected = {}
    if {name: tuple(t.shape) for name, t in expected.items()} != shapes:
        raise RequestError(
            "The VAE that is to be saved with Lance is not Wan2.2's: connect the VAE of Lance Loader."
        )
    return given


def config_tensor(told: Mapping[str, Any]) -> Tensor:
    """The configuration for a file whose metadata ComfyUI writes: JSON as bytes."""
    return torch.frombuffer(bytearray(json.dumps(told, ensure_ascii=False).encode()), dtype=torch.uint8)


def state_dict(main: Any, clip: Any = None, vae: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What ComfyUI's save nodes write: a file that Lance Loader loads."""
    if clip:
        logging.warning("Lance reads text with its own understanding expert: the CLIP is not saved.")
    found = planned(main)
    if vae:
        found += beside("vae", vae_tensors(vae))
    found.append(constant(CONFIG_TENSOR, config_tensor(main.model.told)))
    return {tensor.name: tensor.make() for tensor in found}
