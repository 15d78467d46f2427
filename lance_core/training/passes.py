"""The teacher-forced pass: both experts over whole packed samples, with gradients.

The same modules as inference, without its caches: those are written in place, which autograd cannot follow.
Precision is inference's too: products in the compute dtype, norms, rope, noising and losses in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import LATENT_CHANNELS, LLMConfig
from ..errors import RequestError
from ..model import rope
from ..model.attention import Attention, attention
from ..model.decoder import ExpertLayer
from ..model.experts import Generation, Understanding, latent_positions
from .packed import Block, Packed


@dataclass(eq=False)
class Experts:
    """What is trained: both experts' modules, or the understanding one alone.

    vocabulary: tokens the tokeniser has; lm_head may have more rows. dtype: of the computation. network: the
    pass over them.
    """

    config: LLMConfig
    und: Understanding
    gen: Generation | None
    tokens_per_second: float
    vocabulary: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    attention: Attention = attention
    network: Network = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.network = Network(self)


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


class Network(nn.Module):
    """The pass as a module, so that its weights can be sharded among processes layer by layer."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        und, gen = experts.und, experts.gen
        self._experts = (und, gen)  # no submodules of this one: their layers are its pairs
        halves = [None] * len(und.layers) if gen is None else list(gen.layers)
        self.pairs = nn.ModuleList(map(JointLayer, und.layers, halves))
        around = [und.embed_tokens, und.norm, und.lm_head]
        if gen is not None:
            around += [gen.norm, gen.time_embedder, gen.vae2llm, gen.llm2vae]
        self.around = nn.ModuleList(around)
        self.config, self.vocabulary = experts.config, experts.vocabulary
        self.dtype, self.device, self.attention = experts.dtype, experts.device, experts.attention

    @property
    def und(self) -> Understanding:
        """The understanding expert."""
        return self._experts[0]

    @property
    def gen(self) -> Generation | None:
        """The generation expert, if it is loaded."""
        return self._experts[1]

    def forward(
        self,
        packed: Packed,
        noise: Sequence[Tensor | None],
        times: Sequence[float | None],
        checkpointing: bool = True,
        detach_understanding: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """float32 logits [k, vocabulary] that predict the answers' tokens, and velocities [m, 48] of every
        token with t > 0.

        Args:
            noise, times: per sample, see `objective.loss`.
            checkpointing: keep only what is between the layers, and compute each layer again on the way back.
            detach_understanding: no gradient flows into or through understanding tokens' keys, values and
                residual stream (the released FREEZE_UND).

        Raises:
            RequestError: latents without the generation expert, or a target without time or noise.
        """
        if packed.latents and self.gen is None:
            raise RequestError(
                "these samples have latents in them, and only the understanding expert is loaded"
            )
        und = self._embed(packed)
        gen = self._latents(packed, noise, times) if packed.latents else None
        frame = self._frame(packed, detach_understanding)
        again = checkpointing and torch.is_grad_enabled()
        for pair in self.pairs:
            if again:
                und, gen = checkpoint(pair, und, gen, frame, use_reentrant=False, preserve_rng_state=False)
            else:
                und, gen = pair(und, gen, frame)
        und = self.und.norm(und)[0]
        und = und.detach() if detach_understanding else und
        logits = und.new_zeros((0, self.vocabulary), dtype=torch.float32)
        velocity = und.new_zeros((0, LATENT_CHANNELS), dtype=torch.float32)
        if len(packed.labels):
            before = und.index_select(0, packed.predicts.to(und.device))
            logits = self.und.lm_head(before)[:, : self.vocabulary].float()
        noisy = packed.noisy_tokens.to(und.device)
        if gen is not None and self.gen is not None and len(noisy):
            velocity = self.gen.llm2vae(self.gen.norm(gen)[0].index_select(0, noisy)).float()
        return logits, velocity

    def _frame(self, packed: Packed, detached: bool) -> _Frame:
        cos, sin = rope.tables(packed.position, self.config, self.device)
        order = packed.order.to(self.device)
        turned = (cos[None, :, None], sin[None, :, None])
        return _Frame(*turned, order, order.argsort(), packed.blocks, self.attention, detached)

    def _embed(self, packed: Packed) -> Tensor:
        """The understanding stream's input, [1, u, hidden]."""
        und = self.und.embed_tokens(packed.ids.to(self.device)).to(self.dtype)
        if packed.vit_embeds is not None:
            embeds = packed.vit_embeds.to(self.device, self.dtype)
            und = und.index_copy(0, packed.vit_places.to(self.device), embeds)
        return und[None]

    def _latents(
        self, packed: Packed, noise: Sequence[Tensor | None], times: Sequence[float | None]
    ) -> Tensor:
        """The generation stream's input, [1, g, hidden]: x = (1 - t) latent + t noise; t = 0 where clean."""
        if self.gen is None:
            raise RequestError("latents need the generation expert, which is not loaded")
        parts = []
        for block in packed.latents:
            data = block.data.to(self.device, torch.float32)
            t, (frames, h, w) = torch.zeros(len(data), device=self.device), data.shape[:3]
            if block.clean_frames is not None:
                t = frame_times(block.clean_frames, frames, times[block.sample]).to(self.device)
                at = t[:, None, None, None]
                data = (1 - at) * data + at * target_noise(noise, block.sample).to(self.device)
            table = latent_positions((frames, h, w), self.config.hidden_size).to(self.device, self.dtype)
            parts.append(self.gen.embed_latents(data[None], t[None], table, self.dtype))
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


class JointLayer(nn.Module):
    """One layer: each expert's projections, one attention over all, each expert's feed-forward."""

    def __init__(self, und: ExpertLayer, gen: ExpertLayer | None) -> None:
        super().__init__()
        self.und, self.gen = und, gen

    def forward(self, und: Tensor, gen: Tensor | None, frame: _Frame) -> tuple[Tensor, Tensor | None]:
        """Both residual streams, [1, u, hidden] and [1, g, hidden] or None."""
        split = und.shape[1]
        heads = _heads(self.und, und, frame.cos[:, :split], frame.sin[:, :split])
        if frame.detached:
            heads = tuple(h.detach() for h in heads)
        if gen is not None and self.gen is not None:
            more = _heads(self.gen, gen, frame.cos[:, split:], frame.sin[:, split:])
            heads = tuple(torch.cat(pair, dim=1) for pair in zip(heads, more, strict=True))
        q, k, v = (h.index_select(1, frame.order) for h in heads)
        del heads
        parts = []
        for b in frame.blocks:
            seen = slice(b.first, b.stop)
            parts.append(frame.attention(q[:, b.start : b.stop], k[:, seen], v[:, seen], b.causal))
        out = torch.cat(parts, dim=1).index_select(1, frame.back)
        und = _finish(self.und, und, out[:, :split])
        und = und.detach() if frame.detached else und
        if gen is not None and self.gen is not None:
            gen = _finish(self.gen, gen, out[:, split:])
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
