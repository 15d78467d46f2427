"""Counting memory without a device: every storage of a run, once, while something refers to it.

Fused kernels are counted by their results, plus what they are known to need: a convolution's reordered input,
attention's row sums. Masked attention is counted spelled out, as torch runs it on most cards.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FLASH_WIDTH = 256  # widest head that fused attention takes


class Accountant(TorchDispatchMode):
    """`device.Peak`, counted tensor by tensor on one device while entered; and what was alive then."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = torch.device(device)
        self.live: dict[int, tuple[int, str]] = {}
        self.refs: dict[int, weakref.ref] = {}
        self.total = self.peak = self._taken = 0
        self.at_peak: list[tuple[int, str]] = []

    def hold(self, label: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already, such as weights."""
        for tensor in tensors:
            self._see(tensor, label)

    def now(self) -> int:
        """Bytes alive."""
        return self.total

    def read(self) -> int:
        """The peak in bytes."""
        return self.peak

    def reset(self) -> None:
        """Forget the peak, not what is alive."""
        self.peak, self._taken, self.at_peak = 0, 0, []
        self._grow(0, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "scaled_dot_product_attention":
            return self._attention(func, args, kwargs)
        result = func(*args, **kwargs)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor, name)
        if name.startswith("conv") and args[0].device.type == self.device.type == "meta":
            self._grow(args[0].nbytes, f"workspace of {name}{where()}")
        return result

    def _attention(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """Fused: the result and a number per row. Masked, or with heads too wide: every step of the textbook
        form.
        """
        q, k, v = args[:3]
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        if self.device.type == "meta" and (mask is not None or q.shape[-1] > FLASH_WIDTH):
            result = self._spelled_out(q, k, v, mask)
        else:
            result = torch.empty_like(q) if q.device.type == "meta" else func(*args, **kwargs)
        self._see(result, "attention")
        if self.device.type == "meta":
            self._grow(q[..., 0].numel() * 4, "row sums of attention")
        return result

    def _spelled_out(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """torch's unfused attention: float32 copies, keys and values repeated for every query head, scores
        twice.
        """
        dtype = q.dtype
        with self:
            q, k, v = q.float(), k.float(), v.float()
            if k.shape[1] != q.shape[1]:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            scores = q @ k.transpose(-1, -2)
            if mask is not None:
                scores = scores.add_(torch.empty(mask.shape, device=mask.device, dtype=scores.dtype))
            return (scores.softmax(-1) @ v).to(dtype)

    def _see(self, tensor: Tensor, label: str) -> None:
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.live or not storage.nbytes():
            return
        if not label.startswith("weights"):
            label = f"{label} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{where()}"
        self.refs[key] = weakref.ref(storage, partial(self._drop, key))
        self.live[key] = (storage.nbytes(), label)
        self.total += storage.nbytes()
        self._grow(0, "")

    def _drop(self, key: int, _: weakref.ref) -> None:
        self.total -= self.live.pop(key)[0]
        del self.refs[key]

    def _grow(self, extra: int, label: str) -> None:
        """Note the peak, `extra` bytes of workspace counted; remember what is alive when it has grown
        noticeably.
        """
        self.peak = max(self.peak, self.total + extra)
        if self.peak > self._taken * 1.002:
            self._taken = self.peak
            self.at_peak = [*self.live.values(), (extra, label)]


def where() -> str:
    """The line of lance_core that is being run, measuring and the call of a matrix product left out."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if (
            "lance_core" in path.parts[-3:-1]
            and path.parent.name != "bench"
            and path.name not in ("ops.py", "kernels.py")
        ):
            return f" ({path.name}:{frame.f_lineno} {frame.f_code.co_name})"
        frame = frame.f_back
    return ""
