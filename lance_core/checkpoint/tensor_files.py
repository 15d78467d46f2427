"""Weight files read tensor by tensor: safetensors with our own strict header check, torch archives with
weights_only.

Files are read, not mapped: a mapped file counts as resident memory and dies with a signal when it is
truncated under us. Nothing here knows model or module names.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

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
PIECE = 8 << 20  # bytes read at once where a tensor is cast on the way


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
            with open(path, "rb") as file:
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
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error}); download it again.") from None
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
        """The tensor, owning its memory; in the file's dtype, or cast on the way in pieces, so that nothing
        is held twice.

        out: contiguous, of its shape, to be written instead of new memory; its dtype and device count.
        """
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=dtype or entry.dtype, device=device) if out is None else out
        flat = out.view(-1)
        direct = out.dtype == entry.dtype and out.device.type == "cpu"
        scratch = flat.view(torch.uint8) if direct else _mapped(min(PIECE, entry.nbytes))
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(entry.start)
                for start in range(0, entry.nbytes, PIECE):
                    size = min(PIECE, entry.nbytes - start)
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

    def _fill(self, file: Any, piece: Tensor, name: str) -> None:
        buffer, done = memoryview(piece.numpy()), 0
        while done < len(buffer):
            got = file.readinto(buffer[done:])
            if not got:
                raise CheckpointError(
                    f"{self.path} became shorter while it was read (at {name}); download it again."
                )
            done += got


def _mapped(nbytes: int) -> Tensor:
    """Scratch memory outside of the heap, where it would leave holes between the weights that come to stay."""
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)[:nbytes]


class TorchFile:
    """A torch archive (.pth, .pt) that holds a plain state dict of tensors. Pickled code is refused.

    Raises:
        CheckpointError: missing, damaged, or holds anything but tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, {}
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; expected a state dict there.")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            reason = str(error).split("\n")[0][:200]
            raise CheckpointError(
                f"{path} holds more than tensors, or is damaged, and was not loaded, because such files can "
                f"run code ({reason}). "
                "Get the original file, or a safetensors one."
            ) from None
        except (
            Exception
        ) as error:  # torch raises RuntimeError, EOFError, KeyError and others for damaged archives
            raise CheckpointError(
                f"{path} is not a readable torch file ({type(error).__name__}: {str(error)[:200]})."
            ) from None
        if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
        ):
            raise CheckpointError(f"{path} is not a plain state dict of tensors; download it again.")
        self._state: dict[str, Tensor] = state

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in self._state.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: t.dtype for name, t in self._state.items()}

    def offset(self, name: str) -> int:
        return self._state[name].storage_offset()

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        """The tensor, owning its memory: the archive is mapped, and must not live on in what was read from
        it. As above.
        """
        return (
            self._state[name].to(device=device, dtype=dtype, copy=True)
            if out is None
            else out.copy_(self._state[name])
        )


WeightFile = SafetensorsFile | TorchFile


def open_weights(path: Path) -> WeightFile:
    """Open by extension: .pth and .pt as torch archives, everything else as safetensors."""
    return TorchFile(path) if path.suffix.lower() in (".pth", ".pt") else SafetensorsFile(path)


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

    Written beside its place as NAME.part and put there whole at the end: a reader never sees half a file, and
    what a killed run left is overwritten by the next.

    Raises:
        CheckpointError: the disk is too small, or cannot be written.
    """
    ordered = sorted(
        tensors, key=lambda t: (-t.dtype.itemsize, t.name)
    )  # wide types first keeps every tensor aligned
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total = 8 + len(text) + at
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < total + (64 << 20):
            raise CheckpointError(
                f"{path}: {total / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free in "
                f"{path.parent}; make room."
            )
        with open(part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            done = 0
            for tensor in ordered:
                made = tensor.make().contiguous()
                if made.dtype != tensor.dtype or tuple(made.shape) != tensor.shape:
                    raise ValueError(
                        f"{tensor.name}: made {made.dtype} {list(made.shape)}, planned {tensor.dtype} "
                        f"{list(tensor.shape)}"
                    )
                if made.numel():
                    file.write(memoryview(made.reshape(-1).view(torch.uint8).numpy()))
                done += tensor.nbytes
                if progress is not None:
                    progress(done, at)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}).") from None
    finally:
        part.unlink(missing_ok=True)
    return total
