"""How fast the model is on this device, against what the device can do and, if asked, against the released code's procedure.

Everything is measured in one run with random weights: speed does not depend on them, and nothing has to be downloaded. A
decoder cut to fewer layers gives times for all of them only by extrapolation, which is always labelled so.
bench_cost.py holds what each pass must cost, bench_baseline.py the procedure compared with; this module builds, times
and tabulates. It returns results and never prints.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import bench_cost as cost
from . import request
from .bench_baseline import Baseline
from .bench_case import Case, case_of, noise
from .bench_report import report
from .bench_tools import Meter, cut_layers, device_of, free_memory, machine, materialise, rates
from .checkpoint import Checkpoint, Progress
from .config import LATENT_CHANNELS, RELEASED_LLM, RELEASED_VAE, RELEASED_VIT, LanceConfig, LLMConfig
from .errors import RequestError
from .model import DualExpert, Generation, Plan, Prepared, Understanding
from .pipeline import Lance
from .sampler import Guidance, schedule
from .sequence import Sequence
from .vae import WanVAE
from .vit import VisionTower

__all__ = ["add_arguments", "report", "run"]

FORMAT = 1  # of the JSON
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MEASURES = ("step", "prefill", "token", "vit", "encode", "decode")
DECODER = ("step", "prefill", "token")
STEPS = 30  # of the released schedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument("--model", default="released", help="`released`, or a checkpoint folder whose sizes to take; weights are random")
    parser.add_argument("--size", nargs="+", default=["768x768"], metavar="WxH", help="pixels; several are measured one after the other")
    parser.add_argument("--frames", nargs="+", type=int, default=[1], help="video frames; several are measured one after the other")
    parser.add_argument("--layers", type=int, help="cut the decoder to so many layers (default: all, or as many as memory holds)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--no-guidance", dest="guidance", action="store_false", help="no unconditional branch")
    parser.add_argument("--context", type=int, default=100, metavar="TOKENS", help="length of the caption or question")
    parser.add_argument("--edit", action="store_true", help="an edit's context: ViT block and clean latent of the same size too")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each measure, after warm-up; the median counts")
    parser.add_argument("--skip", nargs="+", default=[], metavar="WHAT", help=f"leave out some of {', '.join(MEASURES)}")
    parser.add_argument("--baseline", action="store_true", help="also time the released code's procedure, for the ratio")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON too")


def run(args: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    """Measure everything that was asked for.

    Args:
        args: from a parser that `add_arguments` has filled.
        progress: (what, done, total).

    Returns: JSON-ready; also written to `args.output`.

    Raises:
        RequestError: an option out of range, or a device or memory that is not there.
        CheckpointError: `--model` is neither `released` nor a checkpoint.
    """
    device, dtype = device_of(args.device), DTYPES.get(args.dtype)
    if dtype is None:
        raise RequestError(f"dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}")
    unknown = sorted(set(args.skip) - set(MEASURES))
    if unknown:
        raise RequestError(f"there is no measure {unknown[0]!r} to skip; expected some of {', '.join(MEASURES)}")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise RequestError(f"{args.output} cannot be written: its folder does not exist")
    request.check_count("repeat", args.repeat, 1, 10_000)
    config = _config(args.model)
    wanted = [m for m in MEASURES if m not in args.skip and getattr(config, {"vit": "vit", "encode": "vae", "decode": "vae"}.get(m, "llm"))]
    cases = [case_of(args, config, size, frames) for size in args.size for frames in args.frames]
    with torch.inference_mode():
        bench = _Bench(config, device, dtype, wanted, args.repeat, args.baseline, progress)
        result = bench.run(cases, args.layers)
    result["model"] = {"name": args.model} | result["model"]
    result = json.loads(json.dumps(result))  # as a reader of the file will find it: lists, no tuples
    if args.output:
        try:
            Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{args.output} cannot be written: {error.strerror}") from None
    return result


def _config(name: str) -> LanceConfig:
    if name == "released":
        return LanceConfig(RELEASED_LLM, RELEASED_VIT, RELEASED_VAE, "video")
    return Checkpoint(name).config


class _Engine(Lance):
    """`Lance.denoise` over a model that no checkpoint backs."""

    def __init__(self, model: DualExpert) -> None:
        self.model, self.progress, self._parts = model, None, {}

    def experts(self, generation: bool = True) -> DualExpert:
        return self.model


@dataclass(frozen=True)
class _Bench:
    """One run: what is measured, on what."""

    config: LanceConfig
    device: torch.device
    dtype: torch.dtype
    wanted: list[str]
    repeat: int
    baseline: bool
    progress: Progress | None

    def run(self, cases: list[Case], layers: int | None) -> dict[str, Any]:
        llm = self.config.llm
        if layers is not None:
            request.check_count("layers", layers, 1, llm.num_layers)
        measured, reason = (layers, "as asked") if layers else self._fitting(cases)
        meter = Meter(self.device, self.repeat)
        self._report("matmul and copy rate", 0, 1)
        speed = rates(self.device, self.dtype)
        self._report("matmul and copy rate", 1, 1)
        found: list[dict[str, Any]] = [{} for _ in cases]
        if set(DECODER) & set(self.wanted):
            model = self._decoder(measured, any(c.edit for c in cases))
            for case, measures in zip(cases, found, strict=True):
                measures |= self._decoder_measures(case, model, meter, speed)
            del model
            gc.collect()
        for part in ("vit", "vae"):
            names = {"vit": ("vit",), "vae": ("encode", "decode")}[part]
            if not set(names) & set(self.wanted):
                continue
            tower = materialise(
                {"vit": VisionTower, "vae": WanVAE}[part](getattr(self.config, part), device="meta"), self.device, self.dtype
            )
            for case, measures in zip(cases, found, strict=True):
                measures |= {name: self._picture(name, case, tower, meter, speed) for name in names if name in self.wanted}
            del tower
            gc.collect()
        return {
            "format": FORMAT,
            "environment": machine(self.device, self.dtype),
            "model": {
                "layers": llm.num_layers,
                "layers_measured": measured,
                "cut": None if measured == llm.num_layers else reason,
                "weights": "random",
                "llm": asdict(llm),
            },
            "rates": speed,
            "repeat": self.repeat,
            "cases": [self._summary(case, m, speed, measured) for case, m in zip(cases, found, strict=True)],
        }

    # -- building -----------------------------------------------------------------------------------------------

    def _fitting(self, cases: list[Case]) -> tuple[int, str]:
        """As many layers as memory holds with every case's activations, and why not more."""
        llm, size = self.config.llm, self.dtype.itemsize
        rows = max(c.batch * (1 + c.guidance) * (c.grid[0] * c.grid[1] * c.grid[2] + c.context) for c in cases)
        work = rows * (3 * llm.intermediate_size * size + 12 * llm.hidden_size * 4)
        tokens = 4 * rows  # of contexts: the target, a clean latent and a ViT block of its size, the baseline's copies
        each = size * (2 * cost.layer_weights(llm) + tokens * 2 * llm.num_kv_heads * llm.head_dim)
        free = free_memory(self.device)
        room = (0.9 * free - 2 * llm.vocab_size * llm.hidden_size * size - work) / each
        count = int(min(room, llm.num_layers))
        if count < 1:
            raise RequestError(
                f"{free / 2**30:.1f} GiB are free on {self.device}, too few for one layer; ask for smaller sizes or a batch of 1"
            )
        return count, f"{free / 2**30:.1f} GiB free hold {count} layers of {llm.num_layers}"

    def _decoder(self, layers: int, edit: bool) -> DualExpert:
        llm = replace(self.config.llm, num_layers=layers)
        self._report("making random weights", 0, 2)
        und = materialise(Understanding(llm, device="meta"), self.device, self.dtype)
        self._report("making random weights", 1, 2)
        needed = "step" in self.wanted or edit
        gen = materialise(Generation(llm, device="meta"), self.device, self.dtype) if needed else None
        self._report("making random weights", 2, 2)
        return DualExpert(llm, und, gen, dtype=self.dtype, device=self.device)

    # -- measuring ----------------------------------------------------------------------------------------------

    def _decoder_measures(self, case: Case, model: DualExpert, meter: Meter, speed: dict[str, Any]) -> dict[str, Any]:
        llm, rate = model.config, self.config.tokens_per_second
        sequence = case.sequence(self.config)
        plan = Plan.of(sequence, rate, case.guidance)
        shared, rests = plan.lengths
        contexts = [shared + n for n in rests]
        versions: dict[str, DualExpert | Baseline] = {"ours": model}
        if self.baseline:
            versions["baseline"] = Baseline(model)
        if llm.num_layers < self.config.llm.num_layers:
            versions["no_layers"] = cut_layers(model, 0)
        out = {}

        def measure(name: str, setup: Callable[[Any], Callable[[], object]], price: Callable[[LLMConfig], cost.Cost], per: int = 1) -> None:
            self._report(f"{case.label}: {name}", 0, 1)
            timed = meter({key: lambda v=v: setup(v) for key, v in versions.items()}, per)
            out[name] = self._decoder_entry(timed, price, llm, speed)
            self._report(f"{case.label}: {name}", 1, 1)

        if "prefill" in self.wanted:
            measure(
                "prefill_edit" if case.edit else "prefill_text",
                lambda v: lambda: _prefill(v, sequence, plan),
                lambda c: cost.prefill(c, plan, self.dtype.itemsize),
            )
        if "step" in self.wanted:
            for name, guided in (("step", case.guidance), ("step_unguided", False)):
                if name == "step_unguided" and not case.guidance:
                    continue
                measure(
                    name,
                    lambda v, guided=guided: self._steps(v, sequence, plan, case, guided, meter.chunk),
                    lambda c, guided=guided: cost.step(c, case.grid, contexts[: 1 + guided], case.batch, self.dtype.itemsize),
                    meter.chunk,
                )
        if "token" in self.wanted:
            question = case.question(self.config)
            length = sum(s.length for s in question.context)
            room = meter.calls * meter.chunk
            measure(
                "token",
                lambda v: self._tokens(v, question, room, meter.chunk),
                lambda c: cost.token(c, length, self.dtype.itemsize),
                meter.chunk,
            )
        return out

    def _steps(self, version: Any, sequence: Sequence, plan: Plan, case: Case, guided: bool, count: int) -> Callable[[], Tensor]:
        """`count` denoising steps, guidance, renorm and solver included."""
        x = noise(case.batch, *case.grid, LATENT_CHANNELS).to(self.device)
        times, guidance = schedule(STEPS)[: count + 1], Guidance() if guided else Guidance(1.0)
        prepared = _prefill(version, sequence, plan)
        if isinstance(version, Baseline):
            return lambda: version.denoise(prepared, sequence, x, times, guidance)
        engine = _Engine(version)
        return lambda: engine.denoise(prepared, x, times, guidance)

    def _tokens(self, version: Any, question: Sequence, room: int, count: int) -> Callable[[], int]:
        """`count` tokens decoded greedily, each going on from where the last call stopped."""
        rate = self.config.tokens_per_second
        if isinstance(version, Baseline):
            state, logits = version.read(question, rate)
            position = 1
        else:
            state, logits, position = version.read(question, rate, room)
        last = [int(logits.argmax()), position]

        def decode() -> int:
            for _ in range(count):
                last[0] = int(version.next_token(state, last[0], last[1]).argmax())
                last[1] += 1
            return last[0]

        return decode

    def _picture(self, name: str, case: Case, model: Any, meter: Meter, speed: dict[str, Any]) -> dict[str, Any]:
        """The ViT or the VAE one way."""
        self._report(f"{case.label}: {name}", 0, 1)
        t, h, w = case.grid
        if name == "vit":
            c, count = self.config.vit, case.seen[0] * case.seen[1] * case.seen[2]
            x = noise(count, c.in_channels * c.temporal_patch_size * c.patch_size**2).to(self.device, self.dtype)
            price, call = cost.vit(c, case.seen, self.dtype.itemsize), lambda: model(x, [case.seen])
        else:
            decode = name == "decode"
            shape = (1, LATENT_CHANNELS, t, h, w) if decode else (1, 3, case.frames, case.height, case.width)
            x = noise(*shape).to(self.device, self.dtype)
            price = cost.vae(self.config.vae, case.grid, decode, self.dtype.itemsize)
            call = (lambda: model.decode(x)) if decode else (lambda: model.encode(x.clamp(-1, 1)))
        entry = self._entry(meter({"ours": lambda: call})["ours"], price, speed)
        self._report(f"{case.label}: {name}", 1, 1)
        return entry

    # -- telling ------------------------------------------------------------------------------------------------

    def _entry(self, timed: dict[str, Any], price: cost.Cost, speed: dict[str, Any]) -> dict[str, Any]:
        return timed | _against(price, timed["seconds"], speed)

    def _decoder_entry(
        self, timed: dict[str, Any], price: Callable[[LLMConfig], cost.Cost], llm: LLMConfig, speed: dict[str, Any]
    ) -> dict[str, Any]:
        entry = self._entry(timed["ours"], price(llm), speed)
        full = self.config.llm
        if "baseline" in timed:
            slow = timed["baseline"]
            entry["baseline"] = slow | {key: slow[of] / entry[of] for key, of in (("ratio", "seconds"), ("ratio_of_fastest", "fastest"))}
        if "no_layers" in timed:
            fixed = timed["no_layers"]["seconds"]
            scale = full.num_layers / llm.num_layers
            seconds = fixed + max(entry["seconds"] - fixed, 0) * scale
            entry["extrapolated"] = {"layers": full.num_layers, "seconds": seconds, "seconds_without_layers": fixed}
            entry["extrapolated"] |= _against(price(full), seconds, speed)
            if "baseline" in timed:
                slow = fixed + max(timed["baseline"]["seconds"] - fixed, 0) * scale
                entry["extrapolated"]["baseline"] = {"seconds": slow, "ratio": slow / seconds}
        return entry

    def _summary(self, case: Case, measures: dict[str, Any], speed: dict[str, Any], layers: int) -> dict[str, Any]:
        """The case, its measures, and a whole denoising put together from its steps."""
        entry: dict[str, Any] = asdict(case) | {"measures": measures}
        if "step" in measures:
            guidance = Guidance() if case.guidance else Guidance(1.0)
            guided = sum(guidance.applies(t) for t in schedule(STEPS)[:-1])
            whole = [m.get("extrapolated", m) for m in (measures["step"], measures.get("step_unguided", measures["step"]))]
            seconds, limit = (guided * whole[0][key] + (STEPS - guided) * whole[1][key] for key in ("seconds", "limit_seconds"))
            entry["denoising"] = {
                "steps": STEPS,
                "guided_steps": guided,
                "seconds": seconds,
                "flops": guided * whole[0]["flops"] + (STEPS - guided) * whole[1]["flops"],
                "limit_seconds": limit,
                "share_of_limit": limit / seconds,
                "extrapolated": layers < self.config.llm.num_layers,
            }
        return entry

    def _report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)


def _prefill(version: DualExpert | Baseline, sequence: Sequence, plan: Plan) -> Any:
    return version.prefill(sequence, plan) if isinstance(version, Baseline) else version.fill(Prepared(sequence, plan))


def _against(price: cost.Cost, seconds: float, speed: dict[str, Any]) -> dict[str, Any]:
    """What a pass must cost, set against the device's measured rates. The limit is the slower of arithmetic and reading."""
    arithmetic = price.flops / speed["matmul"]["flops_per_second"]
    reading = price.bytes / speed["copy"]["bytes_per_second"]
    limit = max(arithmetic, reading)
    return {
        "flops": price.flops,
        "bytes": price.bytes,
        "share_of_matmul": arithmetic / seconds,
        "share_of_copy": reading / seconds,
        "limit_seconds": limit,
        "share_of_limit": limit / seconds,
    }
