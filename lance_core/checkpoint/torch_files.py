"""Torch archives (.pth, .pt) that hold a plain state dict, read with weights_only and checked around it.

torch.load builds whatever the pickle inside describes: a tensor of a few bytes and strides of 0 may claim any
number of parameters, and lists, sparse tensors or tensors without memory come out of it as well. So the
archive is looked at first (sizes, names of what the pickle calls), and the tensors afterwards.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import open_regular

MAX_PICKLE = 16 << 20  # bytes of the pickle inside; the released VAE's has 50 kB
CALLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
}
"""What the pickle of a state dict names, beside `torch.FloatStorage` and its like and dtypes."""


class TorchFile:
    """A torch archive that holds tensors by name and nothing else. Pickled code is refused.

    Raises:
        CheckpointError: missing, damaged, holds anything but tensors by name, or claims more than it has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        size = self._look()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            self._refuse_code(str(error).split("\n")[0][:150])
        except Exception as error:  # RuntimeError, EOFError, KeyError and others, for damaged archives
            raise CheckpointError(
                f"{path} is not a readable torch file ({type(error).__name__}: {str(error)[:150]})."
            ) from None
        if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
        ):
            raise CheckpointError(f"{path} is not a plain state dict of tensors; download it again.")
        self._state: dict[str, Tensor] = dict(state)
        self._check(size)

    def _refuse_code(self, reason: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path} holds more than tensors, or is damaged, and was not loaded, because such files can "
            f"run code ({reason}). Get the original file, or a safetensors one."
        ) from None

    def _look(self) -> int:
        """Check the archive without unpickling anything; returns the file's size in bytes."""
        try:
            with open_regular(self.path) as file:
                size = file.seek(0, 2)
                file.seek(0)
                if not zipfile.is_zipfile(file):
                    if size > 1 and file.seek(0) == 0 and file.read(1) == b"\x80":
                        self._refuse_code("a bare pickle, no archive")
                    raise CheckpointError(f"{self.path} is not a torch archive; download it again.")
                with zipfile.ZipFile(file) as archive:
                    members = archive.infolist()
                    pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
                    packed = any(m.compress_type != zipfile.ZIP_STORED for m in members)
                    if packed or len(pickles) != 1 or sum(m.file_size for m in members) > size:
                        raise CheckpointError(
                            f"{self.path} is no archive as torch writes it; download it again."
                        )
                    if pickles[0].file_size > MAX_PICKLE:
                        raise CheckpointError(f"{self.path} holds more than tensors; get the original file.")
                    self._look_at_pickle(archive.read(pickles[0]))
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} does not exist; expected a state dict there.") from None
        except (
            OSError,
            zipfile.BadZipFile,
            ValueError,
            NotImplementedError,
            RuntimeError,
            EOFError,
        ) as error:
            raise CheckpointError(f"{self.path} is not a readable torch file ({str(error)[:150]}).") from None
        return size

    def _look_at_pickle(self, data: bytes) -> None:
        """Refuse a pickle that names anything but what tensors are rebuilt with."""
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
                    self._refuse_code(f"the operation {opcode.name}")
                if opcode.name == "GLOBAL" and not _known(str(argument)):
                    self._refuse_code(f"it names {str(argument)[:80]!r}")
        except (ValueError, IndexError, UnicodeDecodeError, OverflowError) as error:
            raise CheckpointError(f"{self.path} is not a readable torch file ({str(error)[:150]}).") from None

    def _check(self, size: int) -> None:
        """Every tensor must be dense and in the file; together they must not claim much more than it has."""
        claimed = 0
        for name, tensor in self._state.items():
            what = _odd(tensor)
            if what:
                raise CheckpointError(
                    f"{self.path}: {name[:100]!r} is {what}, expected a plain tensor; download it again."
                )
            claimed += tensor.nbytes
        if claimed > 2 * size:  # two names may share a tensor: tied weights
            raise CheckpointError(
                f"{self.path} claims tensors of {claimed / 1e9:.1f} GB in a file of {size / 1e9:.3f} GB; "
                "download it again."
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in self._state.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: t.dtype for name, t in self._state.items()}

    def offset(self, name: str) -> int:
        """Where the tensor lies in its storage: each has one of its own, so in no order to read by."""
        return int(self._state[name].storage_offset())

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        """The tensor, owning its memory, in `dtype` (None: the file's) on `device`, or written into `out`.

        A copy always: the archive is mapped, and must not live on in what was read from it.
        """
        tensor = self._state[name]
        return tensor.to(device=device, dtype=dtype, copy=True) if out is None else out.copy_(tensor)


def _known(name: str) -> bool:
    """Whether a name in a pickle is one that tensors are rebuilt with."""
    module, _, leaf = name.partition(" ")
    plain = module == "torch" and (
        leaf.endswith("Storage") or isinstance(getattr(torch, leaf, 0), torch.dtype)
    )
    return name in CALLED or plain


def _odd(tensor: Tensor) -> str | None:
    """What is wrong with a tensor of a state dict; None if it is plain and dense."""
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_meta or tensor.device.type != "cpu":
        return "without contents"
    if tensor.is_quantized or tensor.is_complex() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {tensor.dtype} of {type(tensor).__name__}"
    if not tensor.is_contiguous() or tensor.is_neg():
        return f"spread out (strides {list(tensor.stride())[:8]})"
    return None
