"""What each weight format changes: drift of velocity, latent, pixels and answer logits, against float32 and
bf16.

    python scripts/measure_quality.py [--layers 4] [--json FILE]
    python scripts/measure_quality.py --model models/lance/Lance_3B --cells 32 --steps 12

Pixels are the guided latent's, decoded in float32, so they show the experts' weights as well; the VAE itself,
which is never quantised, is measured apart.

Without `--model`: random weights at the released widths (cut to few layers), and the small golden checkpoint
if it is there. With it: that checkpoint, all layers. Drift is ||a - b|| / ||b||. All products run in float32
except the row "bf16 weights and compute", so a row shows what the weights lost and nothing else; random
weights show how errors grow,
not how pictures look: what only trained weights can show is listed at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lance_core.bench.case import Case, noise
from lance_core.bench.device import materialise
from lance_core.checkpoint.checkpoint import Checkpoint
from lance_core.checkpoint.quantize import FORMATS, quantisable
from lance_core.config import LATENT_CHANNELS, RELEASED_LLM, RELEASED_VAE, RELEASED_VIT, LanceConfig
from lance_core.errors import CheckpointError
from lance_core.model.dual_expert import DualExpert, Generation, Plan, Row, Understanding
from lance_core.model.sampler import Guidance, euler, schedule
from lance_core.model.sequence import Branch
from lance_core.vae.wan import WanVAE, denormalize_latent

GOLDEN = ROOT / "tests" / "golden" / "checkpoint" / "Lance_3B_Video"
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
    *(
        Variant(f"{name}, two middle layers bf16", name, name, "middle") for name in FORMATS
    ),  # is it which layers, or how many?
    *(Variant(f"understanding {name}, generation bf16", name, "bf16") for name in FORMATS),
    *(Variant(f"understanding bf16, generation {name}", "bf16", name) for name in FORMATS),
)
MEASURES = ("velocity, caption", "velocity, no caption", "guided latent", "pixels", "answer logits")
REFERENCES = ("float32", "bf16")


# -- weights -------------------------------------------------------------------------------------------------


def random_expert(cls: type[nn.Module], config: LanceConfig, seed: int) -> nn.Module:
    """An expert with float32 weights of variance 1 / fan-in, some input channels larger by OUTLIER_SCALE."""
    module = cls(config.llm, device="meta").requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for owner in module.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            weight = torch.randn(p.shape, generator=draw)
            if weight.dim() > 1:
                weight /= weight[0].numel() ** 0.5
                if not isinstance(owner, nn.Embedding):
                    weight[:, ::OUTLIERS] *= OUTLIER_SCALE
            else:
                weight = 1 + 0.1 * weight if name == "weight" else 0.02 * weight
            setattr(owner, name, nn.Parameter(weight, requires_grad=False))
    return module.eval()


def kept(name: str, weight: Tensor, format: str, spared: tuple[int, ...] = ()) -> Tensor:
    """A weight as that format gives it back, in float32; `spared` layers' as bf16 does."""
    if format == "fp32":
        return weight
    form = FORMATS.get(format)
    if (
        form is None
        or not quantisable(name)
        or not form.fits(*weight.shape)
        or int(name.split(".")[1]) in spared
    ):
        return weight.bfloat16().float()
    return form.decode(form.encode(weight), torch.float32)


