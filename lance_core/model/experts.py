"""The two experts' weights: embeddings, decoder stacks and heads, in the names of the checkpoint.

The checkpoint tells the experts apart by `_moe_gen` in a name, which is left out here: they are two modules.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LATENT_CHANNELS, MAX_LATENT_SIDE, TIME_FREQUENCIES, Grid, LLMConfig
from .decoder import expert_layers
from .ops import TorchOps


class Understanding(nn.Module):
    """The understanding expert: text embeddings, its half of every layer, and the head that writes text.

    joined, apart: which projections are one layer; see `joined.joined_in`.
    """

    def __init__(
        self,
        config: LLMConfig,
        ops: Any = TorchOps,
        device: Any = None,
        dtype: Any = None,
        joined: bool = True,
        apart: Collection[str] = (),
    ) -> None:
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        self.embed_tokens = ops.Embedding(config.vocab_size, config.hidden_size, **kw)
        self.layers = expert_layers(config, ops, **kw, joined=joined, apart=apart)
        self.norm = ops.RMSNorm(config.hidden_size, eps=config.rms_eps, **kw)
        self.lm_head = ops.Linear(config.hidden_size, config.vocab_size, bias=False, **kw)


class TimeEmbedder(nn.Module):
    """Timestep in 0..1 -> hidden, by sinusoids and a two-layer MLP."""

    def __init__(self, hidden: int, ops: Any = TorchOps, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        self.mlp = nn.Sequential(
            ops.Linear(TIME_FREQUENCIES, hidden, **kw), nn.SiLU(), ops.Linear(hidden, hidden, **kw)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t: float32 of any shape -> [..., hidden]."""
        return self.mlp(time_sinusoids(t).to(dtype))


class Generation(nn.Module):
    """The generation expert: latents in, its half of every layer, velocity out.

    joined, apart: which projections are one layer; see `joined.joined_in`.
    """

    def __init__(
        self,
        config: LLMConfig,
        ops: Any = TorchOps,
        device: Any = None,
        dtype: Any = None,
        joined: bool = True,
        apart: Collection[str] = (),
    ) -> None:
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        hidden = config.hidden_size
        self.layers = expert_layers(config, ops, **kw, joined=joined, apart=apart)
        self.norm = ops.RMSNorm(hidden, eps=config.rms_eps, **kw)
        self.time_embedder = TimeEmbedder(hidden, ops, **kw)
        self.vae2llm = ops.Linear(LATENT_CHANNELS, hidden, **kw)
        self.llm2vae = ops.Linear(hidden, LATENT_CHANNELS, **kw)

    def embed_latents(self, x: Tensor, t: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        """x [b, frames, h, w, 48] at timesteps t [b, frames] (0..1) -> [b, frames*h*w, hidden].

        table: [frames*h*w, hidden] in dtype, from `latent_positions`.
        """
        time = self.time_embedder(t.float(), dtype)[:, :, None, None]
        return (self.vae2llm(x.to(dtype)) + time).flatten(1, 3) + table


def time_sinusoids(t: Tensor) -> Tensor:
    """128 cosines then 128 sines of t * 10000^(-i/128), float32 [..., 256]; t in 0..1 and not scaled (as in
    DiT).
    """
    half = TIME_FREQUENCIES // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def latent_positions(grid: Grid, hidden: int) -> Tensor:
    """Fixed sine/cosine table of the cells' coordinates, float32 [t*h*w, hidden].

    Time and height each take a third of the width, rounded down to even; width takes the rest. Per axis
    sines, then cosines; frequencies in float64 (as MAE's `get_1d_sincos_pos_embed`). The weights were trained
    with a table of 64 cells a side, read by flat index: a row of more than 64 cells (21:9 at 768) continues
    in the next row's entries, and so it does here.
    """
    t, h, w = grid
    side = MAX_LATENT_SIDE
    flat = torch.arange(t)[:, None, None] * side * side + torch.arange(h)[:, None] * side + torch.arange(w)
    coordinates = (flat // side**2, flat // side % side, flat % side)
    third = hidden // 3 // 2 * 2
    parts = []
    for coordinate, width in zip(coordinates, (third, third, hidden - 2 * third), strict=True):
        frequencies = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
        angles = coordinate.flatten().double()[:, None] * frequencies
        parts += [angles.sin().float(), angles.cos().float()]
    return torch.cat(parts, dim=-1)


def expert_parameters(config: LLMConfig) -> int:
    """How many weights both experts have together, embeddings included; nothing is allocated."""
    experts = (Understanding(config, device="meta"), Generation(config, device="meta"))
    return sum(weight.numel() for expert in experts for weight in expert.parameters())
