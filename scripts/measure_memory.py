"""How much memory each request needs at the released sizes, tensor by tensor, and the smallest card that has
it.

    python scripts/measure_memory.py [--json FILE] [--device cuda] [--top 8]

The real passes run on torch's meta device, where tensors have sizes and no contents, so any machine will do
(how they are
counted: accounting.py). With `--device cuda` the same passes run for real, on weights of zeros (memory does
not depend on them), and the allocator's peak is read instead.

Parts in memory at each stage are those ComfyUI would keep: the ViT to look, the VAE to encode and decode, the
understanding expert to answer, both experts to draw. Three placements of weights are counted: whole; `lean`,
where the understanding expert (two tokens of every step) is streamed and the generation expert stays; and
`streamed`, where a layer's weight is on the card only while it is used (ComfyUI's lowvram with nothing kept).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from accounting import Accountant, Allocator  # noqa: E402

from lance_core.bench.case import Case
from lance_core.checkpoint.quantize import FORMATS, QuantLinear, quantisable, swap
from lance_core.config import CELL, LATENT_CHANNELS, RELEASED_LLM, RELEASED_VAE, RELEASED_VIT, LanceConfig
from lance_core.inputs import preprocess
from lance_core.model.decoder import join
from lance_core.model.dual_expert import DualExpert, Generation, Plan, Row, Understanding
from lance_core.model.sequence import Branch
from lance_core.model.token_loop import TokenLoop
from lance_core.model.vit import VisionTower
from lance_core.vae.wan import TILE, WanVAE

RELEASED = LanceConfig(RELEASED_LLM, RELEASED_VIT, RELEASED_VAE, "video")
COMPUTE = torch.bfloat16
WEIGHTS = ("bf16", *FORMATS)
PLACES = ("whole", "lean", "streamed")
CARDS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80)  # GiB
RESERVE = 10**9  # CUDA's context, kernels and workspaces, the allocator's rounding, the screen
CAPTION = 100  # tokens


@dataclass(frozen=True)
class Request:
    """One thing a user may ask. task: what decides the stages; width, height in pixels."""

    name: str
    task: str
    width: int
    height: int
    frames: int = 1


REQUESTS = (
    Request("t2i 768x768", "t2v", 768, 768),
    Request("image edit 768x768", "edit", 768, 768),
    Request("t2v 848x480, 25 frames", "t2v", 848, 480, 25),
    Request("t2v 848x480, 61 frames", "t2v", 848, 480, 61),
    Request("t2v 848x480, 121 frames", "t2v", 848, 480, 121),
    Request("i2v 848x480, 121 frames", "i2v", 848, 480, 121),
    Request("video edit 848x480, 69 frames", "edit", 848, 480, 69),
    Request("VQA, image 768x768", "vqa", 768, 768),
    Request("VQA, video 848x480, 69 frames", "vqa", 848, 480, 69),
)
GOALS = (  # request, weights, GB
    ("t2i 768x768", "bf16", 14.5),
    ("t2i 768x768", "fp8", 8.0),
    ("VQA, image 768x768", "bf16", 9.0),
    ("VQA, video 848x480, 69 frames", "bf16", 9.0),
    ("t2v 848x480, 121 frames", "bf16", 20.0),
    ("t2v 848x480, 121 frames", "fp8", 12.0),
)


# -- weights -------------------------------------------------------------------------------------------------


def build(part: str, config: LanceConfig, weights: str, device: str) -> nn.Module:
    """A part's module in COMPUTE, the experts' matrices in the format named; on a real device, filled with
    zeros.
    """
    if part == "vit":
        module: nn.Module = VisionTower(config.vit, device="meta", dtype=COMPUTE)
    elif part == "vae":
        module = WanVAE(config.vae, device="meta", dtype=COMPUTE)
    else:
        module = {"und": Understanding, "gen": Generation}[part](config.llm, device="meta", dtype=COMPUTE)
        if weights in FORMATS:
            form = FORMATS[weights]
            layers = config.llm.num_layers
            fits = {
                n.removesuffix(".weight"): form
                for n, p in module.named_parameters()
                if quantisable(n, layers) and form.fits(*p.shape)
            }
            swap(
                module,
                fits,
                lambda f, linear: QuantLinear(
                    f, linear.in_features, linear.out_features, linear.bias is not None, "meta", COMPUTE
                ),
            )
    module.requires_grad_(False)
    if device != "meta":
        for owner in module.modules():
            for name, p in list(owner._parameters.items()):
                if p is not None:
                    owner._parameters[name] = nn.Parameter(
                        torch.zeros(p.shape, dtype=p.dtype, device=device), requires_grad=False
                    )
    return module.eval()


def stream(module: nn.Module, device: str) -> None:
    """Have every layer's weights copied to the device for each use and freed after, as ComfyUI's lowvram
    does.
    """

    def bring(owner: nn.Module, *_: Any) -> None:
        owner.away = dict(owner._parameters)
        for name, p in owner.away.items():
            if p is not None:
                owner._parameters[name] = p.to(device, copy=True)

    def leave(owner: nn.Module, *_: Any) -> None:
        owner._parameters.update(owner.__dict__.pop("away"))

    for owner in module.modules():
        if owner._parameters:
            owner.register_forward_pre_hook(bring)
            owner.register_forward_hook(leave)


# -- stages --------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Runs stages and notes their peaks: {stage: bytes}, {stage: what lived then}."""

    config: LanceConfig
    device: str
    weights: str = "bf16"
    place: str = "whole"
    peaks: dict[str, int] = field(default_factory=dict)
    contents: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    @contextmanager
    def family(self, *parts: str):
        """(meter, modules) with these parts, and nothing else, in memory."""
        meter = Allocator() if self.device == "cuda" else Accountant(self.device)
        away = (
            {"whole": (), "lean": ("und",), "streamed": parts}[self.place]
            if "gen" in parts or self.place != "lean"
            else ()
        )
        modules = {}
        for part in parts:
            modules[part] = join(
                build(
                    part,
                    self.config,
                    self.weights,
                    "cpu" if part in away and self.device == "cuda" else self.device,
                )
            )
            if part in away:
                stream(modules[part], self.device)
            else:
                meter.hold(f"weights of {part}", modules[part].parameters())
        with torch.inference_mode(), meter:
            yield meter, modules

    def note(self, meter: Accountant | Allocator, stage: str, work: Callable[[], Any]) -> Any:
        """Run a stage and note its peak."""
        meter.reset()
        result = work()
        self.peaks[stage] = max(meter.peak, self.peaks.get(stage, 0))
        self.contents[stage] = meter.at_peak
        return result

    def empty(self, *shape: int, dtype: torch.dtype = COMPUTE) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def look(self, case: Case) -> None:
        """The ViT over a picture or clip."""
        c = self.config.vit
        with self.family("vit") as (meter, modules):
            patches = self.empty(
                case.seen[0] * case.seen[1] * case.seen[2],
                c.in_channels * c.temporal_patch_size * c.patch_size**2,
            )
            self.note(meter, "vision tower", lambda: modules["vit"](patches, [case.seen]))

    def encode(self, case: Case, frames: int) -> None:
        """The VAE over a picture or clip."""
        with self.family("vae") as (meter, modules):
            pixels = self.empty(1, 3, frames, case.height, case.width)
            self.note(meter, "VAE encode", lambda: modules["vae"].encode(pixels))

    def decode(self, case: Case) -> None:
        """The VAE over the result, whole and in the tiles it falls back to."""
        tile = min(TILE, (max(case.grid[1:]) + 1) // 2)
        for stage, side in (("VAE decode", None), (f"VAE decode, tiles of {tile * CELL} px", tile)):
            with self.family("vae") as (meter, modules):
                work = partial(modules["vae"].decode, self.empty(1, LATENT_CHANNELS, *case.grid), tile=side)
                self.note(meter, stage, work)

    def denoise(self, case: Case) -> None:
        """Both branches' context, then a guided step as one forward of two rows and as two forwards of one."""
        with self.family("und", "gen") as (meter, modules):
            model = DualExpert(
                self.config.llm, modules["und"], modules["gen"], dtype=COMPUTE, device=self.device
            )
            sequence = case.sequence(self.config)
            plan = Plan.of(sequence, self.config.tokens_per_second, guided=True)
            prepared = self.note(meter, "prefill", lambda: model.prefill(plan))
            both = [Row(prepared, b) for b in Branch]
            x = self.empty(1, *case.grid, LATENT_CHANNELS, dtype=torch.float32)
            t = self.empty(1, case.grid[0], dtype=torch.float32)
            self.note(
                meter, "step, 2 rows", lambda: model.velocity(both, torch.cat([x, x]), torch.cat([t, t]))
            )
            self.note(meter, "step, 1 row", lambda: [model.velocity([row], x, t) for row in both])

    def answer(self, case: Case) -> None:
        """Reading a question about a picture or clip, then writing."""
        with self.family("und") as (meter, modules):
            model = DualExpert(self.config.llm, modules["und"], None, dtype=COMPUTE, device=self.device)
            sequence, rate = case.question(self.config), self.config.tokens_per_second
            context, _, at = self.note(meter, "prefill", lambda: model.read(sequence, rate, 256))
            following = TokenLoop(model, context, at)
            self.note(meter, "token", lambda: following(1))


def case_of(request: Request, config: LanceConfig) -> Case:
    """What the request comes to in latent cells and ViT patches."""
    preset = "video_480p" if request.frames > 1 else "image_768res"
    patch, pair = config.vit.patch_size, config.vit.temporal_patch_size
    wide, tall = preprocess.vit_size(
        request.width, request.height, preset, patch * config.vit.spatial_merge_size
    )
    seen = (-(-request.frames // pair), tall // patch, wide // patch)
    grid = (1 + (request.frames - 1) // 4, request.height // CELL, request.width // CELL)
    return Case(
        request.width, request.height, request.frames, 1, True, request.task == "edit", CAPTION, grid, seen
    )


@cache
def pictures(request: Request, config: LanceConfig, device: str, place: str) -> Bench:
    """The ViT's and the VAE's stages of a request, which do not depend on the experts' weights."""
    bench, case = Bench(config, device, place=place), case_of(request, config)
    if request.task in ("edit", "vqa"):
        bench.look(case)
    if request.task in ("edit", "i2v"):
        bench.encode(case, 1 if request.task == "i2v" else request.frames)
    if request.task != "vqa":
        bench.decode(case)
    return bench


def measure(
    request: Request,
    config: LanceConfig = RELEASED,
    device: str = "meta",
    weights: str = "bf16",
    place: str = "whole",
) -> Bench:
    """Peaks of all stages of one request, in the order they run."""
    bench, case = Bench(config, device, weights, place), case_of(request, config)
    beside = pictures(request, config, device, "streamed" if place == "streamed" else "whole")
    bench.answer(case) if request.task == "vqa" else bench.denoise(case)
    peaks = beside.peaks | bench.peaks
    bench.peaks = {
        stage: peaks[stage]
        for stage in sorted(peaks, key=lambda s: (s.startswith("VAE decode"), s in bench.peaks))
    }
    bench.contents |= beside.contents
    return bench


# -- report --------------------------------------------------------------------------------------------------


def needed(peaks: dict[str, int], thrifty: bool = False) -> int:
    """The request's peak; thrifty: guidance as two forwards and the VAE in tiles, as when memory is short."""
    skipped = (
        {"step, 2 rows", "VAE decode"} if thrifty else {"step, 1 row", *(s for s in peaks if "tiles" in s)}
    )
    return max(size for stage, size in peaks.items() if stage not in skipped)


def card(peak: int) -> str:
    """The smallest card that holds a peak and RESERVE."""
    return next((f"{gib} GB" for gib in CARDS if peak + RESERVE <= gib << 30), f"over {CARDS[-1]} GB")


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gb(size: int) -> str:
    return f"{size / 1e9:.1f}"


def weights_table(config: LanceConfig) -> str:
    """Bytes of each part in each format."""
    sizes = {
        w: {
            p: sum(t.nbytes for t in build(p, config, w, "meta").parameters())
            for p in ("und", "gen", "vit", "vae")
        }
        for w in WEIGHTS
    }
    names = {"und": "understanding expert", "gen": "generation expert", "vit": "ViT", "vae": "VAE"}
    rows = [[f"{names[p]}, GB", *(f"{sizes[w][p] / 1e9:.2f}" for w in WEIGHTS)] for p in names]
    return table(["weights", *WEIGHTS], rows)


def summary(
    found: dict[tuple[str, str, str], dict[str, int]], requests: Iterable[str], place: str, thrifty: bool
) -> str:
    """Peak and smallest card of every request in one placement."""
    rows = []
    for name in requests:
        peaks = [needed(found[name, w, place], thrifty) for w in WEIGHTS]
        rows.append([name, *(f"{gb(p)} ({card(p)})" for p in peaks)])
    return table(["peak GB (smallest card)", *WEIGHTS], rows)


def stages(found: dict[tuple[str, str, str], dict[str, int]], requests: Iterable[str]) -> str:
    """Every stage's peak, weights whole; and streamed in bf16."""
    rows = []
    for name in requests:
        for stage in found[name, "bf16", "whole"]:
            sizes = [found[name, w, "whole"][stage] for w in WEIGHTS]
            streamed = found[name, "bf16", "streamed"][stage]
            rows.append([name, stage, *(gb(s) for s in sizes), gb(streamed)])
    return table(["request", "stage", *(f"{w}, GB" for w in WEIGHTS), "bf16 streamed, GB"], rows)


def goals(found: dict[tuple[str, str, str], dict[str, int]]) -> str:
    """Against what was wanted: two rows, one row, and with the understanding expert streamed."""
    rows = []
    for name, weights, goal in GOALS:
        whole, lean = found[name, weights, "whole"], found[name, weights, "lean"]
        ways = (needed(whole), needed(whole, True), needed(lean, True))
        rows.append(
            [name, weights, f"{goal:.1f}", *(f"{gb(w)}{'' if w <= goal * 1e9 else ' (over)'}" for w in ways)]
        )
    return table(["request", "weights", "goal, GB", "as fast as can be", "thrifty", "thrifty, lean"], rows)


def largest(contents: list[tuple[int, str]], count: int) -> str:
    """The largest things alive at a peak, weights summed."""
    summed: dict[str, tuple[int, int]] = {}
    for size, label in contents:
        total, times = summed.get(label, (0, 0))
        summed[label] = (total + size, times + 1)
    ordered = sorted(summed.items(), key=lambda item: -item[1][0])[:count]
    return "\n".join(f"  {total / 1e9:6.2f} GB  {times:4} x {label}" for label, (total, times) in ordered)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="meta", choices=("meta", "cuda"))
    parser.add_argument("--json", type=Path, help="write every stage's peak, too")
    parser.add_argument("--only", default="", help="requests whose name contains this")
    parser.add_argument(
        "--top",
        type=int,
        default=0,
        help="show so many of the largest tensors at each request's peak (bf16, whole)",
    )
    args = parser.parse_args()
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    chosen = [r for r in REQUESTS if args.only in r.name]
    for request in chosen:
        for weights in WEIGHTS:
            for place in PLACES:
                bench = measure(request, RELEASED, args.device, weights, place)
                found[request.name, weights, place] = bench.peaks
                print(
                    f"{request.name}, {weights}, {place}: {gb(needed(bench.peaks))} GB",
                    file=sys.stderr,
                    flush=True,
                )
                if args.top and (weights, place) == ("bf16", "whole"):
                    for stage, contents in bench.contents.items():
                        print(
                            f"{request.name}, {stage}: {gb(bench.peaks[stage])} "
                            f"GB\n{largest(contents, args.top)}",
                            file=sys.stderr,
                        )
    names = [r.name for r in chosen]
    how = "CUDA's allocator" if args.device == "cuda" else "every tensor accounted on the meta device"
    print(
        f"Peak memory by {how}, torch {torch.__version__.split('+')[0]}; activations, ViT and VAE in bf16; "
        "GB = 10^9 bytes."
    )
    print(
        f"Smallest card: the peak and {RESERVE / 1e9:.0f} GB for CUDA itself fit (a card's GB are 2^30 "
        "bytes).\n"
    )
    print(weights_table(RELEASED), end="\n\n")
    print(
        "Weights whole, guidance in one forward, VAE whole:\n\n" + summary(found, names, "whole", False),
        end="\n\n",
    )
    print(
        "Weights whole, guidance in two forwards, VAE in tiles:\n\n" + summary(found, names, "whole", True),
        end="\n\n",
    )
    print(
        "As before, understanding expert streamed while drawing:\n\n" + summary(found, names, "lean", True),
        end="\n\n",
    )
    print("As before, all weights streamed:\n\n" + summary(found, names, "streamed", True), end="\n\n")
    print("By stage:\n\n" + stages(found, names), end="\n\n")
    if len(chosen) == len(REQUESTS):
        print("Goals:\n\n" + goals(found))
    if args.json:
        results = [
            {"request": r, "weights": w, "place": p, "peaks": peaks} for (r, w, p), peaks in found.items()
        ]
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "device": args.device, "results": results}, indent=1),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
