"""Processes that make one result together, and what they tell each other: tensors as bytes, exactly.

NCCL between GPUs, gloo between CPUs. Everybody calls everything in the same order.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RequestError

MODES = ("guidance", "sequence", "both")
TIMEOUT = datetime.timedelta(minutes=30)  # for a process that reads its weights from a slow disk

T = TypeVar("T")


class LostError(RequestError):
    """Another process of the group is gone, and the work with it."""


@dataclass(frozen=True)
class Team:
    """A process's place among the others.

    branch: which of guidance's branches it computes, 0 or 1, where they are divided, else None.
    own, pair: process groups; the ones that divide the target's tokens with it while guidance is divided, and
    its partner of the other branch. None stands for nobody but itself.
    """

    mode: str
    rank: int
    size: int
    device: torch.device
    branch: int | None = None
    own: Any = None
    pair: Any = None

    @classmethod
    def of(cls, mode: str, device: torch.device) -> Team:
        """The team of all processes that torch.distributed knows of.

        Raises:
            RequestError: so many processes cannot divide the work in this way.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        check_count(mode, size)
        if mode == "sequence":
            return cls(mode, rank, size, device)
        half = size // 2
        halves = [dist.new_group(list(range(i * half, (i + 1) * half))) for i in (0, 1)]
        pairs = [dist.new_group([i, i + half]) for i in range(half)]
        branch = rank // half
        own = halves[branch] if half > 1 else None
        return cls(mode, rank, size, device, branch, own, pairs[rank % half])

    @property
    def everyone(self) -> Any:
        """The group of all."""
        return dist.group.WORLD if self.size > 1 else None


def check_count(mode: str, count: int) -> None:
    """Refuse a number of processes that a way to divide the work does not fit.

    Raises:
        RequestError: it does not.
    """
    if mode not in MODES:
        raise RequestError(f"split is {mode!r}, expected one of {', '.join(MODES)}")
    if mode == "guidance" and count != 2:
        raise RequestError(f"split guidance takes 2 processes, one a branch, and not {count}; or use both")
    if mode == "both" and count % 2:
        raise RequestError(f"split both takes an even number of processes, and not {count}; or use sequence")


def share(count: int, group: Any) -> tuple[slice, list[int]]:
    """This process's stretch of `count` things divided over a group, and the length of everybody's."""
    if group is None:
        return slice(0, count), [count]
    size, place = dist.get_world_size(group), dist.get_rank(group)
    ends = [count * i // size for i in range(size + 1)]
    return slice(ends[place], ends[place + 1]), [b - a for a, b in itertools.pairwise(ends)]


def gather(part: Tensor, lengths: list[int], group: Any, dim: int) -> Tensor:
    """Everybody's stretch of a tensor along `dim`, joined. lengths: from `share`."""
    if group is None:
        return part
    most = max(lengths)
    padded = part.new_zeros(*part.shape[:dim], most, *part.shape[dim + 1 :])
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    parts = [torch.empty_like(padded) for _ in lengths]
    raw = [one.view(torch.uint8) for one in parts]
    told(lambda: dist.all_gather(raw, padded.view(torch.uint8), group=group))
    return torch.cat([one.narrow(dim, 0, n) for one, n in zip(parts, lengths, strict=True)], dim)


def from_first(value: T, tensor: Tensor | None, device: torch.device) -> tuple[T, Tensor | None]:
    """What the first process has, a small value and a tensor; the others give anything."""
    meta = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
    box = [(value, meta)]
    told(lambda: dist.broadcast_object_list(box, 0, device=device if device.type == "cuda" else None))
    value, meta = box[0]
    if meta is None:
        return value, None
    first = tensor is not None and dist.get_rank() == 0
    own = (
        tensor.contiguous()
        if first and tensor is not None
        else torch.empty(meta[0], dtype=meta[1], device=device)
    )
    told(lambda: dist.broadcast(own.view(torch.uint8) if own.dim() else own, 0))
    return value, own


def told(call: Callable[[], Any]) -> Any:
    """Around every call to the others.

    Raises:
        LostError: one of them is gone.
    """
    try:
        return call()
    except (RuntimeError, ValueError) as error:  # torch.distributed's errors are RuntimeErrors
        raise LostError(
            "another process of this split is gone, and the result with it "
            f"({' '.join(str(error).split())[:200]}); start it again"
        ) from error
