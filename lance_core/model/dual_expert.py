"""Tokens and latents in, velocity and logits out: the passes over the two experts.

`Understanding` alone answers questions; with `Generation` beside it, `DualExpert` makes pictures. It never
moves weights between devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from ..config import Grid, LLMConfig
from ..errors import RequestError
from . import rope
from .attention import Attention, attention
from .decoder import run_layers
from .experts import Generation, Understanding, latent_positions
from .kv_cache import Attend, AttendTargets, Context, Region
from .layer_hooks import LayerHooks
from .plan import Plan, Prepared, Row
from .sequence import MARKERS, Branch, Kind, Placed, Sequence, TextSegment, merge_text
from .side_stream import SideStream

__all__ = ["DualExpert", "Generation", "Plan", "Prepared", "Row", "Understanding", "latent_positions"]


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
                "this request has latents in it, and only the understanding expert is loaded: load both "
                "experts"
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

    def velocity(
        self,
        rows: SequenceOf[Row],
        x: Tensor,
        t: Tensor,
        attention: Attention | None = None,
        hooks: LayerHooks | None = None,
    ) -> Tensor:
        """Velocity (noise - data) of noisy latents.

        Args:
            rows: what each row runs against; rows may belong to different prompts of one target size.
            x: [rows, frames, h, w, 48]; t: [rows, frames] in 0..1, per latent frame (0 keeps a frame clean).
            attention: for this call, instead of the model's. hooks: around the layers.

        Returns: float32, shaped like x.
        """
        first = rows[0].prepared
        expert = self.generation
        gen = expert.embed_latents(x, t, first.table, self.dtype)
        und = first.markers.expand(len(rows), -1, -1)
        ropes = [r.prepared.rope[r.branch] for r in rows]
        cos, sin = (torch.cat(part) for part in zip(*ropes, strict=True))
        attend = AttendTargets([(r.prepared.context, r.branch) for r in rows], attention or self.attention)
        _, gen = run_layers(self.und.layers, expert.layers, und, gen, cos, sin, attend, self.side, hooks)
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
