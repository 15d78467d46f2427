"""Counting what a GPU would run: kernels, operations, bytes and waits, on torch's meta device.

There, tensors have shapes and no contents, so the released sizes cost no memory and no arithmetic. A kernel
is an operation that computes: views, reshapes without a copy and allocations are none. Operations that CUDA
has one kernel for (a linear layer, an RMS norm, attention) count once, others as what they are made of.

Bytes are what a kernel reads and writes at least: every operand once, broadcast axes once, a looked-up table
by the rows that are taken. Whatever caches save or a poor kernel adds is not in them.
"""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .accounting import where

# One kernel on CUDA, though torch makes them of smaller operations elsewhere.
WHOLE = frozenset({"linear", "rms_norm", "scaled_dot_product_attention", "silu", "silu_", "gelu"})
PRODUCTS = frozenset(
    {"linear", "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm", "_weight_int8pack_mm"}
)
ATTENTION = "scaled_dot_product_attention"
FREE = frozenset(
    {
        "detach",
        "detach_",
        "_unsafe_view",
        "_reshape_alias",
        "alias",
        "lift_fresh",
        "set_",
        "resize_",
        "_local_scalar_dense",
        "is_pinned",
    }
)
# Their first argument is a table of which they read as much as they write.
LOOKUPS = frozenset({"embedding", "index", "index_select", "gather"})
OVERWRITE = frozenset({"copy_", "fill_", "zero_"})  # in place without reading what was there


@dataclass(frozen=True)
class Card:
    """A GPU's rates as reached in practice: bf16 operations a second and bytes a second."""

    name: str
    flops: float
    bandwidth: float

    def seconds(self, flops: int, moved: int) -> float:
        """Of one kernel at the limit of one or the other (roofline)."""
        return max(flops / self.flops, moved / self.bandwidth)


# NVIDIA's data sheets (dense bf16 with float32 sums; memory), times what large kernels reach of them: 0.64
# and 0.9 on Hopper, 0.85 and 0.92 on consumer cards. Assumed, not measured here.
CARDS = {
    "h200": Card("H200", 0.64 * 989e12, 0.9 * 4.8e12),
    "4090": Card("RTX 4090", 0.85 * 165e12, 0.92 * 1.008e12),
    "3060": Card("RTX 3060", 0.85 * 51e12, 0.92 * 0.36e12),
}
LAUNCH = 4e-6  # seconds a kernel takes at least, launched one by one by a quick host


@dataclass
class Count:
    """What one pass comes to. lines: source line -> (kernels, bytes outside products and attention)."""

    kernels: int = 0
    flops: int = 0
    bytes: int = 0
    other_bytes: int = 0
    syncs: int = 0
    copies: int = 0  # from and to the host
    names: Tally[str] = field(default_factory=Tally)
    lines: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CARDS, 0.0))

    def kernel(self, name: str, flops: int, moved: int, place: str) -> None:
        """Note one."""
        self.kernels += 1
        self.flops += flops
        self.bytes += moved
        self.names[name] += 1
        if name not in PRODUCTS and name != ATTENTION:
            self.other_bytes += moved
            kernels, size = self.lines.get(place, (0, 0))
            self.lines[place] = kernels + 1, size + moved
        for key, card in CARDS.items():
            self.seconds[key] += card.seconds(flops, moved)

    def less(self, other: Count) -> Count:
        """What this has beyond another, as a longer run has beyond a shorter one."""
        lines = {
            place: (kernels - other.lines.get(place, (0, 0))[0], size - other.lines.get(place, (0, 0))[1])
            for place, (kernels, size) in self.lines.items()
        }
        out = Count(lines={place: found for place, found in lines.items() if any(found)})
        for name in ("kernels", "flops", "bytes", "other_bytes", "syncs", "copies"):
            setattr(out, name, getattr(self, name) - getattr(other, name))
        out.names = self.names - other.names
        out.seconds = {key: value - other.seconds[key] for key, value in self.seconds.items()}
        return out

    def told(self, top: int) -> dict[str, Any]:
        """JSON-ready; `lines` are the `top` that move the most, largest first."""
        largest = sorted(self.lines.items(), key=lambda item: -item[1][1])[:top]
        numbers = ("kernels", "flops", "bytes", "other_bytes", "syncs", "copies")
        return {name: getattr(self, name) for name in numbers} | {
            "seconds": {key: max(self.seconds[key], self.kernels * LAUNCH) for key in CARDS},
            "lines": [
                {"where": place, "kernels": kernels, "bytes": size} for place, (kernels, size) in largest
            ],
            "names": dict(self.names.most_common()),
        }


