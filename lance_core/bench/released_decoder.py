"""The released code's procedure, written plainly from the model's description, to measure ours against.

The same weights and the same results as ours, reached the way the released inference code does: tokens in
reading order, experts chosen per token by gathering and scattering into zero-filled copies, the whole
key/value cache copied into a new tensor in every layer of every pass, keys and values expanded to all query
heads, each guidance branch with a context of its own and a pass of its own, one row at a time. Nothing but
the benchmark and its tests uses this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import rope
from ..model.dual_expert import DualExpert
from ..model.experts import latent_positions
from ..model.joined import JoinedLinear
from ..model.plan import Plan
from ..model.sampler import Guidance, euler
from ..model.sequence import MARKERS, Branch, Kind, Placed, Sequence, TextSegment, merge_text


@dataclass(eq=False)
class Side:
    """One guidance branch: its own cache, a (keys, values) pair [tokens, kv_heads, width] a layer, and the
    target's rope.
    """

    cache: list[tuple[Tensor, Tensor] | None]
    target: Tensor | None


Part = Callable[[Tensor], Tensor]
Each = Callable[[str, Tensor], Tensor]


def parts_of(layer: Any) -> dict[str, Part]:
    """What one expert's layer (an ExpertLayer) is made of, each projection on its own and multiplied plainly:
    rows of a joined weight are views.
    """
    parts: dict[str, Part] = {}
    for owner in (layer.self_attn, layer.mlp):
        for name, module in owner.named_children():
            if not isinstance(module, nn.Linear):
                parts[name] = module
                continue
            rows = module.rows if isinstance(module, JoinedLinear) else {name: slice(None)}
            for part, own in rows.items():
                bias = None if module.bias is None else module.bias[own]
                parts[part] = partial(F.linear, weight=module.weight[own], bias=bias)
    parts["mlp"] = lambda x: parts["down_proj"](F.silu(parts["gate_proj"](x)) * parts["up_proj"](x))
    return parts | {name: getattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm")}


def _each(
    experts: tuple[dict[str, Part], dict[str, Part]],
    places: tuple[Tensor, Tensor] | None,
    name: str,
    x: Tensor,
) -> Tensor:
    """Every token through its own expert's part of that name; places: of each expert's tokens, None where
    all are the first's.
    """
    if places is None:
        return experts[0][name](x)
    out = torch.empty(0)
    for expert, where in zip(experts, places, strict=True):
        own = expert[name](x[where])
        out = out if len(out) else x.new_zeros(len(x), *own.shape[1:])
        out[where] = own
    return out


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x [n, heads, width] turned by cos and sin [n, width], in float32."""
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def reading_order(markers_first: Tensor) -> Tensor:
    """[..., tokens] with the two markers first -> start marker, visual tokens, end marker."""
    return torch.cat(
        [markers_first[..., :1], markers_first[..., MARKERS:], markers_first[..., 1:MARKERS]], dim=-1
    )


