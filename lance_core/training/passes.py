"""The teacher-forced pass: both experts over whole packed samples, with gradients.

The same modules as inference, without its caches: those are written in place, which autograd cannot follow.
Precision is inference's too: products in the compute dtype, norms, rope, noising and losses in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config import LLMConfig
from ..errors import RequestError
from ..model import rope
from ..model.attention import Attention, attention
from ..model.decoder import ExpertLayer
from ..model.experts import Generation, Understanding, latent_positions
from .packed import Block, Packed


@dataclass(eq=False)
class Experts:
    """What is trained: both experts' modules, or the understanding one alone.

    vocabulary: tokens the tokeniser has; lm_head may have more rows. dtype: of the computation.
    """

    config: LLMConfig
    und: Understanding
    gen: Generation | None
    tokens_per_second: float
    vocabulary: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    attention: Attention = attention


@dataclass(frozen=True, eq=False)
class _Frame:
    """What every layer of a pass needs beside the streams."""

    cos: Tensor
    sin: Tensor
    order: Tensor
    back: Tensor
    blocks: list[Block]
    attention: Attention
    detached: bool


def run(
    experts: Experts,
    packed: Packed,
    noise: Sequence[Tensor | None],
    times: Sequence[float | None],
    checkpointing: bool = True,
    detach_understanding: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Normed outputs of both streams: [u, hidden], and [g, hidden] or None.

    Args:
        noise, times: per sample, see `objective.loss`.
        checkpointing: keep only what is between the layers, and compute each layer again on the way back.
        detach_understanding: no gradient flows into or through understanding tokens' keys, values and
            residual stream (the released FREEZE_UND).
    """
    device = experts.device
    if packed.latents and experts.gen is None:
        raise RequestError("these samples have latents in them, and only the understanding expert is loaded")
    und = _embed(experts, packed)
    gen = _latents(experts, packed, noise, times) if packed.latents else None
    cos, sin = rope.tables(packed.position, experts.config, device)
    order = packed.order.to(device)
    frame = _Frame(
        cos[None, :, None],
        sin[None, :, None],
        order,
        order.argsort(),
        packed.blocks,
        experts.attention,
        detach_understanding,
    )
    gen_layers = [None] * len(experts.und.layers) if experts.gen is None else list(experts.gen.layers)
    again = checkpointing and torch.is_grad_enabled()
    for und_layer, gen_layer in zip(experts.und.layers, gen_layers, strict=True):
        inputs = (und_layer, gen_layer, und, gen, frame)
        if again:
            und, gen = checkpoint(_layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            und, gen = _layer(*inputs)
    und = experts.und.norm(und)[0]
    und = und.detach() if detach_understanding else und
    return und, None if gen is None or experts.gen is None else experts.gen.norm(gen)[0]


def _embed(experts: Experts, packed: Packed) -> Tensor:
    """The understanding stream's input, [1, u, hidden]."""
    und = experts.und.embed_tokens(packed.ids.to(experts.device)).to(experts.dtype)
    if packed.vit_embeds is not None:
        embeds = packed.vit_embeds.to(experts.device, experts.dtype)
        und = und.index_copy(0, packed.vit_places.to(experts.device), embeds)
    return und[None]


def _latents(
    experts: Experts, packed: Packed, noise: Sequence[Tensor | None], times: Sequence[float | None]
) -> Tensor:
    """The generation stream's input, [1, g, hidden]: x = (1 - t) latent + t noise; t = 0 where clean."""
    if experts.gen is None:
        raise RequestError("latents need the generation expert, which is not loaded")
    parts = []
    for block in packed.latents:
        data = block.data.to(experts.device, torch.float32)
        t, (frames, h, w) = torch.zeros(len(data), device=experts.device), data.shape[:3]
        if block.clean_frames is not None:
            t = frame_times(block.clean_frames, frames, times[block.sample]).to(experts.device)
            at = t[:, None, None, None]
            data = (1 - at) * data + at * target_noise(noise, block.sample).to(experts.device)
        table = latent_positions((frames, h, w), experts.config.hidden_size)
        table = table.to(experts.device, experts.dtype)
        parts.append(experts.gen.embed_latents(data[None], t[None], table, experts.dtype))
    return torch.cat(parts, dim=1)


def frame_times(clean_frames: tuple[int, ...], frames: int, time: float | None) -> Tensor:
    """Time of every latent frame of a target, float32 [frames]."""
    if time is None:
        raise RequestError("a sample with a target needs a time in 0..1, and None came")
    t = torch.full((frames,), float(time), dtype=torch.float32)
    t[list(clean_frames)] = 0
    return t


def target_noise(noise: Sequence[Tensor | None], sample: int) -> Tensor:
    """The noise of a sample's target, float32."""
    found = noise[sample]
    if found is None:
        raise RequestError(f"sample {sample} has a target and needs noise of its shape, and None came")
    return found.float()


def _layer(
    und_layer: ExpertLayer, gen_layer: ExpertLayer | None, und: Tensor, gen: Tensor | None, frame: _Frame
) -> tuple[Tensor, Tensor | None]:
    """One layer: each expert's projections, one attention over all, each expert's feed-forward."""
    split = und.shape[1]
    heads = _heads(und_layer, und, frame.cos[:, :split], frame.sin[:, :split])
    if frame.detached:
        heads = tuple(h.detach() for h in heads)
    if gen is not None and gen_layer is not None:
        more = _heads(gen_layer, gen, frame.cos[:, split:], frame.sin[:, split:])
        heads = tuple(torch.cat(pair, dim=1) for pair in zip(heads, more, strict=True))
    q, k, v = (h.index_select(1, frame.order) for h in heads)
    del heads
    out = torch.cat(
        [
            frame.attention(q[:, b.start : b.stop], k[:, b.first : b.stop], v[:, b.first : b.stop], b.causal)
            for b in frame.blocks
        ],
        dim=1,
    ).index_select(1, frame.back)
    und = _finish(und_layer, und, out[:, :split])
    und = und.detach() if frame.detached else und
    if gen is not None and gen_layer is not None:
        gen = _finish(gen_layer, gen, out[:, split:])
    return und, gen


def _heads(layer: ExpertLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of x [1, n, hidden], rope applied."""
    q, k, v = layer.self_attn.project(layer.input_layernorm(x))
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [1, n, heads, width] turned by cos and sin [1, n, 1, width], in float32."""
    low, high = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


def _finish(layer: ExpertLayer, x: Tensor, attended: Tensor) -> Tensor:
    """The residual stream after attention and feed-forward."""
    x = x + layer.self_attn.o_proj(attended.flatten(2).contiguous())
    return x + layer.mlp(layer.post_attention_layernorm(x))
