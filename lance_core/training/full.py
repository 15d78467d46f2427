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


def write(
    path: Path, checkpoint: Checkpoint, experts: Experts, values: Mapping[str, Tensor] | None, told: Any
) -> int:
    """Write both experts, float32, under their released names, with the ViT where the checkpoint has one.

    The file opens as a checkpoint by itself; the VAE is looked for beside it. values: instead of the experts'
    own, by `learner.whole_weights`' names.

    Raises:
        CheckpointError: the disk is too small or cannot be written.
    """
    planned = []
    for part, module in (("und", experts.und), ("gen", experts.gen)):
        if module is None:
            planned += [_read(checkpoint, part, name) for name in checkpoint.parts[part].tensors]
            continue
        for name, weight in module.named_parameters():
            value = weight if values is None else values.get(f"{part}.{name}", weight)
            stored = released_name(name, part == "gen")
            planned.append(Planned(stored, torch.float32, tuple(value.shape), partial(_plain, value)))
    planned += [_read(checkpoint, "vit", name) for name in checkpoint.parts["vit"].tensors]
    metadata = file_metadata(checkpoint, {"und": "fp32", "gen": "fp32", "vit": "fp32"})
    return write_safetensors(path, planned, metadata | {"lance_training": json.dumps(told, sort_keys=True)})


def _plain(value: Tensor) -> Tensor:
    return value.detach().float().cpu()


def _read(checkpoint: Checkpoint, part: str, name: str) -> Planned:
    file, key = checkpoint.parts[part].tensors[name]
    stored = f"vit_model.{name}" if part == "vit" else released_name(name, part == "gen")
    return Planned(stored, torch.float32, file.shapes[key], partial(file.read, key, torch.float32))
