"""The recorded training batches: manifest, tensors, and the samples that lance_core makes of them.

They are reduced: of each gradient up to 128 values at fixed places, its largest, and every parameter's norm.
Names are those of the released checkpoint.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lance_core.checkpoint.checkpoint import Checkpoint, released_name
from lance_core.inputs.tasks import TASKS
from lance_core.model.sequence import Kind, Role, VisualSegment
from lance_core.training import Experts, answer_sample, drawn_time, generation_sample, system_prompt

FOLDER = Path(__file__).parent / "golden" / "training"
CHECKPOINT = Path(__file__).parent / "golden" / "checkpoint" / "Lance_3B_Video"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
CASES = MANIFEST["cases"]
FROZEN = ("embed_tokens.weight", "lm_head.weight")
TURN = re.compile(
    r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n<\|im_start\|>user\n(.*?)<\|im_end\|>\n"
    r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>",
    re.DOTALL,
)
BLOCK = re.compile(r"<\|vision_start\|><\|video_pad\|>\{x\d+\}<\|vision_end\|>")


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """A case's recorded tensors, with its batch's where it is a variant of one."""
    base = CASES[name]["base"] if name in CASES else name
    own = load_file(FOLDER / f"{name}.safetensors")
    return own if base == name else tensors(base) | own


@cache
def checkpoint() -> Checkpoint:
    return Checkpoint(CHECKPOINT)


def load_experts(trainable: bool = True) -> Experts:
    """Fresh experts of the golden checkpoint in float32, projections apart; all but embeddings trained."""
    opened = checkpoint()
    und, gen = (opened.load(part, dtype=torch.float32, joined=False) for part in ("und", "gen"))
    for module in (und, gen):
        for name, weight in module.named_parameters():
            weight.requires_grad_(trainable and name not in FROZEN)
    return Experts(opened.config.llm, und, gen, opened.config.tokens_per_second, len(opened.tokenizer))


def parameters(experts: Experts) -> dict[str, Tensor]:
    """The trained ones, by their released names."""
    return {
        released_name(name, module is experts.gen): weight
        for module in (experts.und, experts.gen)
        for name, weight in module.named_parameters()
        if name not in FROZEN
    }


def places(count: int) -> Tensor:
    """Which values of a gradient of so many were kept."""
    return (torch.arange(128) * 2654435761 + 12345) % count if count > 128 else torch.arange(count)


def batch(name: str) -> SimpleNamespace:
    """samples, noise and times of a case, as `loss` takes them."""
    case, data = CASES[name], tensors(name)
    grids = [g for listed in case["grids"] for g in listed]
    shapes = case["latent_shapes"]
    noise = torch.randn(
        sum(t * h * w for t, h, w in shapes), 48, generator=torch.Generator().manual_seed(case["seed"])
    )
    state = np.random.RandomState(case["seed"])
    latents, noises = (_split(rows, shapes) for rows in (data.get("latents"), noise))
    embeds = data.get("vit_embeds")
    made = SimpleNamespace(samples=[], noise=[], times=[])
    for rendered in case["rendered"]:
        system, user, assistant = TURN.match(rendered).groups()
        visuals, text = BLOCK.findall(user), BLOCK.sub("", user)
        segments: list[Any] = []
        role = Role.SOURCE if len(visuals) == 2 else Role.QUESTION
        if visuals:
            t, h, w = grids.pop(0)
            count = t * h * w // 4
            segments.append(VisualSegment(Kind.VIT, role, (t, h // 2, w // 2), embeds[:count]))
            embeds = embeds[count:]
        if len(visuals) == 2:
            grids.pop(0)
            source = latents.pop(0)
            noises.pop(0)
            segments.append(VisualSegment(Kind.CLEAN, role, tuple(source.shape[:3]), source))
        tokenizer = checkpoint().tokenizer
        if not BLOCK.search(assistant):
            made.samples.append(answer_sample(tokenizer, system, segments, text, assistant))
            made.noise.append(None)
            made.times.append(None)
            continue
        grids.pop(0)
        latent = latents.pop(0)
        video = "video" in system
        edit = system.startswith("Describe the key")
        task = TASKS[("video_edit" if video else "image_edit") if edit else ("t2v" if video else "t2i")]
        assert system == system_prompt(task, as_released=True)
        last = len(latent) - 1
        clean = {"ff2v": (0,), "flf2v": (0, last)}.get(name.removesuffix("_no_text"), ())
        made.samples.append(
            generation_sample(tokenizer, system, segments, text, latent, clean, caption_dropped=not text)
        )
        made.noise.append(noises.pop(0))
        made.times.append(drawn_time(float(state.randn())))
    assert not grids and not latents
    return made


def _split(rows: Tensor | None, shapes: list[list[int]]) -> list[Tensor]:
    if rows is None:
        return []
    parts = rows.split([t * h * w for t, h, w in shapes])
    return [part.view(*shape, 48) for part, shape in zip(parts, shapes, strict=True)]


def gradients(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every parameter; where a graph does not reach one, zeros."""
    return {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}


def check_gradients(found: dict[str, Tensor], recorded: dict[str, Tensor], names: list[str]) -> float:
    """Every recorded value, to 5e-5 of its tensor's largest (or 1e-4 of the case's); returns the worst."""
    worst, values = 0.0, recorded["gradients"]
    floor = 1e-4 * float(recorded["gradient_max"].max())
    for name, largest in zip(names, recorded["gradient_max"].tolist(), strict=True):
        gradient = found[name].flatten()
        kept = places(gradient.numel())
        expected, values = values[: len(kept)], values[len(kept) :]
        error = float((gradient[kept] - expected).abs().max()) / max(largest, floor)
        assert error <= 5e-5, f"{name}: {error:.1e}"
        worst = max(worst, error)
    assert not len(values)
    return worst
