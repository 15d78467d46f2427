"""How much memory each request needs at the released sizes, by stage, and the smallest card that has it.

The real passes run on torch's meta device, where tensors have sizes and no contents, so any machine will do
(accounting.py counts them). With `--device cuda` the same passes run for real, on weights of zeros (memory
does not depend on them), and the allocator's peak is read instead.

Parts in memory at each stage are those ComfyUI would keep: the ViT to encode for understanding, the VAE to
encode and decode, the understanding expert to answer, both experts to generate. Three placements of weights
are counted: whole; `lean`, where the understanding expert (two tokens of every step) is streamed and the
generation expert stays; and `streamed`, where a layer's weight is on the card only while it is used
(ComfyUI's lowvram with nothing kept).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Progress
from ..checkpoint.quantize import FORMATS, Format, QuantLinear, quantisable, swap
from ..config import CELL, LATENT_CHANNELS, LanceConfig
from ..errors import RequestError
from ..inputs import preprocess
from ..model.dual_expert import DualExpert
from ..model.experts import Generation, Understanding
from ..model.plan import Plan, Row
from ..model.sequence import Branch
from ..model.token_loop import TokenLoop
from ..model.vit import VisionTower
from ..vae.wan import TILE, WanVAE
from .accounting import Accountant
from .case import RELEASED, Case, case_of, vit_of
from .device import Peak, fill, free, watched
from .options import PARTS
from .report import Block, Notes, Table, gigabytes

COMPUTE = torch.bfloat16
WEIGHTS = ("bf16", *FORMATS)
PLACES = ("whole", "lean", "streamed")
CARDS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80)  # GiB
RESERVE = 10**9  # CUDA's context, kernels and workspaces, the allocator's rounding, the screen
PART_NAMES = {"und": "understanding expert", "gen": "generation expert", "vit": "ViT", "vae": "VAE"}
Peaks = dict[str, int]  # bytes by stage
Found = dict[tuple[str, str, str], Peaks]  # by request, weights and placement


@dataclass(frozen=True)
class Request:
    """One thing a user may ask. task: what decides the stages; width, height in pixels."""

    name: str
    task: str
    width: int
    height: int
    frames: int = 1

    def case(self, config: LanceConfig) -> Case:
        """What the request comes to in latent cells and, exactly, in ViT patches."""
        size, edit = f"{self.width}x{self.height}", self.task == "edit"
        vit, preset = vit_of(config), "video_480p" if self.frames > 1 else "image_768res"
        multiple = vit.patch_size * vit.spatial_merge_size
        wide, tall = preprocess.vit_size(self.width, self.height, preset, multiple)
        pairs = -(-self.frames // vit.temporal_patch_size)
        seen = (pairs, tall // vit.patch_size, wide // vit.patch_size)
        return replace(case_of(config, size, self.frames, edit=edit), seen=seen)


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


def build(part: str, config: LanceConfig, weights: str, device: str, joined: bool = True) -> nn.Module:
    """A part's module in COMPUTE, the experts' matrices in the format named; on a real device, of zeros.

    joined: see `joined.joined_in`.
    """
    if part in ("vit", "vae"):
        tower: Any = VisionTower if part == "vit" else WanVAE
        module: nn.Module = tower(getattr(config, part), device="meta", dtype=COMPUTE)
    else:
        expert = partial(
            Understanding if part == "und" else Generation, config.llm, device="meta", dtype=COMPUTE
        )
        form, names = FORMATS.get(weights), []
        if form is not None:
            matrices = expert(joined=False).named_parameters()
            layers = config.llm.num_layers
            names = [n for n, p in matrices if quantisable(n, layers) and form.fits(*p.shape)]

        def quantised(f: Format, linear: Any) -> QuantLinear:
            has_bias = linear.bias is not None
            return QuantLinear(f, linear.in_features, linear.out_features, has_bias, "meta", COMPUTE)

        formats = {name.removesuffix(".weight"): form for name in names if form is not None}
        module = swap(expert(joined=joined, apart=formats.keys()), formats, quantised)
    if device != "meta":
        fill(module, lambda _, name, p: torch.zeros(p.shape, dtype=p.dtype, device=device))
    return module.requires_grad_(False).eval()


def size_of(part: str, config: LanceConfig, weights: str = "bf16") -> int:
    """Bytes of a part's weights."""
    return sum(p.nbytes for p in build(part, config, weights, "meta").parameters())