class Baseline:
    """The passes of `model.DualExpert`, the slow way, over the same modules."""

    def __init__(self, model: DualExpert) -> None:
        self.model, self.config = model, model.config
        self.und, self.gen = (
            [parts_of(layer) for layer in expert.layers] if expert else []
            for expert in (model.und, model.gen)
        )

    # -- passes ----------------------------------------------------------------------------------------------

    def prefill(self, plan: Plan) -> list[Side]:
        """Every branch's whole context, what they share included."""
        sides = []
        for branch, rest in plan.rests.items():
            side = Side([None] * self.config.num_layers, plan.targets.get(branch))
            self._extend(side, plan.sequence, plan.prefix + rest)
            sides.append(side)
        return sides

    def read(self, sequence: Sequence, tokens_per_second: float) -> tuple[Side, Tensor]:
        """An understanding prompt's cache and the next token's logits."""
        plan = Plan.of(sequence, tokens_per_second, guided=False)
        side = Side([None] * self.config.num_layers, None)
        placed = plan.prefix + plan.rests[Branch.CONDITIONAL]
        return side, self.model.logits(self._extend(side, sequence, placed)[None])

    def next_token(self, side: Side, token: int, position: int) -> Tensor:
        """Append one text token and return the logits after it, float32 [vocabulary]."""
        x = self._embed([token])
        return self.model.logits(
            self._pass(x, None, torch.full((3, 1), position), side, keep=True, causal=True)[None]
        )

    def following(self, side: Side) -> Callable[[int], Tensor]:
        """What `TokenLoop` is; where in the sequence the tokens lie makes no difference to the time."""
        first = side.cache[0] if side.cache else None
        places = count(0 if first is None else len(first[0]))
        return lambda token: self.next_token(side, token, next(places))

    def velocity(self, side: Side, sequence: Sequence, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of one row's noisy latents x [1, frames, h, w, 48] at t [1, frames]; float32, shaped like
        x.
        """
        gen, target = self.model.generation, side.target
        assert target is not None  # its branch was prefilled for generation
        tokens, where = self._visual(sequence, x, t)
        out = self._pass(tokens, where, reading_order(target), side, keep=False, causal=False)
        return gen.llm2vae(gen.norm(out[where])).float().view(x.shape)

    def denoise(
        self, sides: list[Side], sequence: Sequence, x: Tensor, times: Tensor, guidance: Guidance
    ) -> Tensor:
        """`Lance.denoise` with the branches, and the results of a batch, one after the other."""

        def velocity(x: Tensor, t: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
            frames = t.to(x.device).expand(1, x.shape[1])
            branches = [
                torch.cat([self.velocity(side, sequence, row[None], frames) for row in x])
                for side in sides[: 1 + guided]
            ]
            return branches[0], branches[1] if guided else None

        return euler(velocity, x, times, guidance)

    # -- inside a pass ---------------------------------------------------------------------------------------

    def _embed(self, ids: list[int]) -> Tensor:
        return self.model.und.embed_tokens(torch.tensor(ids, device=self.model.device)).to(self.model.dtype)

    def _visual(self, sequence: Sequence, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """A latent block in reading order [n, hidden] and the places of its latent tokens."""
        model = self.model
        grid = (x.shape[1], x.shape[2], x.shape[3])
        table = latent_positions(grid, self.config.hidden_size).to(model.device, model.dtype)
        latents = self.model.generation.embed_latents(x, t, table, model.dtype)[0]
        where = torch.arange(1, len(latents) + 1, device=model.device)
        tokens = latents.new_zeros(len(latents) + MARKERS, latents.shape[-1])
        tokens[where] = latents
        tokens[self._others(where, len(tokens))] = self._embed([sequence.start, sequence.end])
        return tokens, where

    def _extend(self, side: Side, sequence: Sequence, parts: list[Placed]) -> Tensor:
        hidden = torch.empty(0)
        for segment, position in merge_text(parts):
            where = None
            if isinstance(segment, TextSegment):
                tokens = self._embed(list(segment.ids))
            else:
                position, data = reading_order(position), segment.data.to(self.model.device)
                if segment.kind is Kind.VIT:
                    start, end = self._embed([sequence.start, sequence.end]).split(1)
                    tokens = torch.cat([start, data.to(self.model.dtype), end])
                else:
                    clean = torch.zeros(1, segment.grid[0], device=data.device)
                    tokens, where = self._visual(sequence, data[None], clean)
            causal = segment.kind is Kind.TEXT
            hidden = self._pass(tokens, where, position, side, keep=True, causal=causal)
        return hidden

    def _pass(
        self, x: Tensor, where: Tensor | None, position: Tensor, side: Side, keep: bool, causal: bool
    ) -> Tensor:
        """All layers over x [n, hidden], tokens `where` through the generation expert; `keep`: they become
        part of the cache.
        """
        turn = rope.tables(position, self.config, self.model.device)
        places = None if where is None else (self._others(where, len(x)), where)
        for i, und in enumerate(self.und):
            each = partial(_each, (und, und if places is None else self.gen[i]), places)
            x = self._layer(i, each, x, turn, side, keep, causal)
        return x

    def _layer(
        self,
        index: int,
        each: Each,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        side: Side,
        keep: bool,
        causal: bool,
    ) -> Tensor:
        width = self.config.head_dim
        normed = each("input_layernorm", x)
        q = each("q_proj", normed).unflatten(-1, (-1, width))
        k = each("k_proj", normed).unflatten(-1, (-1, width))
        v = each("v_proj", normed).unflatten(-1, (-1, width))
        q = rotated(each("q_norm", q), *turn)[None]
        k = rotated(each("k_norm", k), *turn)
        keys, values = self._merged(side.cache[index], k, v)
        if keep:
            side.cache[index] = (keys, values)
        groups = self.config.num_heads // self.config.num_kv_heads
        keys, values = (t.repeat_interleave(groups, dim=1)[None] for t in (keys, values))
        attended = self.model.attention(q, keys, values, causal)[0].flatten(1)
        x = x + each("o_proj", attended)
        return x + each("mlp", each("post_attention_layernorm", x))

    @staticmethod
    def _merged(cached: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Cache and new tokens in new, zero-filled tensors, written by index."""
        if cached is None:
            return k, v
        before = len(cached[0])
        old = torch.arange(before, device=k.device)
        new = torch.arange(before, before + len(k), device=k.device)
        merged = []
        for past, now in zip(cached, (k, v), strict=True):
            both = now.new_zeros(before + len(now), *now.shape[1:])
            both[old] = past
            both[new] = now
            merged.append(both)
        return merged[0], merged[1]

    @staticmethod
    def _others(where: Tensor, length: int) -> Tensor:
        """Places the generation expert does not have: a visual block's markers, at both ends."""
        return torch.tensor([0, length - 1], device=where.device)
