"""States on disk: trained weights, the optimiser's memory and the average, enough to go on as if nothing had
happened.

A state is one safetensors file that has its name only when it is whole; the newest two are kept.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoint.writing import Planned, write_safetensors
from ..errors import RequestError
from .optimizer import Average
from .sharding import alike, whole

KEPT = 2
NAME = re.compile(r"state-(\d{6,})\.safetensors")


def collect(
    weights: Mapping[str, Tensor], chosen: torch.optim.Optimizer, average: Average | None
) -> dict[str, Tensor]:
    """A state's tensors, whole; every process must ask."""
    tensors = {f"weights/{name}": whole(weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        for key, value in chosen.state.get(weight, {}).items():
            value = whole(value) if isinstance(value, Tensor) else torch.tensor(float(value))
            tensors[f"optimizer/{name}/{key}"] = value
    if average is not None:
        tensors |= {f"average/{name}": whole(value) for name, value in average.values.items()}
    return tensors


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> Path:
    """Write the state after `step` steps; older ones but one are removed.

    Raises:
        CheckpointError: the disk is full or cannot be written; older states are untouched.
    """
    path = folder / f"state-{step:06d}.safetensors"
    save(path, tensors, {"lance_state": json.dumps({"step": step, **told}, sort_keys=True)})
    for old in paths(folder)[:-KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file, whole or not at all."""
    planned = [Planned(n, t.dtype, tuple(t.shape), partial(_on_cpu, t)) for n, t in tensors.items()]
    write_safetensors(path, planned, metadata)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def paths(folder: Path) -> list[Path]:
    """The states in a folder, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("state-*.safetensors") if (m := NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest state that can be opened, and what it says of itself; None where there is none.

    Raises:
        RequestError: there are states, and none can be read.
    """
    listed = paths(folder)
    for path in reversed(listed):
        with contextlib.suppress(OSError, SafetensorError, ValueError), safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get("lance_state", "null"))
            if isinstance(told, dict) and isinstance(told.get("step"), int):
                return path, told
    if listed:
        raise RequestError(f"{listed[-1]} is damaged, and so are older states; leave --resume out")
    return None


def restore(
    path: Path,
    weights: Mapping[str, nn.Parameter],
    chosen: torch.optim.Optimizer,
    average: Average | None,
) -> None:
    """Give weights, optimiser and average what they had.

    Raises:
        RequestError: it is a state of other weights.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read ({str(error)[:150]})") from None
    shapes = {n: tuple(t.shape) for n, t in tensors.items() if n.startswith("weights/")}
    expected = {f"weights/{n}": tuple(w.shape) for n, w in weights.items()}
    if shapes != expected:
        odd = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))
        raise RequestError(
            f"{path} is a state of another model, rank or choice of layers: {len(odd)} tensors differ, such "
            f"as {odd[0].removeprefix('weights/')}"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(alike(tensors.pop(f"weights/{name}"), weight))
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "average" and average is not None:
            average.values[name] = alike(value, weights[name])
        elif kind == "optimizer":
            name, _, entry = name.rpartition("/")
            # AdamW counts its steps on the CPU whatever the weights are on.
            value = value if entry == "step" else alike(value, weights[name])
            chosen.state[weights[name]][entry] = value
