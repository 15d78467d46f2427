"""Tokens and latents in, velocity and logits out: the two experts with their embeddings, and the passes over
them.

`Understanding` alone answers questions; with `Generation` beside it, `DualExpert` makes pictures. Modules
here hold weights in the checkpoint's names (less the `_moe_gen` that tells the experts apart) and never move
between devices.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LATENT_CHANNELS, MAX_LATENT_SIDE, TIME_FREQUENCIES, Grid, LLMConfig
from ..errors import RequestError
from . import rope
from .attention import Attention, attention
from .decoder import expert_layers, run_layers
from .kv_cache import Attend, AttendTargets, Context, Region
from .ops import TorchOps
from .sequence import MARKERS, Branch, Kind, Placed, Sequence, TextSegment, merge_text
from .side_stream import SideStream


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


@dataclass(frozen=True, eq=False)
class Plan:
    """A planned request: which segments run against which cached prefix, and where. Nothing is computed yet.

    prefix: segments both branches share; rests: each branch's own; targets: positions of each branch's target
    block, empty for understanding.
    """

    sequence: Sequence
    prefix: list[Placed]
    rests: dict[Branch, list[Placed]]
    targets: dict[Branch, Tensor]

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
        branches = [(sequence, rope.positions(sequence, tokens_per_second))]
        if guided and negative:
            other = sequence.with_caption(negative)
            branches.append((other, rope.positions(other, tokens_per_second)))
        elif guided:
            branches.append(
                (sequence.without_caption(), rope.unconditional_positions(sequence, tokens_per_second))
            )
        named = dict(zip(Branch, branches, strict=False))
        placed = {
            b: [Placed(*pair) for pair in zip(s.context, p, strict=False)] for b, (s, p) in named.items()
        }
        targets = {b: p[-1] for b, (_, p) in named.items()} if sequence.target else {}
        rests = {b: segments[split:] for b, segments in placed.items()}
        return cls(sequence, placed[Branch.CONDITIONAL][:split], rests, targets)

    @property
    def lengths(self) -> tuple[int, tuple[int, ...]]:
        """Tokens of the prefix and of each branch's rest, in `Branch`'s order."""
        prefix, *rests = (sum(s.length for s, _ in part) for part in (self.prefix, *self.rests.values()))
        return prefix, tuple(rests)

    @property
    def grid(self) -> Grid:
        """Latent cells (t, h, w) of the target.

        Raises:
            ValueError: an understanding plan, which has none.
        """
        if self.sequence.target is None:
            raise ValueError("the plan of an understanding sequence has no target to denoise")
        return self.sequence.target.grid


@dataclass(eq=False)
class Prepared:
    """A planned request with its context computed, the prefix and the branches in `ready`.

    rope: per branch cos and sin of the target [1, tokens, width].
    markers: embeddings of the target's two marker tokens [1, 2, hidden].
    table: latent position table [tokens, hidden].
    """

    plan: Plan
    context: Context
    rope: dict[Branch, tuple[Tensor, Tensor]]
    markers: Tensor
    table: Tensor
    ready: set[Branch] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Row:
    """What one row of a velocity call runs against: a branch of a prepared request."""

    prepared: Prepared
    branch: Branch


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
        side: SideStream | None = None,
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
        self, context: Context, region: Region, placed: Iterable[Placed], markers: Tensor
    ) -> Tensor | None:
        """Run segments into a region of the context. Returns the hidden state [1, n, hidden] that the
        understanding expert leaves after the last one, for `logits`; None without segments.
        """
        hidden = None
        for segment, position in merge_text(placed):
            gen = None
            if isinstance(segment, TextSegment):
                und = self.embed(segment.ids)
            elif segment.kind is Kind.VIT:
                und = torch.cat([markers, segment.data.to(self.device, self.dtype)[None]], dim=1)
            else:
                latent = segment.data.to(self.device)[None]
                clean = torch.zeros(1, segment.grid[0], device=self.device)
                table = self._position_table(segment.grid)
                und, gen = markers, self.generation.embed_latents(latent, clean, table, self.dtype)
            causal = segment.kind is Kind.TEXT
            with context.extend(region, position.shape[1], causal, self.attention) as attend:
                hidden, _ = self._run(und, gen, position, attend)
        return hidden

    def _position_table(self, grid: Grid) -> Tensor:
        return latent_positions(grid, self.config.hidden_size).to(self.device, self.dtype)

    @property
    def generation(self) -> Generation:
        """The generation expert.

        Raises:
            RequestError: only the understanding expert is loaded.
        """
        if self.gen is None:
            raise RequestError(
                "this request has latents in it, and only the understanding expert is loaded: load both experts"
            )
        return self.gen

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

    def prefill(self, plan: Plan, *branches: Branch) -> Prepared:
        """Compute a generation request's context: the shared prefix, then the branches named (all of the
        plan's without any). `prefill_branch` adds the others later.

        Raises:
            ValueError: the plan has no target.
        """
        (prefix, rests), grid = plan.lengths, plan.grid
        context = self.new_context(prefix, rests, grid[0] * grid[1] * grid[2] + MARKERS)
        markers = self.markers(plan.sequence)
        self.extend(context, context.prefix, plan.prefix, markers)
        tables = {b: rope.tables(p, self.config, self.device) for b, p in plan.targets.items()}
        turned = {b: (cos[None], sin[None]) for b, (cos, sin) in tables.items()}
        prepared = Prepared(plan, context, turned, markers, self._position_table(grid))
        for branch in branches or plan.rests:
            self.prefill_branch(prepared, branch)
        return prepared

    def prefill_branch(self, prepared: Prepared, branch: Branch) -> None:
        """Compute what one branch has after the prefix, unless that is done."""
        if branch not in prepared.ready:
            region, rest = prepared.context.rests[branch], prepared.plan.rests[branch]
            self.extend(prepared.context, region, rest, prepared.markers)
            prepared.ready.add(branch)

    # -- denoising -------------------------------------------------------------------------------------------

    def velocity(self, rows: SequenceOf[Row], x: Tensor, t: Tensor) -> Tensor:
        """Velocity (noise - data) of noisy latents.

        Args:
            rows: what each row runs against; rows may belong to different prompts of one target size.
            x: [rows, frames, h, w, 48]; t: [rows, frames] in 0..1, per latent frame (0 keeps a frame clean).

        Returns: float32, shaped like x.
        """
        first = rows[0].prepared
        expert = self.generation
        gen = expert.embed_latents(x, t, first.table, self.dtype)
        und = first.markers.expand(len(rows), -1, -1)
        ropes = [r.prepared.rope[r.branch] for r in rows]
        cos, sin = (torch.cat(part) for part in zip(*ropes, strict=True))
        attend = AttendTargets([(r.prepared.context, r.branch) for r in rows], self.attention)
        _, gen = run_layers(self.und.layers, expert.layers, und, gen, cos, sin, attend, self.side)
        return expert.llm2vae(expert.norm(gen)).float().unflatten(1, x.shape[1:4])

    # -- text ------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [vocabulary] of the last token of hidden [1, n, hidden]."""
        return self.und.lm_head(self.und.norm(hidden[:, -1:]))[0, 0].float()

    def read(self, sequence: Sequence, tokens_per_second: float, room: int) -> tuple[Context, Tensor, int]:
        """Run an understanding prompt. Returns its context with `room` free tokens, the next token's logits,
        and its position.
        """
        plan = Plan.of(sequence, tokens_per_second, guided=False)
        placed = plan.prefix + plan.rests[Branch.CONDITIONAL]
        context = self.new_context(sum(s.length for s, _ in placed) + room)
        hidden = self.extend(context, context.prefix, placed, self.markers(sequence))
        if hidden is None:
            raise ValueError("an understanding prompt without tokens")
        return context, self.logits(hidden), int(max(p.max() for _, p in placed)) + 1
