"""What a GPU would do in each pass at the released sizes: kernels, operations, bytes, waits. Counted, not
measured: the passes run on torch's meta device (counting.py), so any machine will do.

The times told with `--card` are predicted: a kernel takes what its operations or its bytes need at a card's
rates, whichever is longer; and all of them together at least what launching them takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Progress
from ..config import LATENT_CHANNELS, LanceConfig
from ..errors import RequestError
from ..model import kernels
from ..model.dual_expert import DualExpert
from ..model.plan import Plan, Row
from ..model.sequence import Branch
from ..model.token_loop import TokenLoop
from ..text_generation import Chooser
from .case import RELEASED, Case, case_of
from .counting import CARDS, LAUNCH, Count, Counter
from .device import watched
from .memory import build
from .options import PASSES
from .report import Block, Notes, Table, gigabytes, seconds_text

COMPUTE = torch.bfloat16
ANSWER = 64  # room for tokens behind a question

SIZES = {"768": ("768x768", 1), "25": ("848x480", 25), "121": ("848x480", 121)}


def case(name: str, config: LanceConfig, *, edit: bool = False) -> Case:
    """The case whose size a pass is named for."""
    size, frames = SIZES[name]
    return case_of(config, size, frames, edit=edit)


def counted(work: Callable[[], Any]) -> Count:
    """What runs in `work`."""
    counter = Counter()
    with torch.inference_mode(), kernels.counted_on_meta(counter.fused), counter:
        work()
    return counter.count


class Passes:
    """The passes by name, on weights of the meta device."""

    def __init__(self, config: LanceConfig = RELEASED) -> None:
        self.config = config
        self._modules: dict[str, nn.Module] = {}

    def _module(self, part: str) -> Any:
        if part not in self._modules:
            self._modules[part] = build(part, self.config, "bf16", "meta")
        return self._modules[part]

    def model(self, *parts: str) -> DualExpert:
        """The decoder with these experts."""
        gen = self._module("gen") if "gen" in parts else None
        return DualExpert(self.config.llm, self._module("und"), gen, dtype=COMPUTE, device="meta")

    def step(self, size: str, guided: bool) -> Count:
        """A denoising step, its context ready: both branches in one forward, or the conditional one."""
        model, what = self.model("und", "gen"), case(size, self.config)
        plan = Plan.of(what.sequence(self.config), self.config.tokens_per_second, guided=True)
        with torch.inference_mode():
            prepared = model.prefill(plan)
        branches = list(Branch) if guided else [Branch.CONDITIONAL]
        x = torch.empty(len(branches), *what.grid, LATENT_CHANNELS, device="meta")
        t = torch.empty(len(branches), what.grid[0], device="meta")
        return counted(lambda: model.velocity([Row(prepared, branch) for branch in branches], x, t))

    def prefill(self, size: str, edit: bool) -> Count:
        """Both branches' contexts of a prompt, or of an edit of a picture."""
        model, what = self.model("und", "gen"), case(size, self.config, edit=edit)
        plan = Plan.of(what.sequence(self.config), self.config.tokens_per_second, guided=True)
        return counted(lambda: model.prefill(plan))

    def token(self) -> Count:
        """One greedy token of an answer about a 768x768 picture, choosing it included."""
        model, choose = self.model("und"), Chooser(0, 1, 0)
        sequence = case("768", self.config).question(self.config)

        def some(tokens: int) -> Count:
            with torch.inference_mode():
                context, logits, at = model.read(sequence, self.config.tokens_per_second, ANSWER)
            following = TokenLoop(model, context, at)

            def write(logits: Tensor = logits) -> None:
                for _ in range(tokens):
                    logits = following(choose(logits) or 0)

            return counted(write)

        return some(2).less(some(1))

    def picture(self, part: str, name: str, size: str) -> Count:
        """The "vit", or the VAE's "encode" or "decode"."""
        what = case(size, self.config)
        x = torch.empty(what.input_shape(name, self.config), dtype=COMPUTE, device="meta")
        module = self._module(part)
        work = partial(module, x, [what.seen]) if part == "vit" else partial(getattr(module, name), x)
        return counted(work)

    def run(self, name: str) -> Count:
        """The pass of that name (one of options.PASSES)."""
        works: dict[str, Callable[[], Count]] = {
            "t2i_768_guided": lambda: self.step("768", True),
            "t2i_768_one": lambda: self.step("768", False),
            "t2v_25_guided": lambda: self.step("25", True),
            "t2v_121_guided": lambda: self.step("121", True),
            "text_prefill": lambda: self.prefill("768", False),
            "edit_768_prefill": lambda: self.prefill("768", True),
            "text_token": self.token,
            "vae_decode_768": lambda: self.picture("vae", "decode", "768"),
            "vae_decode_121": lambda: self.picture("vae", "decode", "121"),
            "vae_encode_768": lambda: self.picture("vae", "encode", "768"),
            "vit_768": lambda: self.picture("vit", "vit", "768"),
        }
        return works[name]()


def run(args: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    """Count the passes named (all without any).

    Raises:
        RequestError: a number out of range.
    """
    if args.top < 0:
        raise RequestError(f"top is {args.top}, expected 0 or more lines")
    config = RELEASED
    if args.layers:
        config = replace(config, llm=replace(config.llm, num_layers=args.layers))
    passes = Passes(config)
    todo = {name: (name,) for name in args.passes or PASSES}
    found = {name: passes.run(name).told(args.top) for (name,) in watched(todo, progress)}
    return {
        "bench": "count",
        "torch": torch.__version__,
        "layers": config.llm.num_layers,
        "cards": {key: card.name for key, card in CARDS.items() if args.card in ("all", key)},
        "passes": found,
    }


# -- telling -------------------------------------------------------------------------------------------------


def document(result: dict[str, Any]) -> list[Block]:
    """A row a pass, and the lines that move the most."""
    cards = result["cards"]
    head = ("pass", "kernels", "TFLOP", "GB outside products", "waits", "host copies")
    rows = []
    for name, count in result["passes"].items():
        cells = [f"{count['kernels']:,}", f"{count['flops'] / 1e12:.3g}", gigabytes(count["other_bytes"], 2)]
        cells += [str(count["syncs"]), str(count["copies"])]
        rows.append([name, *cells, *(seconds_text(count["seconds"][key]) for key in cards)])
    blocks: list[Block] = [
        f"Counted on torch {result['torch'].split('+')[0]}'s meta device at the released sizes "
        f"({result['layers']} layers), bf16; GB = 10^9 bytes. Times are predicted: the longer of operations "
        f"and bytes for each kernel, {LAUNCH * 1e6:g} µs a kernel at least over the whole pass.",
        Table((*head, *cards.values()), rows),
    ]
    for name, count in result["passes"].items():
        lines = [
            f"{gigabytes(line['bytes'], 2)} GB in {line['kernels']} kernels:{line['where'] or ' torch'}"
            for line in count["lines"]
        ]
        if lines:
            blocks += [f"{name}: most bytes outside products", Notes(lines)]
    return blocks
