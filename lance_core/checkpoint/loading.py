"""From the tensors of a file to a module with weights: built on the meta device, then filled tensor by tensor
in its final dtype, so that peak memory is the result plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import LLMConfig
from ..model.dual_expert import Generation, Understanding
from ..model.joined import joined_rows, named_weights
from .quantize import SIDE_TENSORS, Format, swap
from .tensor_files import WeightFile

Progress = Callable[[str, int, int], None]  # what is going on, done, total
Places = Mapping[str, tuple[WeightFile, str]]  # name in the module -> (file, name in the file)
M = TypeVar("M", bound=nn.Module)


def build_expert(
    config: LLMConfig,
    part: str,
    formats: Mapping[str, Format],
    joined: bool,
    make: Callable[[Format, nn.Module], nn.Module] | None,
    **options: Any,
) -> nn.Module:
    """The expert "und" or "gen" without weights, its quantised layers in place and apart.

    joined: see `joined.joined_in`; make: see `quantize.swap`; options: ops, device, dtype.
    """
    kind = {"und": Understanding, "gen": Generation}[part]
    return swap(kind(config, joined=joined, apart=formats.keys(), **options), formats, make)


def tensors(
    places: Places,
    formats: Mapping[str, Format],
    dtype: torch.dtype | None,
    device: torch.device | str,
    module: nn.Module | None,
) -> Iterator[tuple[str, Tensor]]:
    """`Checkpoint.tensors`: one at a time, in the order they lie in the file, owning their memory."""
    kept = {f"{layer}.{leaf}" for layer in formats for leaf in ("weight", *SIDE_TENSORS)}
    joined = {} if module is None else joined_rows(module)
    begun: dict[str, tuple[Tensor, int]] = {}  # joined tensors with rows still missing, and how many
    for name, (file, key) in sorted(places.items(), key=lambda item: item[1][0].offset(item[1][1])):
        if name not in joined:
            yield name, file.read(key, None if name in kept else dtype, device)
            continue
        whole, rows, shape = joined[name]
        if whole in begun:
            tensor, missing = begun.pop(whole)
        else:
            tensor = torch.empty(shape, dtype=dtype or file.dtypes[key], device=device)
            missing = shape[0]
        file.read(key, out=tensor[rows])
        missing -= rows.stop - rows.start
        if missing:
            begun[whole] = tensor, missing
        else:
            yield whole, tensor
        del tensor


def count(places: Places, module: nn.Module) -> int:
    """How many tensors `tensors` gives for a module."""
    joined = joined_rows(module)
    return len(places) - len(joined) + len({place.name for place in joined.values()})


def fill(
    module: M, weights: Iterable[tuple[str, Tensor]], total: int, what: str, progress: Progress | None
) -> M:
    """Give a module its weights, with progress told as `what`; returns the module."""
    done = 0
    for name, tensor in weights:  # not enumerate, which keeps its last pair alive
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        del tensor
        done += 1  # noqa: SIM113
        if progress is not None:
            progress(what, done, total)
    return module


def non_finite(module: nn.Module) -> str | None:
    """Name of the first weight with NaN or infinity in it, as the file has it, for error messages."""
    bad = (name for name, weight in named_weights(module) if not bool(torch.isfinite(weight.float()).all()))
    return next(bad, None)
