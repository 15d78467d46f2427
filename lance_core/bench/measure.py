"""Measuring the passes of one request after the other: random models, times, and times against what must be.

speed.py and suite.py decide what is measured; cost.py says what each pass must cost, released_decoder.py and
released_vae.py hold the procedure compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..checkpoint.checkpoint import Progress
from ..config import LATENT_CHANNELS, LanceConfig, LLMConfig
from ..errors import RequestError
from ..model.compiling import compile_layers
from ..model.decoder import FEED_CHUNK
from ..model.denoise import denoise
from ..model.dual_expert import DualExpert
from ..model.experts import Generation, Understanding
from ..model.plan import Plan
from ..model.sampler import Guidance, schedule
from ..model.sequence import Sequence
from ..model.side_stream import SideStream
from ..model.token_loop import TokenLoop
from ..model.vit import VisionTower
from ..text_generation import Chooser
from ..vae.wan import WanVAE
from . import cost
from .case import Case, noise, vae_of, vit_of
from .device import Meter, Peak, Stopwatch, cut_layers, free_memory, materialise, rates
from .profile import profile
from .released_decoder import Baseline
from .released_vae import BaselineVAE

STEPS = 30  # of the released schedule
# seconds: passes that must take so long are timed one at a time, waiting for the device being nothing to them
LONG = 0.1
CHUNKED = ("step", "step_unguided", "token")  # passes timed several at a time
Setup = Callable[[Any, int], Callable[[], object]]  # (version, passes a call) -> what is timed


@dataclass(frozen=True)
class Bench:
    """What is measured, on what, and how long. budget: see `Meter`; compile: see `pipeline.load`; side: see
    `decoder.run_layers`; profile: ours, too.
    """

    config: LanceConfig
    device: torch.device
    dtype: torch.dtype
    repeat: int
    baseline: bool
    progress: Progress | None = None
    budget: float | None = None
    compile: bool = False
    side: SideStream | None = None
    profile: bool = False

    def say(self, what: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(what, done, total)

    def rates(self) -> dict[str, Any]:
        """The device's measured matmul and copy rates."""
        self.say("matmul and copy rate", 0, 1)
        speed = rates(self.device, self.dtype)
        self.say("matmul and copy rate", 1, 1)
        return speed

    # -- building --------------------------------------------------------------------------------------------

    def memory(self, case: Case, layers: int) -> float:
        """Bytes that the decoder, cut to `layers`, needs for a case, weights included; about, and rather too
        many.
        """
        llm, size = self.config.llm, self.dtype.itemsize
        shared, rests = self.planned(case).lengths
        held = shared + sum(rests) + case.tokens  # keys and values of every layer
        rows, block = case.batch * (1 + case.guidance), max(case.tokens, shared + max(rests))
        # Of a token, in the feed-forward and around it.
        wide, stream = 3 * llm.intermediate_size * size, 8 * llm.hidden_size * size
        work = rows * block * stream + min(rows * block, FEED_CHUNK) * wide
        if self.baseline:
            held += sum(shared + rest for rest in rests)
            work = max(work, block * (2 * stream + wide))  # one row at a time, and all of its tokens
        each = size * (2 * cost.layer_weights(llm) + held * 2 * llm.num_kv_heads * llm.head_dim)
        return (2 * llm.vocab_size * llm.hidden_size * size + work + layers * each) / 0.9

    def fitting(self, cases: list[Case], layers: int | None) -> tuple[int, str | None]:
        """How many layers to measure: as many as asked, or as memory holds with every case's activations. And
        why not all.

        Raises:
            RequestError: more layers than there are, or memory for none.
        """
        total = self.config.llm.num_layers
        if layers is not None:
            checks.whole("layers", layers, 1, total)
            return layers, "as asked" if layers < total else None
        free = free_memory(self.device)
        count = next(
            (n for n in range(total, 0, -1) if max(self.memory(case, n) for case in cases) <= free), 0
        )
        if not count:
            raise RequestError(
                f"{free / 2**30:.1f} GiB are free on {self.device}, too few for one layer; ask for smaller "
                "sizes or a batch of 1"
            )
        return count, f"{free / 2**30:.1f} GiB free hold {count} layers of {total}" if count < total else None

    def decoder(self, layers: int, generation: bool = True) -> DualExpert:
        """Both experts (or understanding alone), `layers` deep, with random weights."""
        llm = replace(self.config.llm, num_layers=layers)

        def expert(done: int, kind: Callable[..., nn.Module]) -> Any:
            self.say("making random weights", done, 2)
            made = materialise(kind(llm, device="meta"), self.device, self.dtype)
            return compile_layers(made) if self.compile else made

        und, gen = expert(0, Understanding), expert(1, Generation) if generation else None
        self.say("making random weights", 2, 2)
        return DualExpert(llm, und, gen, dtype=self.dtype, device=self.device, side=self.side)

    def tower(self, part: str) -> nn.Module:
        """The "vit" or the "vae" with random weights."""
        tower: nn.Module
        if part == "vit":
            tower = VisionTower(vit_of(self.config), device="meta")
        else:
            tower = WanVAE(vae_of(self.config), device="meta")
        return materialise(tower, self.device, self.dtype)

    # -- measuring -------------------------------------------------------------------------------------------

    def decoder_measures(
        self,
        case: Case,
        model: DualExpert,
        wanted: list[str],
        speed: dict[str, Any],
        *,
        unguided: bool = True,
        extrapolate: bool = True,
    ) -> dict[str, Any]:
        """Those of DECODER that are wanted. unguided: a guided case's steps without guidance, too."""
        plan, found = self.planned(case), {}
        versions: dict[str, Any] = {"ours": model}
        if self.baseline:
            versions["baseline"] = Baseline(model)
        if extrapolate and model.config.num_layers < self.config.llm.num_layers:
            versions["no_layers"] = cut_layers(model, 0)
        setups: dict[str, Setup] = {}
        if "prefill" in wanted:
            name = "prefill_edit" if case.edit else "prefill_text"
            setups[name] = lambda version, _: partial(version.prefill, plan)
        if "step" in wanted:
            setups["step"] = partial(self._steps, plan=plan, case=case, guided=case.guidance)
            if case.guidance and unguided:
                setups["step_unguided"] = partial(self._steps, plan=plan, case=case, guided=False)
        if "token" in wanted:
            setups["token"] = partial(self._tokens, question=case.question(self.config))
        for name, setup in setups.items():
            found[name] = self._measure(name, case, versions, setup, speed, model.config)
        return found

    def picture(self, name: str, case: Case, model: Any, speed: dict[str, Any]) -> dict[str, Any]:
        """ "vit", or the VAE's "encode" or "decode"."""
        x = noise(*case.input_shape(name, self.config)).to(self.device, self.dtype)
        if name == "encode":
            x.clamp_(-1, 1)

        def setup(version: Any, _: int) -> Callable[[], object]:
            return partial(version, x, [case.seen]) if name == "vit" else partial(getattr(version, name), x)

        versions = {"ours": model}
        if self.baseline and name != "vit":
            versions["baseline"] = BaselineVAE(model)
        return self._measure(name, case, versions, setup, speed, self.config.llm)

    def _measure(
        self,
        name: str,
        case: Case,
        versions: dict[str, Any],
        setup: Setup,
        speed: dict[str, Any],
        llm: LLMConfig,
    ) -> dict[str, Any]:
        """One pass by every version: times, what it must cost, ratios, and what ours spends its time on."""
        self.say(f"{case.label}: {name}", 0, 1)
        price, meter = self.price(name, case, llm), self._meter()
        count = meter.chunk if name in CHUNKED and limit(price, speed) <= LONG else 1
        timed = meter({key: partial(setup, version, count) for key, version in versions.items()}, count)
        entry = timed["ours"] | against(price, timed["ours"]["seconds"], speed)
        if "baseline" in timed:
            entry["baseline"] = _ratio(timed["baseline"], entry)
        if "no_layers" in timed:
            full = self.price(name, case, self.config.llm)
            entry["extrapolated"] = self._extrapolated(timed, llm.num_layers, full, speed)
        if self.profile:
            entry["profile"] = profile(setup(versions["ours"], 1), self.device)
        self.say(f"{case.label}: {name}", 1, 1)
        return entry

    def _meter(self) -> Meter:
        return Meter(self.device, self.repeat, self.budget)

    def planned(self, case: Case) -> Plan:
        """How a generation case's contexts are computed."""
        return Plan.of(case.sequence(self.config), self.config.tokens_per_second, case.guidance)

    def price(self, name: str, case: Case, llm: LLMConfig) -> cost.Cost:
        """What one of MEASURES, or "step_unguided", must cost with a decoder of those sizes."""
        size = self.dtype.itemsize
        if name == "vit":
            return cost.vit(vit_of(self.config), case.seen, size)
        if name in ("encode", "decode"):
            return cost.vae(vae_of(self.config), case.grid, name == "decode", size)
        if name == "token":
            return cost.token(llm, sum(s.length for s in case.question(self.config).context), size)
        plan = self.planned(case)
        if name.startswith("prefill"):
            return cost.prefill(llm, plan, size)
        shared, rests = plan.lengths
        used = rests if name == "step" else rests[:1]
        return cost.step(llm, case.grid, [shared + rest for rest in used], case.batch, size)

    def _start(self, case: Case) -> Tensor:
        return noise(case.batch, *case.grid, LATENT_CHANNELS).to(self.device)

    def _steps(self, version: Any, count: int, plan: Plan, case: Case, guided: bool) -> Callable[[], Tensor]:
        """`count` denoising steps, guidance, renorm and solver included."""
        x, prepared = self._start(case), version.prefill(plan)
        times, guidance = schedule(STEPS)[: count + 1], Guidance() if guided else Guidance(1.0)
        if isinstance(version, Baseline):
            return partial(version.denoise, prepared, plan.sequence, x, times, guidance)
        return partial(denoise, version, prepared, x, times, guidance)

    def _tokens(self, version: Any, count: int, question: Sequence) -> Callable[[], None]:
        """`count` tokens decoded greedily, each going on from where the last call stopped."""
        rate = self.config.tokens_per_second
        following: Callable[[Any], Tensor]
        choose: Callable[[Tensor], Any]
        if isinstance(version, Baseline):
            state, logits = version.read(question, rate)
            following, choose = version.following(state), lambda logits: int(logits.argmax())
        else:
            room = self._meter().calls * count
            context, logits, position = version.read(question, rate, room)
            following = TokenLoop(version, context, position, self.compile and self.device.type == "cuda")
            choose = Chooser(0.0, 1.0, 0)
        token: Any = choose(logits)

        def decode() -> None:
            nonlocal token
            for _ in range(count):
                token = choose(following(token))

        return decode

    def whole(self, case: Case, model: DualExpert) -> dict[str, Any]:
        """All 30 steps in one run, each looked at: does anything grow on the way?

        Returns: `seconds` of the run; of every step `steps` (seconds), `guided`, `memory_bytes` in use after
        it, and on CUDA `allocations` made in it.
        """
        prepared, x, memory = model.prefill(self.planned(case)), self._start(case), Peak(self.device)
        times, guidance = schedule(STEPS), Guidance() if case.guidance else Guidance(1.0)
        steps: list[float] = []
        used: list[int | None] = []
        made: list[int] = []

        def step(i: int, total: int, _: Tensor) -> None:
            steps.append(watch.lap())
            used.append(memory.now())
            if self.device.type == "cuda":
                made.append(torch.cuda.memory_stats(self.device)["allocation.all.allocated"])
            self.say(f"{case.label}: {STEPS} steps", i, total)

        watch = Stopwatch(self.device)
        denoise(model, prepared, x, times, guidance, callback=step)
        return {
            "seconds": sum(steps),
            "steps": steps,
            "guided": [guidance.applies(t) for t in times[:-1]],
            "memory_bytes": used,
            "allocations": [b - a for a, b in pairwise(made)] or None,
        }

    # -- putting together ------------------------------------------------------------------------------------

    def _extrapolated(
        self, timed: dict[str, Any], layers: int, price: cost.Cost, speed: dict[str, Any]
    ) -> dict[str, Any]:
        """What `layers` took, as all layers would; what takes time without any is not multiplied."""
        fixed = timed["no_layers"]["seconds"]
        total = self.config.llm.num_layers

        def far(version: str) -> float:
            return fixed + max(timed[version]["seconds"] - fixed, 0) * total / layers

        seconds = far("ours")
        entry = {"layers": total, "seconds": seconds, "seconds_without_layers": fixed}
        entry |= against(price, seconds, speed)
        if "baseline" in timed:
            entry["baseline"] = {"seconds": far("baseline"), "ratio": far("baseline") / seconds}
        return entry

    def denoising(self, case: Case, measures: dict[str, Any], extrapolated: bool) -> dict[str, Any]:
        """A whole denoising put together from the medians of its steps, as measured or extrapolated to all
        layers.
        """
        guidance = Guidance() if case.guidance else Guidance(1.0)
        guided = sum(guidance.applies(t) for t in schedule(STEPS)[:-1])
        both = (measures["step"], measures.get("step_unguided", measures["step"]))
        with_, without = (m["extrapolated"] for m in both) if extrapolated else both

        def total(key: Callable[[dict[str, Any]], float]) -> float:
            return guided * key(with_) + (STEPS - guided) * key(without)

        seconds = total(lambda m: m["seconds"])
        bound = total(lambda m: m["limit_seconds"])
        entry: dict[str, Any] = {
            "steps": STEPS,
            "guided_steps": guided,
            "seconds": seconds,
            "flops": total(lambda m: m["flops"]),
            "limit_seconds": bound,
            "share_of_limit": bound / seconds,
            "share_of_matmul": total(lambda m: m["share_of_matmul"] * m["seconds"]) / seconds,
            "extrapolated": extrapolated,
        }
        if "baseline" in with_:
            entry["baseline"] = _ratio({"seconds": total(lambda m: m["baseline"]["seconds"])}, entry)
        return entry


def _ratio(slow: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The baseline's entry with how many times as long it took."""
    named = (("ratio", "seconds"), ("ratio_of_fastest", "fastest"))
    return slow | {key: slow[of] / ours[of] for key, of in named if of in slow}


def limit(price: cost.Cost, speed: dict[str, Any]) -> float:
    """Seconds a pass must take at the device's measured rates: the slower of arithmetic and reading."""
    return max(
        price.flops / speed["matmul"]["flops_per_second"], price.bytes / speed["copy"]["bytes_per_second"]
    )


def against(price: cost.Cost, seconds: float, speed: dict[str, Any]) -> dict[str, Any]:
    """What a pass must cost, set against the device's measured rates."""
    bound = limit(price, speed)
    return {
        "flops": price.flops,
        "bytes": price.bytes,
        "share_of_matmul": price.flops / speed["matmul"]["flops_per_second"] / seconds,
        "share_of_copy": price.bytes / speed["copy"]["bytes_per_second"] / seconds,
        "limit_seconds": bound,
        "share_of_limit": bound / seconds,
    }
