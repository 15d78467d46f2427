"""The benchmark as one list: every kind of work the model does, ours against this device's limit and the
released procedure.

`full` holds the requests whose speed has a goal on a large GPU. `small` holds the same kinds of work cut
until a CPU of two cores is through in about ten minutes; what was cut is in the result. What a device cannot
do, or not within `patience` seconds, is a row that says why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..errors import RequestError
from ..model.dual_expert import DualExpert
from ..model.out_of_memory import OUT_OF_MEMORY
from ..vae.wan import WanVAE
from .case import Case, case_of, vae_of
from .device import free, free_memory
from .growth import fit, steadiness
from .measure import STEPS, Bench, limit
from .options import GROWTH, SMALL_LAYERS, SUITE_ROWS
from .report import seconds_text

PICTURES = ("encode", "decode")  # the kinds of rows that the VAE does
TURNS = 2  # of every measure at least, after warm-up


@dataclass(frozen=True)
class Row:
    """One kind of work. kind: "denoise" (30 steps), "prefill", "token", "encode" or "decode"."""

    name: str
    what: str
    kind: str
    width: int
    height: int
    frames: int = 1
    batch: int = 1
    edit: bool = False

    @property
    def size(self) -> str:
        """Pixels and frames."""
        return f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.frames > 1 else "")

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.what}, {self.size}"


@dataclass(frozen=True)
class Suite:
    """Rows, and where growth over latent frames is measured. layers: None for all that fit."""

    rows: tuple[Row, ...]
    growth: tuple[int, int]
    latent_frames: tuple[int, ...]
    layers: int | None


# What each row must reach on one H200-class GPU, in bfloat16, all layers: seconds at most, the others at
# least.
GOALS: dict[str, dict[str, float]] = {
    "t2i": {"seconds": 1.7, "share_of_matmul": 0.6},
    "t2i_batch4": {"share_of_matmul": 0.7},
    "t2v": {"seconds": 120},
    "prefill_edit": {"seconds": 0.08},
    "token": {"tokens_per_second": 450, "share_of_copy": 0.65},
    "decode_image": {"seconds": 0.06},
    "encode_image": {"seconds": 0.06},
    "decode_video": {"seconds": 6},
    "encode_video": {"seconds": 6},
}


def _rows(
    image: tuple[int, int],
    batch: tuple[int, int],
    video: tuple[int, int, int],
    picture: tuple[int, int],
    clip: tuple[int, int, int],
) -> tuple[Row, ...]:
    steps = f"{STEPS} guided steps"
    return (
        Row("t2i", f"text to image, {steps}", "denoise", *image),
        Row("t2i_batch4", f"text to image, batch 4, {steps}", "denoise", *batch, batch=4),
        Row("t2v", f"text to video, {steps}", "denoise", *video),
        Row("prefill_edit", "an edit's context, both branches", "prefill", *image, edit=True),
        Row("token", "a token of an answer", "token", *image),
        Row("decode_image", "VAE decode, image", "decode", *picture),
        Row("encode_image", "VAE encode, image", "encode", *picture),
        Row("decode_video", "VAE decode, video", "decode", *clip),
        Row("encode_video", "VAE encode, video", "encode", *clip),
    )


SUITES = {
    "full": Suite(
        _rows((768, 768), (768, 768), (480, 848, 121), (768, 768), (480, 848, 121)),
        (480, 848),
        (1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31),
        None,
    ),
    "small": Suite(
        _rows((256, 256), (128, 128), (128, 128, 17), (128, 128), (64, 64, 17)),
        (128, 128),
        (1, 4, 8, 12, 16, 20, 24, 28, 31),
        SMALL_LAYERS,
    ),
}
NAMES = (*SUITE_ROWS, GROWTH)


def run(
    bench: Bench, name: str, layers: int | None, skip: Iterable[str], context: int, patience: float
) -> dict[str, Any]:
    """Every row of a suite but those to `skip`.

    Args:
        name: of SUITES, or "auto": `full` on CUDA, else `small`.
        layers: to cut the decoder to; None as the suite says.
        context: tokens of the caption or question.
        patience: seconds; a row that would need longer is skipped, and so is one run of all steps.

    Raises:
        RequestError: no such suite, layers out of range, or too little memory for any row.
    """
    return _Run(bench, name, layers, set(skip), context, patience).result()


def compare(name: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """A measured row's goals, with what was reached of each. Where all steps ran, what a user waits for
    counts, not their sum.
    """
    reached = dict(entry)
    if entry.get("whole"):
        reached["seconds"] = entry["whole"]["seconds"]
        reached["share_of_matmul"] = entry["share_of_matmul"] * entry["seconds"] / reached["seconds"]
    return [
        {
            "what": what,
            "goal": goal,
            "reached": reached[what],
            "met": reached[what] <= goal if what == "seconds" else reached[what] >= goal,
        }
        for what, goal in GOALS[name].items()
    ]


class _Run:
    """One suite's run."""

    def __init__(
        self, bench: Bench, name: str, layers: int | None, skip: set[str], context: int, patience: float
    ) -> None:
        if name not in (*SUITES, "auto"):
            raise RequestError(f"there is no suite {name!r}, expected one of {', '.join((*SUITES, 'auto'))}")
        self.name = ("full" if bench.device.type == "cuda" else "small") if name == "auto" else name
        self.bench, self.suite, self.context, self.patience = bench, SUITES[self.name], context, patience
        self.rows = [row for row in self.suite.rows if row.name not in skip]
        self.growing = GROWTH not in skip
        decoder = [self.case(row) for row in self.rows if row.kind not in PICTURES]
        decoder += [self.grown(1)] if self.growing else []
        total = bench.config.llm.num_layers
        wanted = min(self.suite.layers, total) if layers is None and self.suite.layers else layers
        # The smallest request decides how many layers there are; a larger one that does not fit says so in
        # its row.
        smallest = min(decoder, key=lambda case: case.batch * case.tokens, default=None)
        self.layers, self.cut = bench.fitting([smallest], wanted) if smallest else (total, None)
        if layers is None and self.cut == "as asked":
            self.cut = "as the small suite has it"
        self.speed = bench.rates()
        self.llm = replace(bench.config.llm, num_layers=self.layers)

    def case(self, row: Row) -> Case:
        """A row's request."""
        config, size = self.bench.config, f"{row.width}x{row.height}"
        return case_of(config, size, row.frames, batch=row.batch, edit=row.edit, context=self.context)

    def grown(self, latent_frames: int) -> Case:
        """The request whose steps are measured over latent frames."""
        w, h = self.suite.growth
        return case_of(self.bench.config, f"{w}x{h}", 4 * latent_frames - 3, context=self.context)

    def result(self) -> dict[str, Any]:
        """Run everything; JSON-ready."""
        found = {row.name: self._entry(row) for row in self.rows}
        possible = [row for row in self.rows if not found[row.name]["skipped"]]
        decoder, pictures = (
            [row for row in possible if (row.kind in PICTURES) == picture] for picture in (False, True)
        )
        points = self._points() if self.growing else {}
        model = self.bench.decoder(self.layers) if decoder or None in points.values() else None
        for row in decoder:
            self._fill(found[row.name], row, model)
        growth = self._growth(points, model)
        del model
        free(self.bench.device)
        tower = self.bench.tower("vae") if pictures else None
        for row in pictures:
            self._fill(found[row.name], row, tower)
        del tower
        free(self.bench.device)
        return {
            "suite": self.name,
            "layers": (self.bench.config.llm.num_layers, self.layers, self.cut),
            "rates": self.speed,
            "rows": list(found.values()),
            "growth": growth,
        }

    # -- rows ------------------------------------------------------------------------------------------------

    def _entry(self, row: Row) -> dict[str, Any]:
        """A row before it is measured, and why it cannot be."""
        full = next(r for r in SUITES["full"].rows if r.name == row.name)
        entry = asdict(row) | {"title": row.title, "stands_for": None if row == full else full.size}
        return entry | {"skipped": self._hindrance(row), "goals": None}

    def _hindrance(self, row: Row) -> str | None:
        bench, case = self.bench, self.case(row)
        picture = row.kind in PICTURES
        if picture and bench.config.vae is None:
            return "the checkpoint has no VAE"
        if row.kind == "token" and bench.config.vit is None:
            return "the checkpoint has no vision tower"
        return self._too_large(row.kind, case) or self._too_slow(row.kind, case)

    def _too_large(self, kind: str, case: Case) -> str | None:
        bench, there = self.bench, free_memory(self.bench.device)
        if kind in PICTURES:
            vae = WanVAE(vae_of(bench.config), device="meta")
            need = float(bench.dtype.itemsize * sum(p.numel() for p in vae.parameters()))
            estimate = vae.memory_estimate_decode if kind == "decode" else vae.memory_estimate_encode
            need += estimate(case.input_shape(kind, bench.config), bench.dtype)
        else:
            need = bench.memory(case, self.layers)
        if need <= there:
            return None
        return f"needs about {need / 2**30:.1f} GiB and {there / 2**30:.1f} are free on {bench.device}"

    def _too_slow(self, kind: str, case: Case) -> str | None:
        price = self.bench.price("step" if kind == "denoise" else kind, case, self.llm)
        passes = (1 + TURNS) * (1 + self.bench.baseline)
        need = passes * limit(price, self.speed)
        if need <= self.patience:
            return None
        rate = self.speed["matmul"]["flops_per_second"] / 1e12
        return (
            f"would take at least {seconds_text(need)} here: {passes} passes of {price.flops / 1e12:.4g} "
            f"TFLOP at {rate:.3g} TFLOP/s; "
            f"--patience is {seconds_text(self.patience)}"
        )

    def _fill(self, entry: dict[str, Any], row: Row, model: Any) -> None:
        """Measure a row."""
        case = self.case(row)
        try:
            if row.kind in PICTURES:
                entry |= self.bench.picture(row.kind, case, model, self.speed)
            elif row.kind == "denoise":
                entry |= self._denoised(case, model)
            else:
                (found,) = self.bench.decoder_measures(case, model, [row.kind], self.speed).values()
                entry |= found
                if row.kind == "token":
                    entry["tokens_per_second"] = 1 / entry["seconds"]
        except OUT_OF_MEMORY as error:
            entry["skipped"] = f"out of memory on {self.bench.device}: {str(error).splitlines()[0]}"
            return
        finally:
            free(self.bench.device)
        entry["goals"] = self._against_goals(row.name, entry)

    def _denoised(self, case: Case, model: DualExpert) -> dict[str, Any]:
        """30 steps from the medians of guided and unguided ones; and in one run, where patience allows."""
        bench = self.bench
        measures = bench.decoder_measures(case, model, ["step"], self.speed)
        entry = bench.denoising(case, measures, extrapolated=False) | {"measures": measures}
        del entry["extrapolated"]  # here, what is made of all layers instead
        kept = ("working_bytes", "peak_bytes", "profile")
        entry |= {key: measures["step"][key] for key in kept if key in measures["step"]}
        if "baseline" in entry:
            entry["baseline"]["working_bytes"] = measures["step"]["baseline"]["working_bytes"]
        if "extrapolated" in measures["step"]:
            entry["extrapolated"] = bench.denoising(case, measures, extrapolated=True)
        if entry["seconds"] > self.patience:
            return entry | {"whole": None}
        whole = bench.whole(case, model)
        return entry | {"whole": whole | steadiness(whole)}

    def _against_goals(self, name: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Each goal with what was reached, or why they are not compared."""
        bench = self.bench
        reasons = {
            "not a GPU": bench.device.type != "cuda",
            "cut to a small size": self.name != "full",
            "not all layers": self.cut is not None,
            "not bfloat16": bench.dtype != torch.bfloat16,
        }
        why = next((reason for reason, holds in reasons.items() if holds), None)
        return {"compared": False, "why": why} if why else {"compared": True, "goals": compare(name, entry)}

    # -- growth ----------------------------------------------------------------------------------------------

    def _points(self) -> dict[int, str | None]:
        """Latent frames -> why their steps cannot be measured. Asked before the weights are there, which are
        part of what must fit.
        """
        cases = {frames: self.grown(frames) for frames in self.suite.latent_frames}
        return {
            f: self._too_large("denoise", case) or self._too_slow("denoise", case)
            for f, case in cases.items()
        }

    def _growth(self, hindrances: dict[int, str | None], model: DualExpert | None) -> dict[str, Any] | None:
        """Guided steps over latent frames, and a + b N + c N² through them; what cannot run says why."""
        if not hindrances:
            return None
        points, skipped = [], []
        bench = replace(self.bench, profile=False)
        for frames, hindrance in hindrances.items():
            if hindrance or model is None:
                skipped.append({"latent_frames": frames, "skipped": hindrance})
                continue
            case = self.grown(frames)
            measures = bench.decoder_measures(
                case, model, ["step"], self.speed, extrapolate=False, unguided=False
            )
            points.append({"latent_frames": frames, "tokens": case.tokens} | measures["step"])
            free(bench.device)
        w, h = self.suite.growth
        out: dict[str, Any] = {
            "width": w,
            "height": h,
            "layers": self.layers,
            "points": points,
            "skipped": skipped,
        }
        if len(points) > 3:
            tokens = [p["tokens"] for p in points]
            out["fit"] = fit(tokens, [p["seconds"] for p in points])
            if self.bench.baseline:
                out["baseline_fit"] = fit(tokens, [p["baseline"]["seconds"] for p in points])
        return out
