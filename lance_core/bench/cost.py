"""What the model's passes cost at least: floating-point operations and bytes read, from the configuration
alone.

Multiplications and additions count one each. Only matrix products, convolutions and attention are counted;
attention is a rectangle of queries by keys, causal or not. Bytes are each weight and each cached key and
value once: what a pass must read however well it is written. Nothing is measured here; measure.py sets times
against these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import LATENT_CHANNELS, TIME_FREQUENCIES, LLMConfig, VAEConfig, ViTConfig
from ..model.plan import Plan
from ..model.sequence import MARKERS, is_clean, merge_text
from ..model.vit import window_classes
from ..vae.wan import WanVAE


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one pass."""

    flops: int
    bytes: int


def layer_weights(config: LLMConfig) -> int:
    """Matrix weights of one expert in one layer."""
    hidden, heads, kv = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    return hidden * (2 * heads + 2 * kv + 3 * config.intermediate_size)


def expert_weights(config: LLMConfig) -> int:
    """Matrix weights of one expert in all layers."""
    return config.num_layers * layer_weights(config)


def kv_values(config: LLMConfig) -> int:
    """Cached numbers per context token in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim


def block_flops(config: LLMConfig, queries: int, keys: int) -> int:
    """All layers over `queries` tokens that see `keys` tokens, themselves included; which expert makes no
    difference.
    """
    attention = 4 * queries * keys * config.num_heads * config.head_dim
    return config.num_layers * (2 * layer_weights(config) * queries + attention)


def latent_flops(config: LLMConfig, grid: tuple[int, int, int]) -> int:
    """Latents and their timesteps to embeddings."""
    frames, h, w = grid
    hidden = config.hidden_size
    return 2 * frames * h * w * LATENT_CHANNELS * hidden + 2 * frames * (
        TIME_FREQUENCIES * hidden + hidden**2
    )


def step(
    config: LLMConfig, grid: tuple[int, int, int], contexts: SequenceOf[int], batch: int, itemsize: int
) -> Cost:
    """One denoising step of `batch` results, each against one context of every length in `contexts` (two when
    guided).

    The understanding expert's weights are read for the two markers as the generation expert's are for the
    latents.
    """
    tokens = grid[0] * grid[1] * grid[2]
    out = 2 * tokens * LATENT_CHANNELS * config.hidden_size
    rows = [
        block_flops(config, tokens + MARKERS, tokens + MARKERS + n) + latent_flops(config, grid) + out
        for n in contexts
    ]
    return Cost(
        batch * sum(rows), itemsize * (2 * expert_weights(config) + sum(contexts) * kv_values(config))
    )


def prefill(config: LLMConfig, plan: Plan, itemsize: int) -> Cost:
    """A plan's contexts, the shared prefix once. Reading the understanding expert's weights counts once,
    however many blocks there are.
    """
    flops, generation = 0, False
    shared = plan.lengths[0]
    for part, before in ((plan.prefix, 0), *((rest, shared) for rest in plan.rests.values())):
        for segment, _ in merge_text(part):
            queries = segment.length
            before += queries
            flops += block_flops(config, queries, before)
            if is_clean(segment):
                generation = True
                flops += latent_flops(config, segment.grid)
    return Cost(flops, itemsize * (1 + generation) * expert_weights(config))


def token(config: LLMConfig, context: int, itemsize: int) -> Cost:
    """One text token after `context` tokens, its logits included."""
    head = config.hidden_size * config.vocab_size
    flops = block_flops(config, 1, context + 1) + 2 * head
    return Cost(flops, itemsize * (expert_weights(config) + head + context * kv_values(config)))


def vit(config: ViTConfig, grid: tuple[int, int, int], itemsize: int) -> Cost:
    """The vision tower over a grid (t, h, w) of patches."""
    t, h, w = grid
    hidden, merge = config.hidden_size, config.spatial_merge_size
    side = config.window_size // merge // config.patch_size
    _, classes = window_classes(h // merge, w // merge, side, merge**2)
    full = sum(i in config.fullatt_block_indexes for i in range(config.depth))
    pairs = t * (full * (h * w) ** 2 + (config.depth - full) * sum(c.count * c.tokens**2 for c in classes))
    joined = hidden * merge**2
    embed = config.in_channels * config.temporal_patch_size * config.patch_size**2 * hidden
    blocks = config.depth * (4 * hidden**2 + 3 * hidden * config.intermediate_size)
    merger = joined**2 + joined * config.out_hidden_size
    flops = 2 * t * h * w * (embed + blocks) + 4 * pairs * hidden + 2 * t * h * w // merge**2 * merger
    return Cost(flops, itemsize * (embed + blocks + merger))


def vae(config: VAEConfig, grid: tuple[int, int, int], decode: bool, itemsize: int) -> Cost:
    """The VAE one way for a latent grid (t, h, w). Counted by running up to three latent frames on torch's
    meta device.

    Every one after the third costs the same: the first two have less of a past. Activations, most of what a
    VAE moves, are not in the bytes.
    """
    t, h, w = grid
    model = WanVAE(config, device="meta")
    counts = []
    for frames in (1, 2, 3)[:t]:
        counter = FlopCounterMode(display=False)
        with counter:
            if decode:
                model.decode(torch.empty(1, config.latent_channels, frames, h, w, device="meta"))
            else:
                scale, length = config.spatial_ratio, 1 + config.temporal_ratio * (frames - 1)
                model.encode(torch.empty(1, 3, length, h * scale, w * scale, device="meta"))
        counts.append(counter.get_total_flops())
    later = (t - 3) * (counts[2] - counts[1]) if t > 3 else 0
    half = (model.conv2, model.decoder) if decode else (model.encoder, model.conv1)
    return Cost(counts[-1] + later, itemsize * sum(p.numel() for m in half for p in m.parameters()))
