"""LoRA: small trained matrices beside frozen linear layers, and their files.

    y = base(x) + alpha / rank * B (A x)        (arXiv 2106.09685)

The base may be quantised and stays so. Files have the names that stock LoRA loaders of ComfyUI take for our
MODEL: `diffusion_model.layers.0.self_attn.q_proj.lora_A.weight`, `.lora_B.weight` and `.alpha`; the
understanding expert's begin with `diffusion_model.understanding.`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RequestError
from .passes import Experts

PREFIX = "diffusion_model."
UNDERSTANDING = "understanding."
TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
EXPERTS = {"generation": ("gen",), "understanding": ("und",), "both": ("gen", "und")}


class LoraLinear(nn.Module):
    """A frozen linear layer with trained matrices beside it, float32 and multiplied in the input's dtype.

    A [rank, in] starts uniform within 1 / sqrt(in) (Kaiming), B [out, rank] at 0: at first nothing changes.
    """

    def __init__(self, base: Any, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.rank, self.alpha = rank, alpha
        rows, columns = features(base)
        device = next(base.parameters()).device
        bound = 1 / math.sqrt(columns)
        drawn = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=device))

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        inner = F.linear(x, self.lora_A.to(x.dtype))
        return torch.add(self.base(x), F.linear(inner, self.lora_B.to(x.dtype)), alpha=self.scale)


def features(linear: Any) -> tuple[int, int]:
    """(out, in) features of a linear layer, quantised ones included."""
    if hasattr(linear, "out_features"):
        return linear.out_features, linear.in_features
    rows, columns = linear.weight.shape
    return rows, columns * linear.format.per_byte


def attach(
    experts: Experts,
    which: str,
    rank: int,
    alpha: float,
    targets: Collection[str] = ("attention", "mlp"),
    seed: int = 0,
) -> dict[str, LoraLinear]:
    """Put adapters around projections of every layer, by their names in a LoRA file.

    Args:
        which: "generation", "understanding" or "both" experts.
        targets: "attention", "mlp", or both.
        seed: of A.

    Raises:
        RequestError: projections that are joined, or an expert that is not loaded.
    """
    made: dict[str, LoraLinear] = {}
    generator = torch.Generator().manual_seed(seed)
    wanted = [leaf for target in targets for leaf in TARGETS[target]]
    for part in EXPERTS[which]:
        module = experts.gen if part == "gen" else experts.und
        if module is None:
            raise RequestError("a LoRA of the generation expert needs it loaded")
        for index, layer in enumerate(module.layers):
            for owner in ("self_attn", "mlp"):
                inside = getattr(layer, owner)
                for leaf in wanted:
                    if leaf not in TARGETS["attention" if owner == "self_attn" else "mlp"]:
                        continue
                    base = getattr(inside, leaf, None)
                    if base is None:
                        raise RequestError(
                            f"{owner}.{leaf} of layer {index} is joined with others; load the experts with "
                            "joined=False to train them"
                        )
                    adapter = LoraLinear(base, rank, alpha, generator)
                    setattr(inside, leaf, adapter)
                    side = "" if part == "gen" else UNDERSTANDING
                    made[f"{side}layers.{index}.{owner}.{leaf}"] = adapter
    return made


def trained(adapters: Mapping[str, LoraLinear]) -> dict[str, nn.Parameter]:
    """What an optimiser gets, by name."""
    return {
        f"{name}.{leaf}": getattr(adapter, leaf)
        for name, adapter in adapters.items()
        for leaf in ("lora_A", "lora_B")
    }


def file_tensors(
    adapters: Mapping[str, LoraLinear], values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A LoRA file's tensors, float32 on the CPU. values: instead of the adapters' own (an average), by
    `trained`'s names.
    """
    found: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        for leaf in ("lora_A", "lora_B"):
            value = getattr(adapter, leaf) if values is None else values[f"{name}.{leaf}"]
            found[f"{PREFIX}{name}.{leaf}.weight"] = value.detach().float().cpu().contiguous()
        found[f"{PREFIX}{name}.alpha"] = torch.tensor(float(adapter.alpha))
    return found


def fill(adapters: Mapping[str, LoraLinear], tensors: Mapping[str, Tensor], where: str) -> None:
    """Give adapters the values of a file's tensors.

    Raises:
        RequestError: the file's layers, ranks or shapes are other ones.
    """
    wanted = {
        f"{PREFIX}{name}.{leaf}.weight": getattr(adapter, leaf)
        for name, adapter in adapters.items()
        for leaf in ("lora_A", "lora_B")
    }
    shapes = {k: tuple(v.shape) for k, v in tensors.items() if not k.endswith(".alpha")}
    expected = {k: tuple(v.shape) for k, v in wanted.items()}
    if shapes != expected:
        raise RequestError(f"{where} is a LoRA of other layers or sizes: {_difference(shapes, expected)}")
    with torch.no_grad():
        for key, weight in wanted.items():
            weight.copy_(tensors[key])


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first thing two sets of shapes differ in, as a message can show it."""

    def first(names: Iterable[str]) -> str:
        return str(min(names, default=""))[:80]

    missing, more = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        return f"{len(missing)} of {len(expected)} tensors are missing, such as {first(missing)}"
    if more:
        return f"{len(more)} tensors belong to nothing here, such as {first(more)}"
    name = first(k for k in expected if found[k] != expected[k])
    return f"{name} has shape {list(found[name])}, expected {list(expected[name])}"