def stream(module: nn.Module, device: str) -> None:
    """Copy a layer's weights to the device for each use and free them after, as ComfyUI's lowvram does."""
    away: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def bring(owner: nn.Module, *_: Any) -> None:
        away[owner] = dict(owner._parameters)
        for name, p in away[owner].items():
            if p is not None:
                owner._parameters[name] = nn.Parameter(p.to(device, copy=True), requires_grad=False)

    def leave(owner: nn.Module, *_: Any) -> None:
        owner._parameters.update(away.pop(owner))

    for owner in module.modules():
        if owner._parameters:
            owner.register_forward_pre_hook(bring)
            owner.register_forward_hook(leave)


# -- stages --------------------------------------------------------------------------------------------------


@dataclass
class Stages:
    """Runs stages and notes their peaks: {stage: bytes}, {stage: what was alive then}."""

    config: LanceConfig
    device: str
    weights: str = "bf16"
    place: str = "whole"
    peaks: Peaks = field(default_factory=dict)
    contents: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    @contextmanager
    def loaded(self, *parts: str) -> Iterator[tuple[Accountant | Peak, dict[str, Any]]]:
        """(peak counter, modules) with these parts, and nothing else, in memory."""
        lean = ("und",) if "gen" in parts else ()
        away = {"whole": (), "lean": lean, "streamed": parts}[self.place]
        meter = Peak(torch.device("cuda")) if self.device == "cuda" else Accountant(self.device)
        modules = {}
        for part in parts:
            home = "cpu" if part in away and self.device == "cuda" else self.device
            modules[part] = build(part, self.config, self.weights, home)
            if part in away:
                stream(modules[part], self.device)
            elif isinstance(meter, Accountant):
                meter.hold(f"weights of {part}", modules[part].parameters())
        with torch.inference_mode(), ExitStack() as entered:
            if isinstance(meter, Accountant):
                entered.enter_context(meter)
            yield meter, modules
        del modules
        free(torch.device(self.device))

    def note(self, meter: Accountant | Peak, stage: str, work: Callable[[], Any]) -> Any:
        """Run a stage and note its peak."""
        meter.reset()
        result = work()
        self.peaks[stage] = max(meter.read() or 0, self.peaks.get(stage, 0))
        self.contents[stage] = meter.at_peak if isinstance(meter, Accountant) else []
        return result

    def zeros(self, *shape: int, dtype: torch.dtype = COMPUTE) -> Tensor:
        """An input."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def picture(self, stage: str, name: str, case: Case, **options: Any) -> None:
        """The "vit", or the VAE's "encode" or "decode", over a picture or clip."""
        with self.loaded("vit" if name == "vit" else "vae") as (meter, modules):
            x = self.zeros(*case.input_shape(name, self.config))
            if name == "vit":
                work = partial(modules["vit"], x, [case.seen])
            else:
                work = partial(getattr(modules["vae"], name), x, **options)
            self.note(meter, stage, work)

    def generate(self, case: Case) -> None:
        """Both branches' context, then a guided step: one forward of two rows, and two forwards of one."""
        with self.loaded("und", "gen") as (meter, modules):
            model = self._decoder(modules)
            plan = Plan.of(case.sequence(self.config), self.config.tokens_per_second, guided=True)
            prepared = self.note(meter, "prefill", lambda: model.prefill(plan))
            both = [Row(prepared, branch) for branch in Branch]
            x = self.zeros(1, *case.grid, LATENT_CHANNELS, dtype=torch.float32)
            t = self.zeros(1, case.grid[0], dtype=torch.float32)
            self.note(
                meter, "step, 2 rows", lambda: model.velocity(both, torch.cat([x, x]), torch.cat([t, t]))
            )
            self.note(meter, "step, 1 row", lambda: [model.velocity([row], x, t) for row in both])

    def answer(self, case: Case) -> None:
        """Prefill of a question about a picture or clip, then a token."""
        with self.loaded("und") as (meter, modules):
            model = self._decoder(modules)
            sequence, rate = case.question(self.config), self.config.tokens_per_second
            context, _, at = self.note(meter, "prefill", lambda: model.read(sequence, rate, 256))
            following = TokenLoop(model, context, at)
            self.note(meter, "token", lambda: following(1))

    def _decoder(self, modules: dict[str, Any]) -> DualExpert:
        return DualExpert(
            self.config.llm, modules["und"], modules.get("gen"), dtype=COMPUTE, device=self.device
        )


