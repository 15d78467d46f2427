"""What each weight format changes: drift of velocity, latent, pixels and answer logits, against float32 and
bf16.

Pixels are the guided latent's, decoded in float32, so they show the experts' weights as well; the VAE itself,
which is never quantised, is measured apart.

Without `--model`: random weights at the released widths, cut to few layers. With it: those checkpoints, all
layers. Drift is ||a - b|| / ||b||. All products run in float32 except the row "bf16 weights and compute", so
a row shows what the weights lost and nothing else; random weights show how errors grow, not how pictures
look: what only trained weights can show is listed at the end.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..checkpoint.checkpoint import Checkpoint, Progress
from ..checkpoint.quantize import FORMATS, quantisable
from ..config import LATENT_CHANNELS, RELEASED_LLM, LanceConfig
from ..errors import CheckpointError
from ..model.denoise import denoise
from ..model.dual_expert import DualExpert
from ..model.experts import Generation, Understanding
from ..model.plan import Plan, Row
from ..model.sampler import Guidance, schedule
from ..model.sequence import Branch
from ..vae.wan import WanVAE, denormalize_latent
from .case import RELEASED, Case, noise, vae_of
from .device import CPU, fill, materialise, watched
from .report import Block, Notes, Table

OUTLIERS = 64  # one input channel in so many is this much larger, as trained weights have them
OUTLIER_SCALE = 8.0
UNMEASURED = (
    "how pictures and clips look: fine detail, text, faces, hands (others saw 8 and 4 bits lose fine detail "
    "with the trained weights)",
    "which answers change, and scores of understanding benchmarks",
    "the outliers of the trained weights and activations, which decide how well a format with few scales "
    "fits",
    "drift over all 36 layers and 30 steps of the trained flow, which contracts or expands errors in its "
    "own way",
    "whether a trained first or last layer is more sensitive than the others",
)


@dataclass(frozen=True)
class Variant:
    """A choice of formats: fp32, bf16 or one of FORMATS for each expert. spared: two layers that stay bf16,
    "edges" or "middle".
    """

    label: str
    und: str
    gen: str
    spared: str = ""
    compute: torch.dtype = torch.float32


VARIANTS = (
    Variant("bf16 weights", "bf16", "bf16"),
    Variant("bf16 weights and compute", "bf16", "bf16", compute=torch.bfloat16),
    *(Variant(name, name, name) for name in FORMATS),
    *(Variant(f"{name}, first and last layer bf16", name, name, "edges") for name in FORMATS),
    # Does it matter which layers are spared, or how many?
    *(Variant(f"{name}, two middle layers bf16", name, name, "middle") for name in FORMATS),
    *(Variant(f"understanding {name}, generation bf16", name, "bf16") for name in FORMATS),
    *(Variant(f"understanding bf16, generation {name}", "bf16", name) for name in FORMATS),
)
MEASURES = ("velocity, caption", "velocity, no caption", "guided latent", "pixels", "answer logits")
REFERENCES = ("float32", "bf16")


# -- weights -------------------------------------------------------------------------------------------------


def random_expert(cls: type[Any], config: LanceConfig, seed: int) -> Any:
    """An expert with float32 weights of variance 1 / fan-in, some input channels larger by OUTLIER_SCALE."""
    generator = torch.Generator().manual_seed(seed)

    def draw(owner: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
        weight = torch.randn(parameter.shape, generator=generator)
        if weight.dim() == 1:
            return 1 + 0.1 * weight if name == "weight" else 0.02 * weight
        weight /= weight[0].numel() ** 0.5
        if not isinstance(owner, nn.Embedding):
            weight[:, ::OUTLIERS] *= OUTLIER_SCALE
        return weight

    return fill(cls(config.llm, device="meta", joined=False), draw)


def kept(name: str, weight: Tensor, format: str, spared: tuple[int, ...] = ()) -> Tensor:
    """A weight as that format gives it back, in float32; `spared` layers' as bf16 does."""
    if format == "fp32":
        return weight
    form = FORMATS.get(format)
    fits = form is not None and quantisable(name) and form.fits(*weight.shape)
    if form is None or not fits or int(name.split(".")[1]) in spared:
        return weight.bfloat16().float()
    return form.decode(form.encode(weight), torch.float32)


