"""Tokens and latents in, velocity and logits out: the two experts with their embeddings, and the passes over
them.

`Understanding` alone answers questions; with `Generation` beside it, `DualExpert` makes pictures. Modules
here hold weights in the checkpoint's names (less the `_moe_gen` that tells the experts apart) and never move
between devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config import LATENT_CHANNELS, MAX_LATENT_SIDE, TIME_FREQUENCIES, LLMConfig
from ..errors import RequestError
from . import rope
from .attention import Attention, attention
from .decoder import ExpertLayer, run_layers
from .kv_cache import Attend, Context
from .ops import TorchOps
from .sequence import Kind, Segment, Sequence, merge_text
from .side_stream import Side


class Understanding(nn.Module):
    """The understanding expert: text embeddings, its half of every layer, and the head that writes text."""

    def __init__(self, config: LLMConfig, ops=TorchOps, device=None, dtype=None) -> None:
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        self.embed_tokens = ops.Embedding(config.vocab_size, config.hidden_size, **kw)
        self.layers = nn.ModuleList(ExpertLayer(config, ops, **kw) for _ in range(config.num_layers))
        self.norm = ops.RMSNorm(config.hidden_size, eps=config.rms_eps, **kw)
        self.lm_head = ops.Linear(config.hidden_size, config.vocab_size, bias=False, **kw)


class TimeEmbedder(nn.Module):
    """Timestep in 0..1 -> hidden, by sinusoids and a two-layer MLP."""

    def __init__(self, hidden: int, ops=TorchOps, device=None, dtype=None) -> None:
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        self.mlp = nn.Sequential(
            ops.Linear(TIME_FREQUENCIES, hidden, **kw), nn.SiLU(), ops.Linear(hidden, hidden, **kw)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t: float32 of any shape -> [..., hidden]."""
        return self.mlp(time_sinusoids(t).to(dtype))


class Generation(nn.Module):
    """The generation expert: latents in, its half of every layer, velocity out."""

    def __init__(self, config: LLMConfig, ops=TorchOps, device=None, dtype=None) -> None:
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        hidden = config.hidden_size
        self.layers = nn.ModuleList(ExpertLayer(config, ops, **kw) for _ in range(config.num_layers))
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


