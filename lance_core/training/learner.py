"""What is trained and by what: experts with adapters (or all their weights), an optimiser, and one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.loading import Progress
from ..errors import NumericsError, RequestError
from ..model.experts import Generation, Understanding
from . import lora, optimizer, parallel, sharding
from .full import CastOps
from .objective import CE_WEIGHT, MSE_WEIGHT, Loss, loss
from .passes import Experts
from .sample import Sample
from .settings import Settings

FROZEN = ("embed_tokens.weight", "lm_head.weight")  # in full training, too


@dataclass(frozen=True, eq=False)
class Item:
    """A sample of a step with its draws, and its row's name for messages."""

    name: str
    sample: Sample
    noise: Tensor | None
    time: float | None


@dataclass(frozen=True)
class Result:
    """A step's or a validation's means over all its tokens; None of a kind it had none of. gpu_gb: the most
    GPU memory used so far.
    """

    loss: float
    ce: float | None
    mse: float | None
    tokens: int
    grad_norm: float = 0.0
    lr: float = 0.0
    gpu_gb: float = 0.0


class Learner:
    """Experts in training.

    adapters: by name, empty in full training. weights: what the optimiser moves, by name.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        RequestError: full training of quantised weights, or an optimiser that is not installed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        dtype: torch.dtype,
        device: torch.device,
        generation: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings
        self.experts = load_experts(checkpoint, settings.full, dtype, device, generation, progress)
        self.adapters: dict[str, lora.LoraLinear] = {}
        self.padding: list[tuple[Sample, Tensor | None, float | None]] = []
        if settings.full:
            if parallel.world() > 1:
                _check_shares(settings.batch, self.experts)
                sharding.shard(self.experts)
                self.padding = sharding.padding(checkpoint.tokenizer)
            self.weights = whole_weights(self.experts, settings.experts)
        else:
            self.adapters = lora.attach(
                self.experts,
                settings.experts,
                settings.rank,
                float(settings.alpha or settings.rank),
                settings.targets,
                settings.seed,
            )
            self.weights = lora.trained(self.adapters)
        self.optimizer = optimizer.optimizer(self.weights, settings.optimizer, settings.as_released)
        self.schedule = optimizer.Schedule(
            settings.rate,
            settings.schedule,
            settings.warmup,
            settings.steps,
            as_released=settings.as_released,
        )
        self.average = optimizer.Average(settings.ema) if settings.ema else None

    def step(self, number: int, items: Sequence[Item]) -> Result:
        """One optimiser step on this rank's share of it.

        Raises:
            NumericsError: NaN or infinity in the loss or its gradients; nothing was changed.
        """
        totals = self._totals(items)
        sums = [0.0, 0.0]
        for part in self._passes(items):
            found = self._loss(part, totals, parallel.world())
            if not bool(torch.isfinite(found.total)):
                raise NumericsError(_not_finite("the loss", number, part))
            found.total.backward()
            sums = [a + b for a, b in zip(sums, found.sums, strict=True)]
        if not self.sharded:  # sharded ones are averaged already
            parallel.average_gradients(self.weights)
        lr = self.schedule.at(number)
        norm = float(optimizer.gradient_norm(self.weights))
        if not norm < float("inf"):  # NaN is not, either
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericsError(_not_finite("a gradient", number, items))
        optimizer.step(self.optimizer, self.weights, lr, self.settings.clip)
        if self.average is not None:
            self.average.update(self.weights)
        tokens = int(parallel.summed(float(sum(i.sample.length for i in items)), device=self._device)[0])
        return _result(parallel.summed(*sums, device=self._device), totals, tokens, norm, lr)

    @torch.no_grad()
    def measure(self, items: Sequence[Item]) -> Result:
        """The loss of held-out rows; nothing is changed."""
        totals, sums = self._totals(items), [0.0, 0.0]
        for part in self._passes(items):
            found = self._loss(part, totals, 1)
            sums = [a + b for a, b in zip(sums, found.sums, strict=True)]
        tokens = sum(i.sample.length for i in items)
        return _result(parallel.summed(*sums, device=self._device), totals, tokens)

    @property
    def sharded(self) -> bool:
        """Whether the weights are divided among the processes."""
        return bool(self.padding)

    @property
    def _device(self) -> torch.device | str:
        return self.experts.device

    def _loss(self, part: Sequence[Item], totals: tuple[float, ...], world: int) -> Loss:
        listed = [(i.sample, i.noise, i.time) for i in part] + self.padding
        samples, noise, times = zip(*listed, strict=True)
        return loss(
            self.experts,
            samples,
            noise,
            times,
            as_released=self.settings.as_released,
            totals=(totals[0], totals[1]),
            world=world,
            padding=len(self.padding),
        )

    def _totals(self, items: Sequence[Item]) -> tuple[float, ...]:
        """Tokens with a loss in the whole step, of each kind, of all ranks."""
        counts = [i.sample.loss_tokens for i in items]
        own = [float(sum(c[kind] for c in counts)) for kind in (0, 1)]
        return parallel.summed(*own, device=self._device)

    def _passes(self, items: Sequence[Item]) -> list[list[Item]]:
        """The items in passes of at most `max_tokens` tokens, or of one item."""
        passes: list[list[Item]] = []
        room = 0
        for item in items:
            if not passes or item.sample.length > room:
                passes.append([])
                room = self.settings.max_tokens
            passes[-1].append(item)
            room -= item.sample.length
        if self.sharded:
            most = parallel.largest(len(passes), self._device)
            passes += [[] for _ in range(most - len(passes))]
        return passes


def _check_shares(batch: int, experts: Experts) -> None:
    """Refuse what weights that are divided among processes cannot do."""
    if batch % parallel.world():
        raise RequestError(
            f"batch is {batch} on {parallel.world()} processes; full training needs a multiple of them"
        )
    if experts.gen is None:
        raise RequestError(
            "full training on several processes needs both experts; leave experts=understanding"
        )


def load_experts(
    checkpoint: Checkpoint,
    full: bool,
    dtype: torch.dtype,
    device: torch.device,
    generation: bool = True,
    progress: Progress | None = None,
) -> Experts:
    """A checkpoint's experts with their projections apart: in `dtype`, or with `full` float32 weights that
    are multiplied in `dtype`.

    Raises:
        RequestError: full training of quantised weights.
    """
    quantised = sorted({f.name for part in ("und", "gen") for f in checkpoint.parts[part].formats.values()})
    if full and quantised:
        raise RequestError(
            f"{checkpoint.path} is quantised ({', '.join(quantised)}), and only LoRAs can be trained on "
            "that; train the original, or leave --full out"
        )
    options: dict[str, Any] = {"ops": CastOps, "dtype": torch.float32} if full else {"dtype": dtype}
    und = checkpoint.load("und", device=device, progress=progress, joined=False, **options)
    gen = None
    if generation:
        gen = checkpoint.load("gen", device=device, progress=progress, joined=False, **options)
    if not isinstance(und, Understanding) or not (gen is None or isinstance(gen, Generation)):
        raise TypeError("the checkpoint's parts are of other classes than they are named after")
    config = checkpoint.config
    return Experts(config.llm, und, gen, config.tokens_per_second, len(checkpoint.tokenizer), dtype, device)


def whole_weights(experts: Experts, which: str) -> dict[str, nn.Parameter]:
    """The weights of full training by name, set to be trained: all of the experts asked for but text
    embeddings and lm_head.
    """
    found: dict[str, nn.Parameter] = {}
    for part in lora.EXPERTS[which]:
        module = experts.gen if part == "gen" else experts.und
        if module is None:
            raise RequestError("full training of the generation expert needs it loaded")
        for name, weight in module.named_parameters():
            if name not in FROZEN:
                weight.requires_grad_()
                found[f"{part}.{name}"] = weight
    return found


def _result(
    sums: Sequence[float], totals: Sequence[float], tokens: int, norm: float = 0.0, lr: float = 0.0
) -> Result:
    ce, mse = (one / count if count else None for one, count in zip(sums, totals, strict=True))
    total = CE_WEIGHT * (ce or 0.0) + MSE_WEIGHT * (mse or 0.0)
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Result(total, ce, mse, tokens, norm, lr, round(used / 1e9, 2))


def _not_finite(what: str, number: int, items: Sequence[Item]) -> str:
    names = ", ".join(i.name for i in items)
    names = names if len(names) <= 200 else f"{names[:200]}…"
    return (
        f"{what} became NaN or infinity in step {number + 1}, on {names}; the last state is kept. Lower lr, "
        "look at these rows, and go on with --resume"
    )
