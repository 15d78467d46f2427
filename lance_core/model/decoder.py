"""The dual-expert decoder: two stacks of the same shape, joined only for attention.

A layer takes two tensors, `und` (text, ViT and marker tokens) and `gen` (latent tokens), projects each with
its own expert's weights, runs one attention over both and splits again. Either may be empty. Expert stacks
are separate modules so that a host can place, load and patch them separately.

Precision: weights and matmuls in the compute dtype; norms and rope compute in float32 inside (ops.RMSNorm,
rope.rotate).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LLMConfig
from ..errors import RequestError
from .kv_cache import Attend
from .ops import TorchOps
from .rope import rotate_into
from .side_stream import SideStream

FEED_CHUNK = 8192  # tokens a feed-forward takes at once; enough to keep any device busy
CPU_FEED_CHUNK = 512  # the same on a CPU, whose caches should hold what is between two products; measured
# Projections of one input that run as one product, by the name of the joined layer; files keep them apart.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class SelfAttention(nn.Module):
    """One expert's projections around the shared attention."""

    def __init__(self, config: LLMConfig, ops=TorchOps, device=None, dtype=None) -> None:
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        self.options = {"bias": True, **kw}  # of what may be joined
        hidden, width = config.hidden_size, config.head_dim
        self.width, self.heads = width, (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.q_proj = ops.Linear(hidden, config.num_heads * width, bias=True, **kw)
        self.k_proj = ops.Linear(hidden, config.num_kv_heads * width, bias=True, **kw)
        self.v_proj = ops.Linear(hidden, config.num_kv_heads * width, bias=True, **kw)
        self.o_proj = ops.Linear(config.num_heads * width, hidden, bias=False, **kw)
        self.q_norm = ops.RMSNorm(width, eps=config.rms_eps, **kw)
        self.k_norm = ops.RMSNorm(width, eps=config.rms_eps, **kw)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, n, hidden] -> normed q [b, n, heads, width], normed k and v [b, n, kv_heads, width]."""
        if "qkv_proj" in self._modules:
            q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.width)).split(self.heads, dim=-2)
        else:
            q, k, v = (p(x).unflatten(-1, (-1, self.width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.q_norm(q), self.k_norm(k), v


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LLMConfig, ops=TorchOps, device=None, dtype=None) -> None:
        super().__init__()
        kw = self.options = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = ops.Linear(config.hidden_size, config.intermediate_size, **kw)
        self.up_proj = ops.Linear(config.hidden_size, config.intermediate_size, **kw)
        self.down_proj = ops.Linear(config.intermediate_size, config.hidden_size, **kw)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, n, hidden] -> the same shape."""
        # Two axes: compiled, halves of wide rows that have a batch axis are multiplied result by result, each
        # with a copy of the weight.
        rows = x.flatten(0, -2)
        if "gate_up_proj" in self._modules:
            gate, up = self.gate_up_proj(rows).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(rows), self.up_proj(rows)
        gate = F.silu(gate) * up if gate.requires_grad else F.silu(gate, inplace=True).mul_(up)
        return self.down_proj(gate).view(x.shape)


