"""The dual-expert decoder: two stacks of the same shape, joined only for attention.

A layer takes two tensors, `und` (text, ViT and marker tokens) and `gen` (latent tokens). `decoder_layer`
reads top to bottom: norm, project and rope with each expert's own weights (`ExpertLayer.project`), one
attention over both, then project back and feed-forward, again with each expert's own (`ExpertLayer.finish`).
The stacks are separate modules, so that they can be placed, loaded and patched separately.

Precision: weights and matmuls in the compute dtype; norms and rope compute in float32 inside (ops.RMSNorm,
rope.rotate_into).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LLMConfig
from . import kernels
from .joined import JOINED, JoinsOnLoad, joined_in, joined_linear
from .kv_cache import Attend, KeysValues
from .layer_hooks import Layer, LayerHooks
from .ops import TorchOps
from .rope import rotate_into
from .side_stream import SideStream

FEED_CHUNK = 8192  # tokens a feed-forward takes at once; enough to keep any device busy
CPU_FEED_CHUNK = 512  # the same on a CPU, whose caches should hold what is between two products; measured


class SelfAttention(JoinsOnLoad):
    """One expert's projections around the shared attention. joined: q, k and v are one layer, `qkv_proj`."""

    def __init__(
        self,
        config: LLMConfig,
        ops: Any = TorchOps,
        device: Any = None,
        dtype: Any = None,
        joined: bool = True,
    ) -> None:
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        hidden, width = config.hidden_size, config.head_dim
        self.joined, self.width = joined, width
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        sizes = {part: heads * width for part, heads in zip(JOINED["qkv_proj"], self.heads, strict=True)}
        if joined:
            self.qkv_proj = joined_linear(ops, hidden, sizes, bias=True, **kw)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                ops.Linear(hidden, size, bias=True, **kw) for size in sizes.values()
            )
        self.o_proj = ops.Linear(config.num_heads * width, hidden, bias=False, **kw)
        self.q_norm = ops.RMSNorm(width, eps=config.rms_eps, **kw)
        self.k_norm = ops.RMSNorm(width, eps=config.rms_eps, **kw)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, n, hidden] -> q [b, n, heads * width], k and v [b, n, kv_heads * width], nothing normed."""
        if self.joined:
            q, k, v = self.qkv_proj(x).split([heads * self.width for heads in self.heads], dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return q, k, v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, n, hidden] -> normed q [b, n, heads, width], normed k and v [b, n, kv_heads, width]."""
        return self.normed(*self.projected(x))

    def normed(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `projected` gives, with its heads apart and queries and keys normed."""
        q, k, v = (t.unflatten(-1, (-1, self.width)) for t in projected)
        return self.q_norm(q), self.k_norm(k), v


class MLP(JoinsOnLoad):
    """SwiGLU feed-forward. joined: gate and up are one layer, `gate_up_proj`."""

    def __init__(
        self,
        config: LLMConfig,
        ops: Any = TorchOps,
        device: Any = None,
        dtype: Any = None,
        joined: bool = True,
    ) -> None:
        super().__init__()
        kw = {"bias": False, "device": device, "dtype": dtype}
        hidden, inner = config.hidden_size, config.intermediate_size
        self.joined = joined
        if joined:
            self.gate_up_proj = joined_linear(ops, hidden, dict.fromkeys(JOINED["gate_up_proj"], inner), **kw)
        else:
            self.gate_proj = ops.Linear(hidden, inner, **kw)
            self.up_proj = ops.Linear(hidden, inner, **kw)
        self.down_proj = ops.Linear(inner, hidden, **kw)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, n, hidden] -> the same shape."""
        # Two axes: with a batch axis, compiled code multiplies the halves of wide rows result by result, each
        # with a copy of the weight.
        rows = x.flatten(0, -2)
        if self.joined:
            gate, up = self.gate_up_proj(rows).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(rows), self.up_proj(rows)
        fused = kernels.silu_mul(gate, up) if kernels.usable(gate) else None
        if fused is not None:
            gate = fused
        else:
            gate = F.silu(gate) * up if gate.requires_grad else F.silu(gate, inplace=True).mul_(up)
        return self.down_proj(gate).view(x.shape)


class ExpertLayer(nn.Module):
    """One expert's half of a decoder layer: all before the attention (`project`), all after it (`finish`).

    joined: names of JOINED whose projections are one layer.
    """

    def __init__(
        self,
        config: LLMConfig,
        ops: Any = TorchOps,
        device: Any = None,
        dtype: Any = None,
        joined: Collection[str] = tuple(JOINED),
    ) -> None:
        super().__init__()
        kw = {"ops": ops, "device": device, "dtype": dtype}
        norm = {"eps": config.rms_eps, "device": device, "dtype": dtype}
        self.input_layernorm = ops.RMSNorm(config.hidden_size, **norm)
        self.self_attn = SelfAttention(config, **kw, joined="qkv_proj" in joined)
        self.post_attention_layernorm = ops.RMSNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, **kw, joined="gate_up_proj" in joined)
        self.steps = PLAIN_STEPS

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Norm, project, rope: write the queries, keys and values of x [b, n, hidden] to q, k and v [b, n,
        heads, width]. These are slices of tensors that both experts fill, so joining them costs no copy.
        """
        self.steps.project(self, x, cos, sin, q, k, v)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Project back, feed-forward: the residual stream x [b, n, hidden] after attention [b, n, heads,
        width] and feed-forward.

        Without autograd x is overwritten, and many tokens go through the feed-forward in chunks, so that the
        wide intermediates of a video never exist at once.
        """
        x, normed = self.steps.add_attention(self, x, attended)
        if torch.is_grad_enabled():
            return x + self.steps.feed_forward(self.mlp, normed)
        rows, tokens = x.view(-1, x.shape[-1]), normed.view(-1, x.shape[-1])
        chunk = CPU_FEED_CHUNK if x.is_cpu else FEED_CHUNK
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            rows[part].add_(self.steps.feed_forward(self.mlp, tokens[part]))
        return x