def latent_positions(grid: tuple[int, int, int], hidden: int) -> Tensor:
    """Fixed sine/cosine table of the cells' coordinates, float32 [t*h*w, hidden].

    Time and height each take a third of the width, rounded down to even; width takes the rest. Per axis
    sines, then cosines; frequencies in float64 (MAE's `get_1d_sincos_pos_embed`). The weights were trained
    with a table of 64 cells a side read by flat index, so a row of more than 64 cells (21:9 at 768) goes on
    in the next row's entries: kept as trained.
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


@dataclass(eq=False)
class Plan:
    """Which segments run against which cached prefix, with their positions: the two branches of a guided
    request.

    prefix: segments both branches share; rests: each branch's own; targets: positions of each branch's target
    block.
    """

    prefix: list[tuple[Segment, Tensor]]
    rests: list[list[tuple[Segment, Tensor]]]
    targets: list[Tensor]

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        tokens_per_second: float,
        guided: bool,
        negative: SequenceOf[int] | None = None,
    ) -> Plan:
        """Conditional and, if guided, unconditional branch of `sequence`; `negative` ids take the caption's
        place.
        """
        split = sequence.caption
        layouts = [(sequence, rope.positions(sequence, tokens_per_second))]
        if guided and negative:
            other = sequence.with_caption(negative)
            layouts.append((other, rope.positions(other, tokens_per_second)))
        elif guided:
            layouts.append(
                (sequence.without_caption(), rope.unconditional_positions(sequence, tokens_per_second))
            )
        pairs = [list(zip(s.context, p, strict=False)) for s, p in layouts]
        targets = [p[-1] for _, p in layouts] if sequence.target else []
        return cls(pairs[0][:split], [p[split:] for p in pairs], targets)

    @property
    def lengths(self) -> tuple[int, tuple[int, ...]]:
        """Tokens of the prefix and of each rest."""
        count = [sum(s.length for s, _ in part) for part in (self.prefix, *self.rests)]
        return count[0], tuple(count[1:])


@dataclass(eq=False)
class Prepared:
    """A generation request on its way to denoising. Cheap until `DualExpert.fill` computes its context.

    rope: per branch (conditional, then unconditional if wanted) cos and sin [1, tokens, width].
    markers: embeddings of the target's two marker tokens [1, 2, hidden].
    table: latent position table [tokens, hidden].
    """

    sequence: Sequence
    plan: Plan
    context: Context | None = None
    rope: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    markers: Tensor | None = None
    table: Tensor | None = None
    ready: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Branch:
    """One side of a prepared prompt, 0 conditional or 1 unconditional: what one row of a velocity call runs
    against.
    """

    prepared: Prepared
    index: int


class DualExpert:
    """Both experts and the passes over them. `gen` may be None for understanding only; `side`: see
    `run_layers`.
    """

    def __init__(
        self,
        config: LLMConfig,
        und: Understanding,
        gen: Generation | None,
        *,
        attention: Attention = attention,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        side: Side | None = None,
    ) -> None:
        self.config, self.und, self.gen, self.side = config, und, gen, side
        self.attention, self.dtype, self.device = attention, dtype, torch.device(device)

    # -- context ---------------------------------------------------------------------------------------------

    def embed(self, ids: SequenceOf[int]) -> Tensor:
        """Embeddings of text tokens, [1, n, hidden]."""
        return self.und.embed_tokens(torch.tensor([list(ids)], device=self.device)).to(self.dtype)

    def _run(
        self, und: Tensor, gen: Tensor | None, position: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor | None]:
        cos, sin = rope.tables(position, self.config, self.device)
        layers = None if self.gen is None else self.gen.layers
        return run_layers(self.und.layers, layers, und, gen, cos[None], sin[None], attend, self.side)

    def extend(
        self, context: Context, branch: int | None, parts: list[tuple[Segment, Tensor]], markers: Tensor
    ) -> Tensor | None:
        """Run segments into the context. Returns the last text pass's hidden state [1, n, hidden], for
        `logits`.
        """
        positions = {id(s): p for s, p in parts}
        hidden = None
        for group in merge_text(s for s, _ in parts):
            position = torch.cat([positions[id(s)] for s in group], dim=1)
            first, gen = group[0], None
            if first.kind is Kind.TEXT:
                und = self.embed([i for s in group for i in s.ids])
            elif first.kind is Kind.SEEN:
                und = torch.cat([markers, first.data.to(self.device, self.dtype)[None]], dim=1)
            else:
                if self.gen is None:
                    raise RequestError(
                        "this request has latents in it, and only the understanding expert is loaded: load "
                        "both experts"
                    )
                latent = first.data.to(self.device)[None]
                table = latent_positions(first.grid, self.config.hidden_size).to(self.device, self.dtype)
                clean = torch.zeros(1, first.grid[0], device=self.device)
                und, gen = markers, self.gen.embed_latents(latent, clean, table, self.dtype)
            with context.extend(branch, position.shape[1], first.kind is Kind.TEXT, self.attention) as attend:
                hidden, _ = self._run(und, gen, position, attend)
        return hidden

    def markers(self, sequence: Sequence) -> Tensor:
        """Embeddings of the two marker tokens, [1, 2, hidden]."""
        return self.embed([sequence.start, sequence.end])

    def new_context(self, prefix: int, rests: tuple[int, ...] = (0,), target: int = 0) -> Context:
        """An empty context on this model's device."""
        c = self.config
        return Context(
            c.num_layers,
            c.num_kv_heads,
            c.head_dim,
            prefix=prefix,
            rests=rests,
            target=target,
            device=self.device,
            dtype=self.dtype,
        )

    def prefill(self, sequence: Sequence, plan: Plan) -> Prepared:
        """A generation request with all its branches' contexts computed."""
        return self.fill(Prepared(sequence, plan))

    def fill(self, prepared: Prepared, *branches: int) -> Prepared:
        """Compute the context of a request's branches (all without naming any): the shared prefix once, then
        each one's rest.
        """
        plan, sequence = prepared.plan, prepared.sequence
        if prepared.context is None:
            prefix, rests = plan.lengths
            context, markers = self.new_context(prefix, rests, sequence.target.length), self.markers(sequence)
            self.extend(context, None, plan.prefix, markers)
            prepared.rope = [
                tuple(t[None] for t in rope.tables(p, self.config, self.device)) for p in plan.targets
            ]
            prepared.table = latent_positions(sequence.target.grid, self.config.hidden_size).to(
                self.device, self.dtype
            )
            prepared.context, prepared.markers = context, markers
        for index in branches or range(len(plan.rests)):
            if index not in prepared.ready:
                self.extend(prepared.context, index, plan.rests[index], prepared.markers)
                prepared.ready.add(index)
        return prepared

    # -- denoising -------------------------------------------------------------------------------------------

    def velocity(self, rows: SequenceOf[Branch], x: Tensor, t: Tensor) -> Tensor:
        """Velocity (noise - data) of noisy latents.

        Args:
            rows: what each row runs against; rows may belong to different prompts of one target size.
            x: [rows, frames, h, w, 48]; t: [rows, frames] in 0..1, per latent frame (0 keeps a frame clean).

        Returns: float32, shaped like x.
        """
        first = rows[0].prepared
        gen = self.gen.embed_latents(x, t, first.table, self.dtype)
        und = first.markers.expand(len(rows), -1, -1)
        ropes = [r.prepared.rope[r.index] for r in rows]
        cos, sin = (torch.cat(part) for part in zip(*ropes, strict=True))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            for i, row in enumerate(rows):
                one = slice(i, i + 1)
                out[one] = row.prepared.context.attend_target(
                    layer, row.index, q[one], k[one], v[one], self.attention
                )
            return out

        _, gen = run_layers(self.und.layers, self.gen.layers, und, gen, cos, sin, attend, self.side)
        return self.gen.llm2vae(self.gen.norm(gen)).float().unflatten(1, x.shape[1:4])

    # -- text ------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [vocabulary] of the last token of hidden [1, n, hidden]."""
        return self.und.lm_head(self.und.norm(hidden[:, -1:]))[0, 0].float()

    def read(self, sequence: Sequence, tokens_per_second: float, room: int) -> tuple[Context, Tensor, int]:
        """Run an understanding prompt. Returns its context with `room` free tokens, the next token's logits,
        and its position.
        """
        plan = Plan.of(sequence, tokens_per_second, guided=False)
        parts = plan.prefix + plan.rests[0]
        context = self.new_context(sum(s.length for s, _ in parts) + room)
        hidden = self.extend(context, None, parts, self.markers(sequence))
        return context, self.logits(hidden), int(max(p.max() for _, p in parts)) + 1