class Subject:
    """Two experts whose float32 weights are put aside, so that each variant's can take their place."""

    def __init__(self, und: nn.Module, gen: nn.Module, config: LanceConfig) -> None:
        self.config, self.modules = config, {"und": und, "gen": gen}
        self.original = {part: dict(module.named_parameters()) for part, module in self.modules.items()}

    def experts(self, variant: Variant) -> DualExpert:
        """The experts with a variant's weights; those of the variant before are gone."""
        spared = {
            "": (),
            "edges": (0, self.layers - 1),
            "middle": ((self.layers - 1) // 2, self.layers // 2),
        }[variant.spared]
        for part, module in self.modules.items():
            for name, weight in self.original[part].items():
                owner, _, leaf = name.rpartition(".")
                value = kept(name, weight, getattr(variant, part), spared)
                setattr(
                    module.get_submodule(owner),
                    leaf,
                    nn.Parameter(value.to(variant.compute), requires_grad=False),
                )
        return DualExpert(self.config.llm, self.modules["und"], self.modules["gen"], dtype=variant.compute)

    @property
    def layers(self) -> int:
        return self.config.llm.num_layers


# -- measuring -----------------------------------------------------------------------------------------------


def outputs(
    model: DualExpert, config: LanceConfig, vae: nn.Module | None, cells: int, steps: int
) -> dict[str, Tensor]:
    """What the experts say of one fixed request, MEASURES by name; without a VAE no pixels."""
    case = Case(cells * 16, cells * 16, 1, 1, True, False, 24, (1, cells, cells), (1, 8, 8))
    sequence = case.sequence(config)
    prepared = model.prefill(Plan.of(sequence, config.tokens_per_second, guided=True))
    rows = [Row(prepared, b) for b in Branch]
    x = noise(1, *case.grid, LATENT_CHANNELS)

    def velocity(x: Tensor, t: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        time = t.expand(len(rows) if guided else 1, 1)
        v = model.velocity(rows if guided else rows[:1], torch.cat([x, x]) if guided else x, time)
        return (v[:1], v[1:]) if guided else (v, None)

    cond, uncond = velocity(x, torch.tensor(0.7), True)
    latent = euler(velocity, x, schedule(steps), Guidance())
    pixels = None if vae is None else vae.decode(denormalize_latent(latent.float().movedim(-1, 1)))
    _, logits, _ = model.read(case.question(config), config.tokens_per_second, 1)
    found = dict(zip(MEASURES, (cond, uncond, latent, pixels, logits), strict=True))
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def drift(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def measure(
    subject: Subject, vae: nn.Module | None, cells: int, steps: int, variants: tuple[Variant, ...] = VARIANTS
) -> list[dict[str, Any]]:
    """Every variant's drift from float32 and from bf16 weights, and whether the likeliest next token is the
    same.

    vae: in float32.
    """
    with torch.inference_mode():
        exact = outputs(
            subject.experts(Variant("float32", "fp32", "fp32")), subject.config, vae, cells, steps
        )
        half: dict[str, Tensor] = {}
        results = []
        for variant in variants:
            found = outputs(subject.experts(variant), subject.config, vae, cells, steps)
            half = half or found
            drifts = {
                "float32": {m: drift(found[m], exact[m]) for m in found},
                "bf16": {m: drift(found[m], half[m]) for m in found},
            }
            same = int(found["answer logits"].argmax()) == int(exact["answer logits"].argmax())
            results.append({"variant": variant.label, "drift": drifts, "same_token": same})
            print(f"{variant.label}: done", file=sys.stderr, flush=True)
    return results


def vae_drift(vae: nn.Module, cells: int) -> dict[str, Any]:
    """A decoded latent in bf16 against float32; pixels in 0..255."""
    latent = denormalize_latent(noise(1, LATENT_CHANNELS, 1, cells, cells))
    with torch.inference_mode():
        whole = vae.float().decode(latent)
        half = vae.bfloat16().decode(latent.bfloat16()).float()
    difference = (whole - half).abs() * 127.5
    return {"drift": drift(half, whole), "mean": float(difference.mean()), "most": float(difference.max())}


# -- subjects ------------------------------------------------------------------------------------------------


def released(layers: int) -> tuple[Subject, nn.Module]:
    """Random weights at the released widths."""
    config = LanceConfig(
        replace(RELEASED_LLM, num_layers=layers, vocab_size=8192), RELEASED_VIT, RELEASED_VAE, "image"
    )
    subject = Subject(random_expert(Understanding, config, 0), random_expert(Generation, config, 1), config)
    return subject, materialise(WanVAE(RELEASED_VAE, device="meta"), torch.device("cpu"), torch.float32)


def stored(path: Path) -> tuple[Subject, nn.Module | None]:
    """A checkpoint's own weights, in float32."""
    checkpoint = Checkpoint(path)
    if checkpoint.parts["und"].formats or checkpoint.parts["gen"].formats:
        raise CheckpointError(f"{path} is quantised already; measure the original")
    experts = [checkpoint.build(part).requires_grad_(False) for part in ("und", "gen")]
    for part, module in zip(("und", "gen"), experts, strict=True):
        for name, weight in checkpoint.tensors(
            part, torch.float32
        ):  # not loaded, which joins what is quantised apart
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    vae = checkpoint.load("vae", dtype=torch.float32) if checkpoint.config.vae else None
    return Subject(*experts, checkpoint.config), vae


# -- report --------------------------------------------------------------------------------------------------


def report(results: list[dict[str, Any]], reference: str) -> str:
    """Markdown, in percent of the reference."""
    measures = list(results[0]["drift"][reference])
    lines = [
        [f"drift from {reference}, %", *measures, "next token"],
        ["---", *["--:"] * len(measures), "---"],
    ]
    for one in results:
        numbers = [f"{100 * one['drift'][reference][m]:.2f}" for m in measures]
        lines.append([one["variant"], *numbers, "same" if one["same_token"] else "another"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decide(results: list[dict[str, Any]]) -> str:
    """Whether keeping the first and last layer in bf16 is worth it: against none, and against any other two."""
    by = {one["variant"]: 100 * one["drift"]["bf16"]["guided latent"] for one in results}
    lines = []
    for name in FORMATS:
        found = [
            by.get(f"{name}{which}")
            for which in ("", ", first and last layer bf16", ", two middle layers bf16")
        ]
        if None not in found:
            better = (
                "better than the two in the middle"
                if found[1] < 0.9 * found[2]
                else "no better than the two in the middle"
            )
            lines.append(
                "- {}: latent drift {:.2f} %; first and last layer bf16 {:.2f} %, two middle ones {:.2f} %: "
                "".format(name, *found)
                + better
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint to measure, instead of random weights")
    parser.add_argument("--layers", type=int, default=4, help="of the random weights")
    parser.add_argument("--cells", type=int, default=8, help="latent cells a side: 48 is a 768x768 picture")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model:
        subjects = [(str(args.model.name), lambda: stored(args.model))]
    else:
        subjects = [(f"random weights, released widths, {args.layers} layers", lambda: released(args.layers))]
        subjects += [("golden checkpoint (tiny)", lambda: stored(GOLDEN))] if GOLDEN.exists() else []
    told: dict[str, Any] = {
        "torch": torch.__version__,
        "cells": args.cells,
        "steps": args.steps,
        "subjects": {},
    }
    for label, make in subjects:
        subject, vae = make()
        results = measure(subject, vae, args.cells, args.steps)
        told["subjects"][label] = {"results": results}
        print(f"{label}; {args.cells}x{args.cells} latent cells, {args.steps} steps:\n")
        print("\n\n".join(report(results, reference) for reference in REFERENCES), end="\n\n")
        if subject.layers >= 4:  # below, nothing is left to compare with
            print(f"First and last of {subject.layers} layers:\n\n{decide(results)}\n")
        del subject
        if vae is not None:
            pixels = told["subjects"][label]["vae"] = vae_drift(vae, args.cells)
            print(
                f"VAE in bf16 against float32: {100 * pixels['drift']:.2f} %, mean {pixels['mean']:.2f} and "
                f"at most {pixels['most']:.1f} of 255\n"
            )
    missing = UNMEASURED[:1] if args.model else UNMEASURED
    print(
        "Not measured here"
        + (", for it takes eyes" if args.model else ", for it takes the trained weights")
        + ":\n"
    )
    print("\n".join(f"- {what}" for what in missing))
    if args.json:
        args.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
