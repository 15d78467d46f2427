"""Weight files read tensor by tensor: safetensors with a strict header check of our own.

Files are read, not mapped: a mapped file counts as resident memory, and the process dies with a signal if it
is truncated meanwhile. Nothing here knows model or module names.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import open_regular
from .torch_files import TorchFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100 << 20  # bytes; safetensors' own limit
CHUNK = 8 << 20  # bytes read at once where a tensor is cast on the way


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """A safetensors file whose header has been checked against the file's size before anything is allocated.

    Raises:
        CheckpointError: missing, truncated, or not safetensors; the message says which.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                length = int.from_bytes(prefix, "little")
                if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                    raise CheckpointError(
                        f"{path} is not a safetensors file or is truncated ({size} bytes); download it again."
                    )
                header = json.loads(file.read(length).decode("utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; expected a safetensors file there.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}).") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise CheckpointError(
                f"{path} has a damaged header ({str(error)[:200]}); download it again."
            ) from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{path} has a damaged header (not a JSON object); download it again.")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CheckpointError(
                f"{path} has damaged metadata (expected strings by name); download it again."
            )
        self.metadata: dict[str, str] = metadata
        self.entries = {name: self._entry(name, info, 8 + length) for name, info in header.items()}
        self._check_layout(8 + length, size)

    def _entry(self, name: str, info: Any, base: int) -> Entry:
        try:
            dtype, shape, (begin, end) = DTYPES[info["dtype"]], info["shape"], info["data_offsets"]
            ok = all(type(v) is int and 0 <= v < 1 << 48 for v in (*shape, begin, end)) and len(shape) <= 8
        except (TypeError, KeyError, ValueError):
            ok = False
        if not ok or math.prod(shape) * dtype.itemsize != end - begin:
            raise CheckpointError(
                f"{self.path}: the header's entry for {name[:200]!r} is damaged or of an unknown type; "
                "download it again."
            )
        return Entry(dtype, tuple(shape), base + begin, end - begin)

    def _check_layout(self, base: int, size: int) -> None:
        at = base
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if entry.start != at:
                raise CheckpointError(
                    f"{self.path}: the bytes of {name[:200]!r} overlap others or leave a gap; download it "
                    "again."
                )
            at += entry.nbytes
        if at != size:
            what = "truncated" if at > size else "longer than its header says"
            raise CheckpointError(
                f"{self.path} is {what}: {size} bytes, its header describes {at}; download it again."
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name; made once, as it is asked for in loops over all tensors."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """As `shapes`."""
        return {name: entry.dtype for name, entry in self.entries.items()}

    def offset(self, name: str) -> int:
        """Where the tensor lies, so that a file can be read front to back."""
        return self.entries[name].start

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        """The tensor, owning its memory; in the file's dtype, or cast on the way in chunks, so that nothing
        is held twice.

        out: contiguous, of its shape, to be written instead of new memory; its dtype and device count.
        """
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=dtype or entry.dtype, device=device) if out is None else out
        flat = out.view(-1)
        direct = out.dtype == entry.dtype and out.device.type == "cpu"
        scratch = flat.view(torch.uint8) if direct else _mapped(min(CHUNK, entry.nbytes))
        try:
            with open_regular(self.path, buffering=0) as file:
                file.seek(entry.start)
                for start in range(0, entry.nbytes, CHUNK):
                    size = min(CHUNK, entry.nbytes - start)
                    if direct:
                        # Zeroed first: systems read twice as fast into memory that is already there as into
                        # new memory.
                        self._fill(file, scratch[start : start + size].zero_(), name)
                        continue
                    self._fill(file, scratch[:size], name)
                    values = scratch[:size].view(entry.dtype)
                    at = start // entry.dtype.itemsize
                    flat[at : at + values.numel()].copy_(values)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read at {name} ({error}).") from None
        return out

    def _fill(self, file: BinaryIO, chunk: Tensor, name: str) -> None:
        buffer, done = memoryview(chunk.numpy().data), 0
        while done < len(buffer):
            got = file.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not got:
                raise CheckpointError(
                    f"{self.path} became shorter while it was read (at {name}); download it again."
                )
            done += got


def _mapped(nbytes: int) -> Tensor:
    """Scratch memory outside of the heap, where it would leave holes between the weights that stay."""
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)[:nbytes]


WeightFile = SafetensorsFile | TorchFile


def open_weights(path: Path) -> WeightFile:
    """Open by extension: .pth and .pt as torch archives, everything else as safetensors."""
    return TorchFile(path) if path.suffix.lower() in (".pth", ".pt") else SafetensorsFile(path)