@cache
def pictures(request: Request, config: LanceConfig, device: str, place: str) -> Stages:
    """The ViT's and the VAE's stages of a request, which do not depend on the experts' weights."""
    stages, case = Stages(config, device, place=place), request.case(config)
    if request.task in ("edit", "vqa"):
        stages.picture("vision tower", "vit", case)
    if request.task in ("edit", "i2v"):
        first = replace(case, frames=1) if request.task == "i2v" else case
        stages.picture("VAE encode", "encode", first)
    if request.task != "vqa":
        tile = min(TILE, (max(case.grid[1:]) + 1) // 2)  # what decoding falls back to
        stages.picture("VAE decode", "decode", case)
        stages.picture(f"VAE decode, tiles of {tile * CELL} px", "decode", case, tile=tile)
    return stages


def measure(
    request: Request,
    config: LanceConfig = RELEASED,
    device: str = "meta",
    weights: str = "bf16",
    place: str = "whole",
) -> Stages:
    """Peaks of all stages of one request, in the order they run."""
    stages, case = Stages(config, device, weights, place), request.case(config)
    beside = pictures(request, config, device, "streamed" if place == "streamed" else "whole")
    stages.answer(case) if request.task == "vqa" else stages.generate(case)
    every = beside.peaks | stages.peaks
    order = sorted(every, key=lambda s: (s.startswith("VAE decode"), s in stages.peaks))
    stages.peaks = {stage: every[stage] for stage in order}
    stages.contents |= beside.contents
    return stages


def run(args: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    """Every request whose name contains `args.only`, in every format and placement.

    Raises:
        RequestError: no such request, or no CUDA device where one is asked for.
    """
    chosen = [r for r in REQUESTS if args.only in r.name]
    if not chosen:
        names = "; ".join(r.name for r in REQUESTS)
        raise RequestError(f"no request's name contains {args.only!r}; there are: {names}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("torch sees no CUDA device; leave --device out, and tensors are counted instead")
    results, largest = [], {}
    todo = {f"{r.name}, {w}, {p}": (r, w, p) for r in chosen for w in WEIGHTS for p in PLACES}
    for request, weights, place in watched(todo, progress):
        stages = measure(request, RELEASED, args.device, weights, place)
        told = {"request": request.name, "weights": weights, "place": place}
        results.append(told | {"peaks": stages.peaks})
        if args.top and (weights, place) == ("bf16", "whole"):
            largest[request.name] = {s: summed(c)[: args.top] for s, c in stages.contents.items()}
    sizes = {w: {part: size_of(part, RELEASED, w) for part in PARTS} for w in WEIGHTS}
    return {
        "bench": "memory",
        "torch": torch.__version__,
        "device": args.device,
        "weights": sizes,
        "results": results,
        "largest": largest,
    }


def summed(contents: list[tuple[int, str]]) -> list[tuple[int, int, str]]:
    """(bytes, how many, what) of the things alive at a peak, equal ones together, the largest first."""
    found: dict[str, tuple[int, int]] = {}
    for size, label in contents:
        total, times = found.get(label, (0, 0))
        found[label] = (total + size, times + 1)
    return sorted(((total, times, label) for label, (total, times) in found.items()), reverse=True)


# -- telling -------------------------------------------------------------------------------------------------


def document(result: dict[str, Any]) -> list[Block]:
    """Weights, peaks and smallest cards by placement, stages, goals."""
    found = {(r["request"], r["weights"], r["place"]): r["peaks"] for r in result["results"]}
    names = list(dict.fromkeys(name for name, _, _ in found))
    how = "CUDA's allocator" if result["device"] == "cuda" else "every tensor counted on the meta device"
    blocks: list[Block] = [
        f"Peak memory by {how}, torch {result['torch'].split('+')[0]}; activations, ViT and VAE in bf16; "
        f"GB = 10^9 bytes.\nSmallest card: the peak and {RESERVE / 1e9:.0f} GB for CUDA itself fit (a card's "
        "GB are 2^30 bytes).",
        weights_table(result["weights"]),
        "Weights whole, guidance in one forward, VAE whole:",
        summary(found, names, "whole", False),
        "Weights whole, guidance in two forwards, VAE in tiles:",
        summary(found, names, "whole", True),
        "As before, understanding expert streamed while generating:",
        summary(found, names, "lean", True),
        "As before, all weights streamed:",
        summary(found, names, "streamed", True),
        "By stage:",
        by_stage(found, names),
    ]
    if len(names) == len(REQUESTS):
        blocks += ["Goals:", goals(found)]
    for name, seen in result["largest"].items():
        for stage, things in seen.items():
            lines = [f"{gigabytes(total, 2)} GB, {times} x {label}" for total, times, label in things]
            blocks += [f"{name}, {stage}: alive at the peak", Notes(lines)]
    return blocks


def needed(peaks: Peaks, thrifty: bool = False) -> int:
    """The request's peak; thrifty: guidance as two forwards and the VAE in tiles, as when memory is short."""
    fast = {"step, 1 row", *(stage for stage in peaks if "tiles" in stage)}
    skipped = {"step, 2 rows", "VAE decode"} if thrifty else fast
    return max(size for stage, size in peaks.items() if stage not in skipped)


def card(peak: int) -> str:
    """The smallest card that holds a peak and RESERVE."""
    return next((f"{gib} GB" for gib in CARDS if peak + RESERVE <= gib << 30), f"over {CARDS[-1]} GB")


def weights_table(sizes: dict[str, dict[str, int]]) -> Table:
    """Bytes of each part in each format."""
    return Table(
        ("weights", *sizes),
        [[f"{PART_NAMES[p]}, GB", *(gigabytes(sizes[w][p], 2) for w in sizes)] for p in PARTS],
    )


def summary(found: Found, requests: Iterable[str], place: str, thrifty: bool) -> Table:
    """Peak and smallest card of every request in one placement."""
    rows = []
    for name in requests:
        peaks = [needed(found[name, w, place], thrifty) for w in WEIGHTS]
        rows.append([name, *(f"{gigabytes(p)} ({card(p)})" for p in peaks)])
    return Table(("peak GB (smallest card)", *WEIGHTS), rows)


def by_stage(found: Found, requests: Iterable[str]) -> Table:
    """Every stage's peak, weights whole; and streamed in bf16."""
    rows = []
    for name in requests:
        for stage, streamed in found[name, "bf16", "streamed"].items():
            sizes = [found[name, w, "whole"][stage] for w in WEIGHTS]
            rows.append([name, stage, *map(gigabytes, (*sizes, streamed))])
    return Table(("request", "stage", *(f"{w}, GB" for w in WEIGHTS), "bf16 streamed, GB"), rows)


def goals(found: Found) -> Table:
    """Against what was wanted: two rows, one row, and with the understanding expert streamed."""
    rows = []
    for name, weights, goal in GOALS:
        whole, lean = found[name, weights, "whole"], found[name, weights, "lean"]
        ways = (needed(whole), needed(whole, True), needed(lean, True))
        cells = [f"{gigabytes(way)}{'' if way <= goal * 1e9 else ' (over)'}" for way in ways]
        rows.append([name, weights, f"{goal:.1f}", *cells])
    return Table(("request", "weights", "goal, GB", "as fast as can be", "thrifty", "thrifty, lean"), rows)
