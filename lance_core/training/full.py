"""Full fine-tuning: layers that keep float32 weights and multiply in their input's dtype, and the file that
results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint, released_name
from ..checkpoint.convert import file_metadata
from ..checkpoint.writing import Planned, write_safetensors
from ..model.ops import TorchOps
from .passes import Experts
from .sharding import whole


class CastOps(TorchOps):
    """`TorchOps` whose weights may be wider than what they multiply, as an optimiser's are."""

    class Linear(TorchOps.Linear):
        """x W^T + b, in x's dtype."""

        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)

    class RMSNorm(TorchOps.RMSNorm):
        """Over the last axis; the weight in x's dtype."""

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def collect(experts: Experts, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every weight of both experts, whole and float32, by `learner.whole_weights`' names; every process must
    ask. values: an average, instead of the weights it has.
    """
    found = {}
    for part, module in (("und", experts.und), ("gen", experts.gen)):
        for name, weight in () if module is None else module.named_parameters():
            key = f"{part}.{name}"
            found[key] = whole(weight if values is None else values.get(key, weight)).float()
    return found


def write(path: Path, checkpoint: Checkpoint, values: Mapping[str, Tensor], told: Any) -> int:
    """Write both experts, float32, under their released names, with the ViT where the checkpoint has one.

    The file opens as a checkpoint by itself; the VAE is looked for beside it. values: of `collect`; an expert
    that is not in them is the checkpoint's.

    Raises:
        CheckpointError: the disk is too small or cannot be written.
    """
    planned = []
    for part in ("und", "gen"):
        for name in checkpoint.parts[part].tensors:
            value = values.get(f"{part}.{name}")
            if value is None:
                planned.append(_read(checkpoint, part, name))
                continue
            stored = released_name(name, part == "gen")
            planned.append(Planned(stored, torch.float32, tuple(value.shape), partial(_same, value)))
    planned += [_read(checkpoint, "vit", name) for name in checkpoint.parts["vit"].tensors]
    metadata = file_metadata(checkpoint, {"und": "fp32", "gen": "fp32", "vit": "fp32"})
    return write_safetensors(path, planned, metadata | {"lance_training": json.dumps(told, sort_keys=True)})


def _same(value: Tensor) -> Tensor:
    return value


def _read(checkpoint: Checkpoint, part: str, name: str) -> Planned:
    file, key = checkpoint.parts[part].tensors[name]
    stored = f"vit_model.{name}" if part == "vit" else released_name(name, part == "gen")
    return Planned(stored, torch.float32, file.shapes[key], partial(file.read, key, torch.float32))
