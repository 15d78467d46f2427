"""A second opinion on the decoder, written from the model's description alone: slow, plain, and sharing no
code with lance_core.

No cache, no two streams: every call runs the whole sequence in reading order in one pass, under one boolean
attention mask, each token's expert picked by boolean index. Weights are the checkpoint's own dictionary,
arithmetic is float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """kind: text, vit, clean or target; role: caption, source, subject or anything else."""

    kind: str
    role: str = ""
    ids: tuple[int, ...] = ()
    grid: tuple[int, int, int] | None = None
    data: Tensor | None = None  # seen: embeddings [n, hidden]; clean and target: latents [t, h, w, 48]


def positions(blocks: list[Block], per_second: float, offsets: bool = True) -> list[Tensor]:
    """Of every block, int64 [n, 3] in reading order."""
    out, p = [], 0
    for b in blocks:
        if b.kind == "text":
            out.append(torch.tensor([[p + i] * 3 for i in range(len(b.ids))]).reshape(-1, 3))
            p += len(b.ids)
            continue
        nt, nh, nw = b.grid
        cells = [
            [int(t * per_second) + p + 1, y + p + 1, x + p + 1]
            for t in range(nt)
            for y in range(nh)
            for x in range(nw)
        ]
        last = max(max(cell) for cell in cells) + 1
        out.append(torch.tensor([[p] * 3, *cells, [last] * 3]))
        p = last + 1
    if not offsets:
        return out
    for start, chosen in (
        (1000, [i for i, b in enumerate(blocks) if b.kind == "vit"]),
        (2000, [i for i, b in enumerate(blocks) if b.kind == "clean" and b.role == "subject"]),
    ):
        by = start - int(out[chosen[0]][0, 0]) if chosen else 0
        for i in chosen:
            out[i][:, 0] += by
    target = next(i for i, b in enumerate(blocks) if b.kind == "target")
    for i, b in enumerate(blocks):
        if b.kind == "clean" and b.role == "source" and len(out[i]) == len(out[target]):
            out[target] = out[i]
    return out


def unconditional(blocks: list[Block], per_second: float) -> tuple[list[Block], list[Tensor]]:
    """Without the caption: the context keeps its positions, the target is placed as if the caption had never
    been there.
    """
    kept = [(b, p) for b, p in zip(blocks, positions(blocks, per_second), strict=True) if b.role != "caption"]
    without = [b for b, _ in kept]
    afresh = positions(without, per_second)
    return without, [afresh[i] if b.kind == "target" else p for i, (b, p) in enumerate(kept)]


def time_features(t: Tensor) -> Tensor:
    angles = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)])
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def coordinate_table(grid: tuple[int, int, int], hidden: int) -> Tensor:
    """[t * h * w, hidden]."""
    third = hidden // 3 // 2 * 2
    rows = []
    for t, h, w in torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, 3).tolist():
        index = (
            64 * 64 * t + 64 * h + w
        )  # of the trained table, whose rows have 64 cells: a wider row runs on into the next
        cell = index // 4096, index // 64 % 64, index % 64
        row = []
        for at, width in zip(cell, (third, third, hidden - 2 * third), strict=True):
            angles = torch.tensor(
                [at / 10000 ** (i / (width / 2)) for i in range(width // 2)], dtype=torch.float64
            )
            row += [angles.sin(), angles.cos()]
        rows.append(torch.cat(row).float())
    return torch.stack(rows)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class Model:
    """weights: all of model.safetensors as float32; config: llm_config.json; start, end, pad: ids of the
    visual markers.
    """

    def __init__(self, weights: dict[str, Tensor], config: dict, start: int, end: int, pad: int) -> None:
        self.w, self.config, self.specials = (
            {k: v.float() for k, v in weights.items()},
            config,
            (start, end, pad),
        )

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def embed(self, b: Block, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs [n, hidden] of a block and which of them are the generation expert's. t: [frames] of the
        target.
        """
        table = self.w["language_model.model.embed_tokens.weight"]
        if b.kind == "text":
            return table[torch.tensor(b.ids, dtype=torch.long)], torch.zeros(len(b.ids), dtype=torch.bool)
        n = b.grid[0] * b.grid[1] * b.grid[2]
        x = table[torch.tensor([self.specials[0], *[self.specials[2]] * n, self.specials[1]])].clone()
        gen = torch.zeros(n + 2, dtype=torch.bool)
        if b.kind == "vit":
            x[1:-1] = b.data
        else:
            gen[1:-1] = True
            t = torch.zeros(b.grid[0]) if b.kind == "clean" else t
            time = self.linear(
                F.silu(self.linear(time_features(t), "time_embedder.mlp.0")), "time_embedder.mlp.2"
            )
            x[1:-1] = self.linear(b.data.reshape(n, 48), "vae2llm") + time.repeat_interleave(n // len(t), 0)
            x[1:-1] += coordinate_table(b.grid, x.shape[1])
        return x, gen

    def rope(self, position: Tensor, width: int) -> tuple[Tensor, Tensor]:
        axis = [
            a for a, count in enumerate(self.config["rope_scaling"]["mrope_section"]) for _ in range(count)
        ]
        theta = torch.tensor(self.config["rope_theta"], dtype=torch.float32)
        exact = [1 / theta ** torch.tensor(2 * i / width, dtype=torch.float32) for i in range(len(axis))]
        rounded = torch.stack(exact).to(torch.bfloat16).float()  # as the weights were trained
        angles = torch.stack([position[:, a].float() * rounded[i] for i, a in enumerate(axis)], dim=1)
        angles = torch.cat([angles, angles], dim=1).float()
        return angles.cos()[:, None], angles.sin()[:, None]

    def run(self, blocks: list[Block], position: list[Tensor], t: Tensor | None = None) -> list[Tensor]:
        """Hidden states before the last norm, per block [n, hidden]."""
        inputs = [self.embed(b, t) for b in blocks]
        x, gen = torch.cat([i[0] for i in inputs]), torch.cat([i[1] for i in inputs])
        sizes = [len(i[0]) for i in inputs]
        owner = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(sizes))
        causal = torch.tensor([b.kind == "text" for b in blocks])[owner]
        order = torch.arange(len(x))
        same = owner[:, None] == owner[None]
        mask = (owner[None] < owner[:, None]) | (same & (~causal[:, None] | (order[None] <= order[:, None])))
        eps, groups = (
            self.config["rms_norm_eps"],
            self.config["num_attention_heads"] // self.config["num_key_value_heads"],
        )
        width = len(self.w["language_model.model.layers.0.self_attn.q_norm.weight"])
        cos, sin = self.rope(torch.cat(position), width)

        def experts(function) -> Tensor:
            """function(rows, suffix) for each expert's tokens, scattered back to their places."""
            und, own = function(~gen, ""), function(gen, "_moe_gen")
            out = und.new_zeros(len(gen), *und.shape[1:])
            out[~gen], out[gen] = und, own
            return out

        def turn(h: Tensor) -> Tensor:
            return h * cos + torch.cat([-h[..., width // 2 :], h[..., : width // 2]], dim=-1) * sin

        for n in range(self.config["num_hidden_layers"]):
            at = f"language_model.model.layers.{n}."
            y = experts(
                lambda rows, s, at=at, x=x: rms(x[rows], self.w[f"{at}input_layernorm{s}.weight"], eps)
            )

            def heads(which: str, norm: bool, at=at, y=y) -> Tensor:
                def one(rows: Tensor, s: str) -> Tensor:
                    h = self.linear(y[rows], f"{at}self_attn.{which}_proj{s}").unflatten(1, (-1, width))
                    return rms(h, self.w[f"{at}self_attn.{which}_norm{s}.weight"], eps) if norm else h

                return experts(one)

            q, k, v = turn(heads("q", True)), turn(heads("k", True)), heads("v", False)
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
            mixed = torch.einsum(
                "hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v
            ).flatten(1)
            x = x + experts(lambda rows, s, at=at, m=mixed: self.linear(m[rows], f"{at}self_attn.o_proj{s}"))

            def feed(rows: Tensor, s: str, at=at, x=x) -> Tensor:
                h, mlp = rms(x[rows], self.w[f"{at}post_attention_layernorm{s}.weight"], eps), f"{at}mlp{s}"
                return self.linear(
                    F.silu(self.linear(h, f"{mlp}.gate_proj")) * self.linear(h, f"{mlp}.up_proj"),
                    f"{mlp}.down_proj",
                )

            x = x + experts(feed)
        return list(x.split(sizes))

    def velocity(self, blocks: list[Block], position: list[Tensor], x: Tensor, t: Tensor) -> Tensor:
        """Of the target with latents x [t, h, w, 48] at times t [t]."""
        at = next(i for i, b in enumerate(blocks) if b.kind == "target")
        blocks = [replace(b, data=x) if i == at else b for i, b in enumerate(blocks)]
        hidden = self.run(blocks, position, t)[at][1:-1]
        normed = rms(hidden, self.w["language_model.model.norm_moe_gen.weight"], self.config["rms_norm_eps"])
        return self.linear(normed, "llm2vae").reshape(x.shape)

    def logits(self, blocks: list[Block], position: list[Tensor]) -> Tensor:
        """Of the token after each one of the last block, [n, rows]."""
        normed = rms(
            self.run(blocks, position)[-1],
            self.w["language_model.model.norm.weight"],
            self.config["rms_norm_eps"],
        )
        return self.linear(normed, "language_model.lm_head")

    def sample(
        self, cond, uncond, x: Tensor, *, steps, shift, cfg, interval, renorm, renorm_min, first_frame=None
    ) -> Tensor:
        """Noise x [t, h, w, 48] to a latent by Euler with guidance; cond, uncond: (blocks, positions)."""
        x, fixed = x.clone(), 0
        if first_frame is not None:
            x[:1], fixed = first_frame, 1
        even = torch.linspace(1, 0, steps + 1)
        times = shift * even / (1 + (shift - 1) * even)
        low, high = torch.tensor(interval, dtype=torch.float32)
        for now, after in pairwise(times):
            t = torch.full((x.shape[0],), float(now))
            t[:fixed] = 0
            v = c = self.velocity(*cond, x, t)
            if cfg != 1 and low < now <= high:
                u = self.velocity(*uncond, x, t)
                v = u + cfg * (c - u)
                if renorm == "global":
                    v = v * (c.norm() / (v.norm() + 1e-8)).clamp(renorm_min, 1)
                elif renorm == "channel":
                    v = v * (c.norm(dim=-1, keepdim=True) / (v.norm(dim=-1, keepdim=True) + 1e-8)).clamp(
                        renorm_min, 1
                    )
            x[fixed:] -= v[fixed:] * (now - after)
        return x