class Counter(TorchDispatchMode):
    """Counts into `count` what runs on the meta device while entered. Enter under `torch.inference_mode()`:
    with autograd at work, torch takes composite operations apart before they get here.

    A value that is asked for (`int(tensor)`, `.cpu()`) is a wait: it is counted, and zeros come back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def fused(self, name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """A kernel of kernels.py."""
        moved = sum(map(_size, read)) + sum(map(_size, written))
        self.count.kernel(name, 0, moved, where())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = list(_tensors((args, kwargs)))
        there = [t for t in given if t.device.type == "meta"]
        if name == "_local_scalar_dense" and there:
            self.count.syncs += 1
            return 0.0 if given[0].dtype.is_floating_point else 0
        target = kwargs.get("device")
        if (
            there
            and name in ("_to_copy", "copy_")
            and (moved := self._to_host(name, args, kwargs)) is not None
        ):
            return moved
        if name not in WHOLE and name != ATTENTION and _composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = torch.empty_like(args[0]) if name == ATTENTION and there else func(*args, **kwargs)
        if name == "convolution" and there:
            result = _as_given(result, args[0])
        made = [t for t in _tensors(result) if t.device.type == "meta"]
        if made and given and not there and name in ("_to_copy", "copy_"):
            self.count.copies += 1  # from the host
        elif made and (there or not target or target != "cpu") and _computes(func, name):
            self._note(func, name, args, kwargs, there, made)
        return result

    def _to_host(self, name: str, args: tuple, kwargs: dict) -> Tensor | None:
        """The host's copy of what is on the device, if that is what is asked for."""
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else kwargs.get("device")
        if source.device.type != "meta" or target is None or torch.device(target).type == "meta":
            return None
        self.count.syncs += 1
        self.count.copies += 1
        if name == "copy_":
            return args[0]
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _note(
        self, func: Any, name: str, args: tuple, kwargs: dict, given: list[Tensor], made: list[Tensor]
    ) -> None:
        written = _written(func, args, kwargs)
        outputs = [*written, *(t for t in made if not any(t is w for w in written))]
        read = given
        if name in OVERWRITE:
            read = [t for t in given if not any(t is w for w in written)]
        if name in LOOKUPS:
            moved = sum(map(_size, outputs)) * 2
        else:
            moved = sum(map(_size, read)) + sum(map(_size, outputs))
        if name == "linear" and not _rows(args[0]):
            self.count.kernel("copy for linear", 0, 2 * _size(args[0]), where())
        self.count.kernel(name, _flops(func, name, args, kwargs, outputs), moved, where())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _composite(func: Any) -> bool:
    """Whether torch makes it of other operations on every device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _computes(func: Any, name: str) -> bool:
    """Whether it runs a kernel: no view of its argument, no bare allocation."""
    if name in FREE or "empty" in name:
        return False
    returns = func._schema.returns
    views = [r.alias_info is not None and not r.alias_info.is_write for r in returns]
    return not (views and all(views))


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """Arguments that are written to, by the operation's schema."""
    out: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            out += _tensors(value)
    return out


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor, axes that are only repeated counted once."""
    shape: Iterable[int] = (n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s or n == 0)
    return math.prod(shape) * tensor.element_size()


def _as_given(result: Tensor, x: Tensor) -> Tensor:
    """A convolution's result in its input's memory layout, as cuDNN leaves it."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if layout is None or not x.is_contiguous(memory_format=layout):
        return result
    return torch.empty_like(result, memory_format=layout)


def _rows(x: Tensor) -> bool:
    """Whether cuBLAS can take x [..., n] as a matrix of rows as it lies; torch copies it otherwise."""
    axes = [(n, s) for n, s in zip(x.shape, x.stride(), strict=True) if n != 1]
    leading = axes[:-1] if x.shape[-1] != 1 else axes
    folds = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(leading))
    return folds and (x.shape[-1] == 1 or x.stride(-1) == 1)


def _flops(func: Any, name: str, args: tuple, kwargs: dict, made: list[Tensor]) -> int:
    """Of products, convolutions and attention (a rectangle of queries by keys, causal or not)."""
    if name == "linear":
        x, weight = args[:2]
        return 2 * x.numel() * weight.shape[0]
    if name == ATTENTION:
        q, k, v = args[:3]
        return 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
    counted = flop_registry.get(func.overloadpacket)
    return int(counted(*args, **kwargs, out_val=made[0])) if counted and name in PRODUCTS else 0
