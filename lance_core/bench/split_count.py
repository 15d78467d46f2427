"""What several GPUs would gain on one video (`bench count --split`): each process's share counted on the meta
device, bytes that cross counted where they are gathered, times predicted from a card's rates.

Predicted, not measured: a step takes what its slowest process computes and then what it receives, nothing of
it at the same time; the decoder of the VAE runs in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Progress
from ..config import LATENT_CHANNELS, RELEASED_SAMPLING
from ..model.dual_expert import Prepared
from ..model.plan import Plan, Row
from ..model.sampler import Guidance, schedule
from ..model.sequence import Branch
from ..scale.split import SplitExpert
from .case import RELEASED
from .count import Passes, case, counted
from .counting import CARDS, LAUNCH, Count
from .report import Block, Table, gigabytes, seconds_text

VIDEO = "121"


@dataclass(frozen=True)
class Link:
    """What joins a card to its neighbours: bytes a second that one receives, and seconds a gathering takes at
    least.
    """

    name: str
    bandwidth: float
    latency: float


# NVLink 4: 450 GB/s each way on the data sheet, times 0.8. RTX 4090: no peer-to-peer, so PCIe 4.0 x16 by way
# of the host's memory. Assumed, not measured here.
LINKS = {"h200": Link("NVLink", 0.8 * 450e9, 20e-6), "4090": Link("PCIe 4.0", 12e9, 50e-6)}
PLANS = [
    ("h200", "guidance", 2),
    *(("h200", mode, count) for count in (2, 4, 8) for mode in ("sequence", "both")),
    *(("4090", mode, 2) for mode in ("guidance", "sequence")),
]


@dataclass
class Crossing:
    """What one process receives in a step: bytes, and in how many gatherings."""

    bytes: int = 0
    times: int = 0

    def seconds(self, link: Link) -> float:
        """How long that takes."""
        return self.bytes / link.bandwidth + self.times * link.latency


@dataclass
class Shared:
    """One process's share of a step."""

    count: Count
    crossing: Crossing = field(default_factory=Crossing)

    def seconds(self, card: str) -> float:
        """Of its kernels and then of what it receives."""
        own = max(self.count.seconds[card], self.count.kernels * LAUNCH)
        return own + self.crossing.seconds(LINKS[card])


class CountedExpert(SplitExpert):
    """The last process of a group, which has the largest share; a group is the number of its processes."""

    crossing: Crossing

    def share(self, count: int, group: Any) -> tuple[slice, list[int]]:
        """As `groups.share`."""
        ends = [count * i // (group or 1) for i in range((group or 1) + 1)]
        return slice(ends[-2], ends[-1]), [b - a for a, b in pairwise(ends)]

    def gather(self, part: Tensor, lengths: list[int], group: Any, dim: int) -> Tensor:
        """As `groups.gather`, told to `crossing`."""
        if (group or 1) == 1:
            return part
        shape = [*part.shape[:dim], sum(lengths), *part.shape[dim + 1 :]]
        whole = torch.empty(shape, dtype=part.dtype, device=part.device)
        self.crossing.bytes += whole.nbytes - part.nbytes
        self.crossing.times += 1
        return whole


class Shares:
    """Shares of the steps of one video."""

    def __init__(self, passes: Passes, size: str = VIDEO) -> None:
        self.case = case(size, passes.config)
        plain = passes.model("und", "gen")
        self.expert = CountedExpert.__new__(CountedExpert)
        self.expert.__dict__.update(plain.__dict__)
        rate = passes.config.tokens_per_second
        with torch.inference_mode():
            plan = Plan.of(self.case.sequence(passes.config), rate, guided=True)
            self.prepared: Prepared = plain.prefill(plan)
        self._known: dict[tuple[int, int], Shared] = {}

    def step(self, rows: int, processes: int) -> Shared:
        """A share of a forward of one or both branches, the tokens divided over so many processes."""
        if (rows, processes) not in self._known:
            x = torch.empty(rows, *self.case.grid, LATENT_CHANNELS, device="meta")
            t = torch.empty(rows, self.case.grid[0], device="meta")
            own = [Row(self.prepared, branch) for branch in list(Branch)[:rows]]
            self.expert.crossing = Crossing()
            count = counted(lambda: self.expert.divided(own, x, t, processes))
            self._known[rows, processes] = Shared(count, self.expert.crossing)
        return self._known[rows, processes]

    def split(self, mode: str, processes: int) -> tuple[Shared, Shared]:
        """A guided and an unguided step of a process, as `SplitExpert.velocity` divides them."""
        if mode == "sequence" or processes == 1:
            return self.step(2, processes), self.step(1, processes)
        half = processes // 2
        one = self.step(1, half)
        t, h, w = self.case.grid
        velocity = t * h * w * LATENT_CHANNELS * 4
        exchanged = Crossing(one.crossing.bytes + velocity, one.crossing.times + 1)
        return Shared(one.count, exchanged), self.step(1, 1 if mode == "guidance" else processes)


def steps_of(times: Tensor, guidance: Guidance) -> tuple[int, int]:
    """(guided, unguided) steps of a schedule."""
    guided = sum(guidance.applies(t) for t in times[:-1])
    return guided, len(times) - 1 - guided


def predict(passes: Passes, plans: Sequence[tuple[str, str, int]] = PLANS) -> list[dict[str, Any]]:
    """A row a plan: card, split, processes, seconds of a guided step and of the video, gain over one."""
    shares = Shares(passes)
    guided, unguided = steps_of(schedule(RELEASED_SAMPLING.steps), Guidance())
    decoding = passes.run(f"vae_decode_{VIDEO}")
    rows = []
    for card, mode, processes in plans:
        fixed = max(decoding.seconds[card], decoding.kernels * LAUNCH)

        def video(parts: tuple[Shared, Shared], card: str = card, fixed: float = fixed) -> float:
            return guided * parts[0].seconds(card) + unguided * parts[1].seconds(card) + fixed

        alone, parts = shares.split("sequence", 1), shares.split(mode, processes)
        told = {"card": CARDS[card].name, "link": LINKS[card].name, "split": mode, "processes": processes}
        told |= {"received": parts[0].crossing.bytes, "crossing": parts[0].crossing.seconds(LINKS[card])}
        told |= {"step": parts[0].seconds(card), "video": video(parts), "gain": video(alone) / video(parts)}
        rows.append(told)
    return rows


def run(args: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    """Predict all of PLANS."""
    config = RELEASED
    if args.layers:
        config = replace(config, llm=replace(config.llm, num_layers=args.layers))
    return {"bench": "split_count", "layers": config.llm.num_layers, "rows": predict(Passes(config))}


def document(result: dict[str, Any]) -> list[Block]:
    """What is predicted, as a table."""
    rows = result["rows"]
    head = ("GPUs", "split", "GB received a guided step", "in", "guided step", "video", "gain")
    cells = [
        [
            f"{row['processes']} x {row['card']}, {row['link']}",
            row["split"],
            gigabytes(row["received"], 2),
            seconds_text(row["crossing"]),
            seconds_text(row["step"]),
            seconds_text(row["video"]),
            f"{row['gain']:.2f}x",
        ]
        for row in rows
    ]
    text = "One video of 848x480, 121 frames, 30 steps, over several GPUs: predicted from what each process "
    text += "computes and receives, nothing at the same time; its decoding in one process."
    return [text, Table(head, cells)]
