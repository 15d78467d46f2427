"""Writing a safetensors file tensor by tensor, whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import sweep, written
from .tensor_files import DTYPES

SPARE = 64 << 20  # bytes to leave free on the disk


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: what it will be, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    tensors: Sequence[Planned],
    metadata: Mapping[str, str],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a safetensors file tensor by tensor; the same input gives the same bytes. Returns its size in
    bytes.

    It has its name only when it is whole (`files.written`): a reader never sees half a file, two writers of
    one name do not mix, and what a killed run left is removed by the next.

    Raises:
        CheckpointError: the disk is too small, or cannot be written.
    """
    # Wide types first keeps every tensor aligned.
    ordered = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name))
    header = _header(ordered, metadata)
    total = len(header) + sum(t.nbytes for t in ordered)
    try:
        sweep(path)  # what a killed run left may be what fills the disk
        free = shutil.disk_usage(path.parent).free
        if free < total + SPARE:
            raise CheckpointError(
                f"{path}: {total / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free in "
                f"{path.parent}; make room."
            )
        with written(path) as file:
            file.write(header)
            _write_tensors(file, ordered, progress)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}).") from None
    return total


def _header(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a safetensors file with these tensors in this order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensors(
    file: BinaryIO, tensors: Sequence[Planned], progress: Callable[[int, int], None] | None
) -> None:
    done, total = 0, sum(t.nbytes for t in tensors)
    for tensor in tensors:
        made = tensor.make().contiguous()
        if made.dtype != tensor.dtype or tuple(made.shape) != tensor.shape:
            raise ValueError(
                f"{tensor.name}: made {made.dtype} {list(made.shape)}, planned {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        if made.numel():
            file.write(made.reshape(-1).view(torch.uint8).numpy().data)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