def _put(module: nn.Module, name: str, weight: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


class Subject:
    """Two experts whose float32 weights are put aside, so that each variant's can take their place."""

    def __init__(self, und: Understanding, gen: Generation, config: LanceConfig) -> None:
        self.config, self.und, self.gen = config, und, gen
        self.original = {"und": dict(und.named_parameters()), "gen": dict(gen.named_parameters())}

    def experts(self, variant: Variant) -> DualExpert:
        """The experts with a variant's weights; those of the variant before are gone."""
        last = self.layers - 1
        spared = {"": (), "edges": (0, last), "middle": (last // 2, self.layers // 2)}[variant.spared]
        for part, module in (("und", self.und), ("gen", self.gen)):
            for name, weight in self.original[part].items():
                value = kept(name, weight, getattr(variant, part), spared)
                _put(module, name, value.to(variant.compute))
        return DualExpert(self.config.llm, self.und, self.gen, dtype=variant.compute)

    @property
    def layers(self) -> int:
        """Of each expert."""
        return self.config.llm.num_layers


# -- measuring -----------------------------------------------------------------------------------------------


def outputs(
    model: DualExpert, config: LanceConfig, vae: WanVAE | None, cells: int, steps: int
) -> dict[str, Tensor]:
    """What the experts say of one fixed request, MEASURES by name; without a VAE no pixels."""
    case = Case(cells * 16, cells * 16, 1, 1, True, False, 24, (1, cells, cells), (1, 8, 8))
    prepared = model.prefill(Plan.of(case.sequence(config), config.tokens_per_second, guided=True))
    x, t = noise(1, *case.grid, LATENT_CHANNELS), torch.tensor(0.7)
    both = [Row(prepared, branch) for branch in Branch]
    cond, uncond = model.velocity(both, torch.cat([x, x]), t.expand(2, 1)).split(1)
    latent = denoise(model, prepared, x, schedule(steps), Guidance())
    found = dict(zip(MEASURES[:3], (cond, uncond, latent), strict=True))
    if vae is not None:
        found["pixels"] = vae.decode(denormalize_latent(latent.float().movedim(-1, 1)))
    found["answer logits"] = model.read(case.question(config), config.tokens_per_second, 1)[1]
    return found


def drift(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def measure(
    subject: Subject,
    vae: WanVAE | None,
    cells: int,
    steps: int,
    variants: tuple[Variant, ...] = VARIANTS,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Every variant's drift from float32 and from bf16 weights, and whether the likeliest next token is the
    same.

    vae: in float32.
    """
    look = partial(outputs, config=subject.config, vae=vae, cells=cells, steps=steps)
    with torch.inference_mode():
        exact = look(subject.experts(Variant("float32", "fp32", "fp32")))
        half: dict[str, Tensor] = {}
        results = []
        for variant in watched({variant.label: variant for variant in variants}, progress):
            found = look(subject.experts(variant))
            half = half or found
            drifts = {
                name: {m: drift(found[m], reference[m]) for m in found}
                for name, reference in zip(REFERENCES, (exact, half), strict=True)
            }
            same = int(found["answer logits"].argmax()) == int(exact["answer logits"].argmax())
            results.append({"variant": variant.label, "drift": drifts, "same_token": same})
    return results


def vae_drift(vae: WanVAE, cells: int) -> dict[str, Any]:
    """A decoded latent in bf16 against float32; pixels in 0..255."""
    latent = denormalize_latent(noise(1, LATENT_CHANNELS, 1, cells, cells))
    with torch.inference_mode():
        whole = vae.float().decode(latent)
        half = vae.bfloat16().decode(latent.bfloat16()).float()
    difference = (whole - half).abs() * 127.5
    return {"drift": drift(half, whole), "mean": float(difference.mean()), "most": float(difference.max())}


# -- subjects ------------------------------------------------------------------------------------------------


def released(layers: int) -> tuple[Subject, WanVAE]:
    """Random weights at the released widths."""
    config = replace(RELEASED, llm=replace(RELEASED_LLM, num_layers=layers, vocab_size=8192), variant="image")
    subject = Subject(random_expert(Understanding, config, 0), random_expert(Generation, config, 1), config)
    return subject, materialise(WanVAE(vae_of(config), device="meta"), CPU, torch.float32)


def stored(path: Path) -> tuple[Subject, WanVAE | None]:
    """A checkpoint's own weights, in float32.

    Raises:
        CheckpointError: it cannot be read, or is quantised already.
    """
    checkpoint = Checkpoint(path)
    if checkpoint.parts["und"].formats or checkpoint.parts["gen"].formats:
        raise CheckpointError(f"{path} is quantised already; measure the original")
    experts: dict[str, Any] = {part: checkpoint.build(part, joined=False) for part in ("und", "gen")}
    for part, module in experts.items():
        # Tensor by tensor, each projection apart, as they are quantised.
        for name, weight in checkpoint.tensors(part, torch.float32):
            _put(module, name, weight)
    vae: Any = checkpoint.load("vae", dtype=torch.float32) if checkpoint.config.vae else None
    return Subject(experts["und"], experts["gen"], checkpoint.config), vae


def run(args: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    """Every variant on random weights, or on each checkpoint named.

    Raises:
        RequestError: an option out of range.
        CheckpointError: a checkpoint cannot be read, or is quantised already.
    """
    for what, most in (("layers", RELEASED_LLM.num_layers), ("cells", 64), ("steps", 1000)):
        checks.whole(what, getattr(args, what), 1, most)
    subjects: dict[str, Any] = {str(Path(m).name): partial(stored, Path(m)) for m in args.model or ()}
    if not subjects:
        label = f"random weights, released widths, {args.layers} layers"
        subjects = {label: partial(released, args.layers)}
    found = {}
    for label, make in subjects.items():
        subject, vae = make()
        results = measure(subject, vae, args.cells, args.steps, progress=progress)
        found[label] = {"layers": subject.layers, "results": results}
        del subject
        if vae is not None:
            found[label]["vae"] = vae_drift(vae, args.cells)
    return {
        "bench": "quality",
        "torch": torch.__version__,
        "cells": args.cells,
        "steps": args.steps,
        "trained": bool(args.model),
        "subjects": found,
    }


# -- telling -------------------------------------------------------------------------------------------------


def document(result: dict[str, Any]) -> list[Block]:
    """Each subject's tables, its first and last layers, its VAE; and what is not measured."""
    blocks: list[Block] = []
    for label, found in result["subjects"].items():
        cells = f"{result['cells']}x{result['cells']} latent cells"
        blocks.append(f"{label}; {cells}, {result['steps']} steps:")
        blocks += [drifts(found["results"], reference) for reference in REFERENCES]
        if found["layers"] >= 4:  # below, nothing is left to compare with
            blocks += [f"First and last of {found['layers']} layers:", Notes(decide(found["results"]))]
        if "vae" in found:
            vae = found["vae"]
            blocks.append(
                f"VAE in bf16 against float32: {100 * vae['drift']:.2f} %, mean {vae['mean']:.2f} and "
                f"at most {vae['most']:.1f} of 255"
            )
    why = "it takes eyes" if result["trained"] else "it takes the trained weights"
    missing = UNMEASURED[:1] if result["trained"] else UNMEASURED
    return [*blocks, f"Not measured here, for {why}:", Notes(list(missing))]


def drifts(results: list[dict[str, Any]], reference: str) -> Table:
    """In percent of the reference."""
    measures = list(results[0]["drift"][reference])
    rows = []
    for one in results:
        numbers = [f"{100 * one['drift'][reference][m]:.2f}" for m in measures]
        rows.append([one["variant"], *numbers, "same" if one["same_token"] else "another"])
    return Table((f"drift from {reference}, %", *measures, "next token"), rows)


def decide(results: list[dict[str, Any]]) -> list[str]:
    """Whether keeping the first and last layer in bf16 is worth it: against none, and against two others."""
    by = {one["variant"]: 100 * one["drift"]["bf16"]["guided latent"] for one in results}
    lines = []
    for name in FORMATS:
        labels = (name, f"{name}, first and last layer bf16", f"{name}, two middle layers bf16")
        if all(label in by for label in labels):
            none, edges, middle = (by[label] for label in labels)
            better = "better" if edges < 0.9 * middle else "no better"
            lines.append(
                f"{name}: latent drift {none:.2f} %; first and last layer bf16 {edges:.2f} %, two middle "
                f"ones {middle:.2f} %: {better} than the two in the middle"
            )
    return lines
