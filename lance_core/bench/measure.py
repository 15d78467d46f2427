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

from ..checkpoint.checkpoint import Progress
from ..config import LATENT_CHANNELS, LanceConfig, LLMConfig
from ..errors import RequestError
from ..inputs import tasks
from ..model.decoder import FEED_CHUNK, compile_layers, join
from ..model.denoise import denoise
from ..model.dual_expert import DualExpert, Generation, Plan, Understanding
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
Price = Callable[[LLMConfig], cost.Cost]


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
        shared, rests = self.planned(case)[1].lengths
        held = shared + sum(rests) + case.tokens  # keys and values of every layer
        rows, block = case.batch * (1 + case.guidance), max(case.tokens, shared + max(rests))
        wide, stream = (
            3 * llm.intermediate_size * size,
            8 * llm.hidden_size * size,
        )  # of a token, in the feed-forward and around it
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
            tasks.check_count("layers", layers, 1, total)
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
            made = materialise(join(kind(llm, device="meta")), self.device, self.dtype)
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
        llm, size = model.config, self.dtype.itemsize
        sequence, plan = self.planned(case)
        versions: dict[str, DualExpert | Baseline] = {"ours": model}
        if self.baseline:
            versions["baseline"] = Baseline(model)
        if extrapolate and llm.num_layers < self.config.llm.num_layers:
            versions["no_layers"] = cut_layers(model, 0)
        meter, out = self._meter(), {}

        def measure(name: str, price: Price, setup: Callable[[Any, int], Callable[[], object]]) -> None:
            """setup: (version, how many to run a call) -> what is timed."""
            self.say(f"{case.label}: {name}", 0, 1)
            alone = name.startswith("prefill") or limit(price(llm), speed) > LONG
            count = 1 if alone else meter.chunk
            timed = meter({key: partial(setup, v, count) for key, v in versions.items()}, count)
            entry = self._decoder_entry(timed, price, llm, speed)
            out[name] = entry | self._profiled(partial(setup, model, 1))
            self.say(f"{case.label}: {name}", 1, 1)

        if "prefill" in wanted:
            measure(
                "prefill_edit" if case.edit else "prefill_text",
                lambda c: cost.prefill(c, plan, size),
                lambda version, _: partial(_prefill, version, sequence, plan),
            )
        steps = {"step": case.guidance} if "step" in wanted else {}
        if steps and case.guidance and unguided:
            steps["step_unguided"] = False
        for name, guided in steps.items():
            step = partial(self._steps, sequence=sequence, plan=plan, case=case, guided=guided)
            measure(name, partial(self.step_cost, case=case, plan=plan, guided=guided), step)
        if "token" in wanted:
            question = case.question(self.config)
            length = sum(s.length for s in question.context)
            room = meter.calls * meter.chunk
            measure(
                "token",
                lambda c: cost.token(c, length, size),
                partial(self._tokens, question=question, room=room),
            )
        return out

    def _meter(self) -> Meter:
        return Meter(self.device, self.repeat, self.budget)

    def planned(self, case: Case) -> tuple[Sequence, Plan]:
        """A generation case's sequence and how its contexts are computed."""
        sequence = case.sequence(self.config)
        return sequence, Plan.of(sequence, self.config.tokens_per_second, case.guidance)

    def step_cost(self, llm: LLMConfig, case: Case, plan: Plan, guided: bool) -> cost.Cost:
        """What a denoising step must cost."""
        contexts = [plan.lengths[0] + rest for rest in plan.lengths[1]]
        used = contexts if guided else contexts[:1]
        return cost.step(llm, case.grid, used, case.batch, self.dtype.itemsize)

    def _start(self, case: Case) -> Tensor:
        return noise(case.batch, *case.grid, LATENT_CHANNELS).to(self.device)

    def _steps(
        self, version: Any, count: int, sequence: Sequence, plan: Plan, case: Case, guided: bool
    ) -> Callable[[], Tensor]:
        """`count` denoising steps, guidance, renorm and solver included."""
        x, prepared = self._start(case), _prefill(version, sequence, plan)
        times, guidance = schedule(STEPS)[: count + 1], Guidance() if guided else Guidance(1.0)
        if isinstance(version, Baseline):
            return partial(version.denoise, prepared, sequence, x, times, guidance)
        return partial(denoise, version, prepared, x, times, guidance)

    def _tokens(self, version: Any, count: int, question: Sequence, room: int) -> Callable[[], None]:
        """`count` tokens decoded greedily, each going on from where the last call stopped."""
        rate = self.config.tokens_per_second
        following: Callable[[Any], Tensor]
        choose: Callable[[Tensor], Any]
        if isinstance(version, Baseline):
            state, logits = version.read(question, rate)
            following, choose = version.following(state), lambda logits: int(logits.argmax())
        else:
            context, logits, position = version.read(question, rate, room)
            following = TokenLoop(version, context, position, self.compile and self.device.type == "cuda")
            choose = Chooser(0.0, 1.0, 0)
        token: Any = choose(logits)

        def decode() -> None:
            nonlocal token
            for _ in range(count):
                token = choose(following(token))

        return decode

    def picture(self, name: str, case: Case, model: Any, speed: dict[str, Any]) -> dict[str, Any]:
        """ "vit", or the VAE's "encode" or "decode"."""
        self.say(f"{case.label}: {name}", 0, 1)
        x = noise(*case.input_shape(name, self.config)).to(self.device, self.dtype)
        if name == "encode":
            x.clamp_(-1, 1)
        calls: dict[str, Callable[[], object]] = {
            "ours": partial(model, x, [case.seen]) if name == "vit" else partial(getattr(model, name), x)
        }
        if self.baseline and name != "vit":
            calls["baseline"] = partial(getattr(BaselineVAE(model), name), x)
        timed = self._meter()({key: partial(lambda call: call, call) for key, call in calls.items()})
        entry = timed["ours"] | against(self.picture_cost(name, case), timed["ours"]["seconds"], speed)
        if "baseline" in timed:
            entry["baseline"] = _ratio(timed["baseline"], entry)
        self.say(f"{case.label}: {name}", 1, 1)
        return entry | self._profiled(lambda: calls["ours"])

    def _profiled(self, setup: Callable[[], Callable[[], object]]) -> dict[str, Any]:
        """What of ours the time goes to, if that was asked for."""
        return {"profile": profile(setup(), self.device)} if self.profile else {}

    def picture_cost(self, name: str, case: Case) -> cost.Cost:
        """What `picture` must cost."""
        size = self.dtype.itemsize
        if name == "vit":
            return cost.vit(vit_of(self.config), case.seen, size)
        return cost.vae(vae_of(self.config), case.grid, name == "decode", size)

    def whole(self, case: Case, model: DualExpert) -> dict[str, Any]:
        """All 30 steps in one run, each looked at: does anything grow on the way?

        Returns: `seconds` of the run; of every step `steps` (seconds), `guided`, `memory_bytes` in use after
        it, and on CUDA `allocations` made in it.
        """
        sequence, plan = self.planned(case)
        prepared, x, memory = _prefill(model, sequence, plan), self._start(case), Peak(self.device)
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

    def _decoder_entry(
        self, timed: dict[str, Any], price: Price, llm: LLMConfig, speed: dict[str, Any]
    ) -> dict[str, Any]:
        entry = timed["ours"] | against(price(llm), timed["ours"]["seconds"], speed)
        full = self.config.llm
        if "baseline" in timed:
            entry["baseline"] = _ratio(timed["baseline"], entry)
        if "no_layers" in timed:
            fixed = timed["no_layers"]["seconds"]
            scale = full.num_layers / llm.num_layers
            seconds = fixed + max(entry["seconds"] - fixed, 0) * scale
            entry["extrapolated"] = {
                "layers": full.num_layers,
                "seconds": seconds,
                "seconds_without_layers": fixed,
            }
            entry["extrapolated"] |= against(price(full), seconds, speed)
            if "baseline" in timed:
                slow = fixed + max(timed["baseline"]["seconds"] - fixed, 0) * scale
                entry["extrapolated"]["baseline"] = {"seconds": slow, "ratio": slow / seconds}
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


def _prefill(version: DualExpert | Baseline, sequence: Sequence, plan: Plan) -> Any:
    return version.prefill(sequence, plan) if isinstance(version, Baseline) else version.prefill(plan)


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
