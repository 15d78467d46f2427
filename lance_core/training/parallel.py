"""Several processes, each with its share of every step, as torchrun starts them.

A step's gradient is that of all ranks' tokens together: each rank's loss is divided by the tokens of all, and
the gradients are averaged once a step, whatever was accumulated before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

BUCKET = 64 << 20  # bytes of gradients averaged at once


def start(device: torch.device) -> torch.device:
    """Join the other processes if torchrun started this one; returns this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leave the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(*numbers: float, device: torch.device | str = "cpu") -> tuple[float, ...]:
    """Each number, summed over all ranks."""
    if world() == 1:
        return numbers
    shared = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return tuple(shared.tolist())


def largest(number: int, device: torch.device | str = "cpu") -> int:
    """A number's largest value on any rank."""
    if world() == 1:
        return number
    shared = torch.tensor(number, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def average_gradients(weights: Mapping[str, nn.Parameter]) -> None:
    """Every gradient, averaged over the ranks; one that a rank lacks counts as zero there."""
    if world() == 1:
        return
    waiting: list[nn.Parameter] = []
    size = 0
    for weight in weights.values():
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        waiting.append(weight)
        size += weight.grad.nbytes
        if size >= BUCKET:
            _average(waiting)
            waiting, size = [], 0
    if waiting:
        _average(waiting)


def _average(weights: list[nn.Parameter]) -> None:
    gradients = [w.grad for w in weights if w.grad is not None]
    joined = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(joined)
    joined /= world()
    for gradient, part in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def first_alone() -> Iterator[None]:
    """Rank 0 runs the body before the others do: they find what it put on the disk."""
    if world() > 1 and rank() > 0:
        dist.barrier()
    yield
    if world() > 1 and rank() == 0:
        dist.barrier()
