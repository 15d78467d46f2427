"""Full training on several GPUs: weights, gradients and optimiser state divided among them (FSDP2).

Every pass runs the same collectives on every rank: each has as many passes, and each pass reaches all weights
by two samples that count nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..inputs.tokenizer import Tokenizer
from . import parallel
from .objective import drawn_time
from .passes import Experts
from .sample import Sample, answer_sample, generation_sample

PADDING = 2


def shard(experts: Experts) -> None:
    """Divide every layer's weights, and those around the layers, among the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(experts.device).type, (parallel.world(),))
    for pair in experts.network.pairs:
        fully_shard(pair, mesh=mesh)
    fully_shard(experts.network, mesh=mesh)


def padding(tokenizer: Tokenizer) -> list[tuple[Sample, Tensor | None, float | None]]:
    """The smallest sample of each kind, with noise and time."""
    latent = torch.zeros(1, 1, 1, 48)
    drawn, spoken = generation_sample(tokenizer, "", [], "", latent), answer_sample(tokenizer, "", [], "", "")
    return [(drawn, torch.ones_like(latent), drawn_time(0)), (spoken, None, None)]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has a part of it only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes, on the CPU; every process must ask."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


def alike(value: Tensor, weight: Tensor) -> Tensor:
    """A whole value as a weight is kept: on its device, divided as it is."""
    value = value.to(weight.device)
    if not is_sharded(weight) or value.shape != weight.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, weight.device_mesh, weight.placements)  # type: ignore[attr-defined]


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of tensors together, wherever their parts are."""
    norms = [t.float().norm() for t in tensors]
    norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    return torch.stack(norms).norm() if norms else torch.zeros(())