def project(layer: ExpertLayer, x: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """`ExpertLayer.project`."""
    attn = layer.self_attn
    projected = attn.projected(layer.input_layernorm(x))
    if kernels.usable(x) and kernels.norm_rope(projected, (attn.q_norm, attn.k_norm), cos, sin, (q, k, v)):
        return
    queries, keys, values = attn.normed(*projected)
    rotate_into(q, queries, cos, sin)
    rotate_into(k, keys, cos, sin)
    v.copy_(values)


def add_attention(layer: ExpertLayer, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream after attention [b, n, heads, width], and its norm, which the feed-forward takes.
    Without autograd, x is overwritten.
    """
    # Contiguous, because torch multiplies a sliced batch row by row, copying the weight each time.
    out = layer.self_attn.o_proj(attended.flatten(2).contiguous())
    if kernels.usable(x):
        normed = kernels.add_norm(x, out, layer.post_attention_layernorm)
        if normed is not None:
            return x, normed
    # In place unless autograd may want x again: a video's stream is hundreds of megabytes a row.
    x = x + out if torch.is_grad_enabled() else x.add_(out)
    return x, layer.post_attention_layernorm(x)


class Steps(NamedTuple):
    """The parts of a layer that lie between its attention and its chunks, plain or compiled."""

    project: Callable[..., None]
    add_attention: Callable[..., tuple[Tensor, Tensor]]
    feed_forward: Callable[..., Tensor]


PLAIN_STEPS = Steps(project, add_attention, lambda mlp, x: mlp(x))


class ExpertStack(nn.ModuleList):
    """One expert's half of every layer."""

    def __iter__(self) -> Iterator[ExpertLayer]:
        return cast("Iterator[ExpertLayer]", super().__iter__())


def expert_layers(
    config: LLMConfig, ops: Any, device: Any, dtype: Any, joined: bool, apart: Collection[str]
) -> ExpertStack:
    """The stack of a decoder. joined, apart: see `joined.joined_in`."""
    return ExpertStack(
        ExpertLayer(config, ops, device, dtype, joined_in(f"layers.{i}", joined, apart))
        for i in range(config.num_layers)
    )


def decoder_layer(
    index: int,
    und_layer: ExpertLayer,
    gen_layer: ExpertLayer | None,
    und: Tensor,
    gen: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    hooks: LayerHooks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One dual-stream layer.

    und: [b, u, hidden]; gen: [b, g, hidden] or None; cos, sin: [b or 1, u + g, width], markers first. Of
    `hooks`, only `attended`.
    """
    split = und.shape[1]
    q, k, v = _heads(und_layer, und, split + (0 if gen is None else gen.shape[1]), attend.place(index))
    und_layer.project(und, cos[:, :split], sin[:, :split], *(t[:, :split] for t in (q, k, v)))
    if gen is not None and gen_layer is not None:
        gen_layer.project(gen, cos[:, split:], sin[:, split:], *(t[:, split:] for t in (q, k, v)))
    out = attend(index, q, k, v)
    del q, k, v  # a video's are hundreds of megabytes
    if hooks is not None:
        out = [hooks.attended(index, _part(out, 0, None), split)]
    und = und_layer.finish(und, _part(out, 0, split))
    if gen is not None and gen_layer is not None:
        gen = gen_layer.finish(gen, _part(out, split, None))
    return und, gen


def _heads(
    layer: ExpertLayer, x: Tensor, tokens: int, place: KeysValues | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for queries, keys and values of so many tokens; of the latter two, `place` if given."""
    width, heads = layer.self_attn.width, layer.self_attn.heads
    q = x.new_empty(x.shape[0], tokens, heads[0], width)
    k, v = place or (x.new_empty(x.shape[0], tokens, count, width) for count in heads[1:])
    return q, k, v


def _part(rows: list[Tensor], start: int, stop: int | None) -> Tensor:
    """Some tokens of attention's results, [b, n, heads, width]."""
    parts = [row[:, start:stop] for row in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@overload
def run_layers(
    und_layers: ExpertStack, gen_layers: ExpertStack, und: Tensor, gen: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """With generation tokens."""


@overload
def run_layers(
    und_layers: ExpertStack, gen_layers: ExpertStack | None, und: Tensor, gen: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    """With or without."""


def run_layers(
    und_layers: ExpertStack,
    gen_layers: ExpertStack | None,
    und: Tensor,
    gen: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    side: SideStream | None = None,
    hooks: LayerHooks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """All layers; see `decoder_layer`. `gen_layers` is needed only when there are generation tokens.

    Without autograd `gen` is overwritten; `und` is not, so that marker embeddings can be shared. side: a
    second stream for the understanding expert's few tokens, beside the generation expert's many; the result
    is the same. hooks: around the layers, for which `gen` is needed; the second stream is left alone then.
    """
    und = und.clone()
    if hooks is not None and gen is not None and gen_layers is not None:
        return _run_hooked(list(und_layers), list(gen_layers), und, gen, cos, sin, attend, hooks)
    if side is not None and gen is not None and gen_layers is not None and not torch.is_grad_enabled():
        return _run_beside(list(und_layers), list(gen_layers), und, gen, cos, sin, attend, side)
    gen_halves = [None] * len(und_layers) if gen is None or gen_layers is None else list(gen_layers)
    for i, (und_layer, gen_layer) in enumerate(zip(und_layers, gen_halves, strict=True)):
        und, gen = decoder_layer(i, und_layer, gen_layer, und, gen, cos, sin, attend)
    return und, gen


def _run_hooked(
    und_layers: list[ExpertLayer],
    gen_layers: list[ExpertLayer],
    und: Tensor,
    gen: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    hooks: LayerHooks,
) -> tuple[Tensor, Tensor]:
    """`run_layers` with `hooks` around each layer."""
    for i, (und_layer, gen_layer) in enumerate(zip(und_layers, gen_layers, strict=True)):
        run = partial(decoder_layer, i, und_layer, gen_layer, cos=cos, sin=sin, attend=attend, hooks=hooks)
        und, gen = hooks.around(i, und, gen, cast("Layer", run))
    return und, gen


def _run_beside(
    und_layers: list[ExpertLayer],
    gen_layers: list[ExpertLayer],
    und: Tensor,
    gen: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    side: SideStream,
) -> tuple[Tensor, Tensor]:
    """`run_layers` with everything of the understanding expert between two attentions on `side`."""
    split, count = und.shape[1], len(und_layers)

    def between(i: int, x: Tensor, attended: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """From the attention of layer i - 1 to that of layer i: the residual stream, and queries, keys and
        values.
        """
        if attended is not None:
            x = und_layers[i - 1].finish(x, attended)
        if i == count:
            return x, ()
        heads = _heads(und_layers[i], x, split)
        und_layers[i].project(x, cos[:, :split], sin[:, :split], *heads)
        return x, heads

    side.start(partial(between, 0, und, None))
    for i, gen_layer in enumerate(gen_layers):
        q, k, v = _heads(gen_layer, gen, split + gen.shape[1])
        gen_layer.project(gen, cos[:, split:], sin[:, split:], *(t[:, split:] for t in (q, k, v)))
        und, heads = side.result()
        for whole, part in zip((q, k, v), heads, strict=True):
            whole[:, :split] = part
        out = attend(i, q, k, v)
        del q, k, v
        few = _part(out, 0, split).clone()  # a view would hold on to all of it
        side.start(partial(between, i + 1, und, few))
        gen = gen_layer.finish(gen, _part(out, split, None))
    return side.result()[0], gen