class ExpertLayer(nn.Module):
    """One expert's half of a decoder layer: everything but the attention itself."""

    def __init__(self, config: LLMConfig, ops=TorchOps, device=None, dtype=None) -> None:
        super().__init__()
        kw = {"ops": ops, "device": device, "dtype": dtype}
        norm = {"eps": config.rms_eps, "device": device, "dtype": dtype}
        self.input_layernorm = ops.RMSNorm(config.hidden_size, **norm)
        self.self_attn = SelfAttention(config, **kw)
        self.post_attention_layernorm = ops.RMSNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, **kw)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the rotated queries and keys and the values of x [b, n, hidden] to q, k and v [b, n, heads,
        width]: slices of tensors that both experts fill, so that joining them costs no pass of its own."""
        queries, keys, values = self.self_attn.project(self.input_layernorm(x))
        rotate_into(q, queries, cos, sin)
        rotate_into(k, keys, cos, sin)
        v.copy_(values)

    def attended(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Residual stream after attention [b, n, heads, width], and what the feed-forward reads. Without
        autograd, x is overwritten.
        """
        # Contiguous, because torch multiplies a sliced batch row by row, copying the weight each time.
        x = _add(x, self.self_attn.o_proj(attended.flatten(2).contiguous()))
        return x, self.post_attention_layernorm(x)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream after attention and feed-forward. Without autograd, x is overwritten; many tokens
        then go through in pieces, so that the wide intermediates of a video never exist at once."""
        x, normed = self.attended(x, attended)
        if torch.is_grad_enabled():
            return x + self.mlp(normed)
        rows, tokens = x.view(-1, x.shape[-1]), normed.view(-1, x.shape[-1])
        piece = CPU_FEED_CHUNK if x.is_cpu else FEED_CHUNK
        for start in range(0, len(rows), piece):
            one = slice(start, start + piece)
            rows[one].add_(self.mlp(tokens[one]))
        return x


def _add(x: Tensor, more: Tensor) -> Tensor:
    """x + more, in x's place unless autograd may want x again: a video's stream is hundreds of megabytes a
    row.
    """
    return x + more if torch.is_grad_enabled() else x.add_(more)


def join(module: nn.Module) -> nn.Module:
    """Make one layer of the projections that share an input (JOINED), in place; returns the module.

    One product instead of three or two: fewer kernels, and none too narrow to fill a device. A module without
    weights gets them later, under the joined names. Quantised projections stay apart, as each may have scales
    of its own.
    """
    for owner in [m for m in module.modules() if isinstance(m, SelfAttention | MLP)]:
        for name, parts in JOINED.items():
            layers = [owner._modules.get(part) for part in parts]
            if not all(isinstance(layer, nn.Linear) and not hasattr(layer, "format") for layer in layers):
                continue
            first, width = layers[0], sum(layer.out_features for layer in layers)
            made = type(first)(first.in_features, width, **owner.options | {"device": "meta"})
            for leaf, old in first.named_parameters():
                if not old.is_meta:
                    setattr(
                        made,
                        leaf,
                        nn.Parameter(
                            torch.cat([getattr(layer, leaf) for layer in layers]), requires_grad=False
                        ),
                    )
            made.rows = {part: layer.out_features for part, layer in zip(parts, layers, strict=True)}
            for part in parts:
                delattr(owner, part)
            setattr(owner, name, made.train(first.training))
    return module


def homes(module: nn.Module) -> dict[str, tuple[str, slice, tuple[int, ...]]]:
    """Where the tensors of joined projections went: name in a file -> (name in the module, rows there, shape
    there).
    """
    found = {}
    for path, owner in module.named_modules():
        for name in JOINED:
            start, layer = 0, owner._modules.get(name) if isinstance(owner, SelfAttention | MLP) else None
            for part, count in layer.rows.items() if layer is not None else ():
                rows, start = slice(start, start + count), start + count
                found[f"{path}.{part}.weight"] = (
                    f"{path}.{name}.weight",
                    rows,
                    (layer.out_features, layer.in_features),
                )
                if owner.options["bias"]:
                    found[f"{path}.{part}.bias"] = (f"{path}.{name}.bias", rows, (layer.out_features,))
    return found


def compile_layers(module: nn.Module) -> nn.Module:
    """Have torch.compile fuse what lies between a layer's matrix products, in place; returns the module.

    All layers of both experts share three compiled functions; sizes are symbolic, so other prompts and
    pictures compile nothing
    anew: once for one row and once for several, one token and several.
    """
    project, attended, mlp = _compiled()
    for layer in module.layers:
        layer.project, layer.attended = partial(project, layer), partial(attended, layer)
        layer.mlp.forward = partial(mlp, layer.mlp)
    return module


def check_compiler(device: torch.device) -> None:
    """Compile a trifle, so that what is missing is told before any weight is read.

    Raises:
        RequestError: torch.compile does not work on this machine; says why.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except (
        Exception
    ) as error:  # a C++ compiler, Triton, Python's headers: whatever is missing has an exception of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"compile: torch.compile does not work here ({reason[:200]}); leave it off, or install what is "
            "missing"
        ) from None


@cache
def _compiled() -> tuple[Callable, ...]:
    return tuple(
        torch.compile(f, dynamic=True) for f in (ExpertLayer.project, ExpertLayer.attended, MLP.forward)
    )


def run_layer(
    index: int,
    und_layer: ExpertLayer,
    gen_layer: ExpertLayer | None,
    und: Tensor,
    gen: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
) -> tuple[Tensor, Tensor | None]:
    """One dual-stream layer.

    und: [b, u, hidden]; gen: [b, g, hidden] or None; cos, sin: [b or 1, u + g, width], markers first.
    """
    split = und.shape[1]
    q, k, v = _heads(und_layer, und, split + (0 if gen is None else gen.shape[1]))
    und_layer.project(und, cos[:, :split], sin[:, :split], *(t[:, :split] for t in (q, k, v)))
    if gen is not None:
        gen_layer.project(gen, cos[:, split:], sin[:, split:], *(t[:, split:] for t in (q, k, v)))
    out = attend(index, q, k, v)
    del q, k, v  # a video's are hundreds of megabytes
    und = und_layer.finish(und, out[:, :split])
    return und, None if gen is None else gen_layer.finish(gen, out[:, split:])


def _heads(layer: ExpertLayer, x: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """Room for queries, keys and values of so many tokens."""
    return tuple(
        x.new_empty(x.shape[0], tokens, heads, layer.self_attn.width) for heads in layer.self_attn.heads
    )


def run_layers(
    und_layers: nn.ModuleList,
    gen_layers: nn.ModuleList | None,
    und: Tensor,
    gen: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    side: SideStream | None = None,
) -> tuple[Tensor, Tensor | None]:
    """All layers; see `run_layer`. `gen_layers` is needed only when there are generation tokens.

    Without autograd `gen` is overwritten; `und` is not, so that marker embeddings can be shared. side: where
    the understanding expert works while the generation expert does, its tokens being few; the result is the
    same.
    """
    und = und.clone()
    if side is not None and gen is not None and not torch.is_grad_enabled():
        return _run_beside(und_layers, gen_layers, und, gen, cos, sin, attend, side)
    for i, und_layer in enumerate(und_layers):
        und, gen = run_layer(
            i, und_layer, gen_layers[i] if gen is not None else None, und, gen, cos, sin, attend
        )
    return und, gen


def _run_beside(
    und_layers: nn.ModuleList,
    gen_layers: nn.ModuleList,
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
        und, few = side.result()
        for whole, part in zip((q, k, v), few, strict=True):
            whole[:, :split] = part
        out = attend(i, q, k, v)
        del q, k, v
        side.start(partial(between, i + 1, und, out[:, :split].clone()))  # a view would hold on to all of it
        gen = gen_layer.finish(gen, out[:, split:])
    return side.result()[0], gen
