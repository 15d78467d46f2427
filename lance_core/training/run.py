"""A whole training: data set, states, steps, validation, samples and the file."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import checks
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.loading import Progress
from ..components import Components
from ..errors import LanceError, RequestError
from ..inputs import tasks
from ..model.out_of_memory import said_when_out_of_memory
from . import full, lora, parallel, previews, state
from .batches import Batches
from .dataset import read, require
from .encoding import Encoder
from .folder import prepare
from .journal import Journal
from .learner import Learner, Result
from .rows import DataSet
from .settings import Settings, dtype_of, settings_of

WITH_LESS = (
    "choose a smaller --resolution, --num-frames or --max-tokens, a smaller --rank, or an int8 checkpoint "
    "(`python -m lance_core convert`)"
)
OnStep = Callable[[int, int, Result], None]  # step from 1, steps in all, what it gave


@said_when_out_of_memory("training", WITH_LESS)
def train(
    data: str | os.PathLike,
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    device: torch.device | str = "cpu",
    resume: bool = False,
    strict: bool = False,
    steps: int | None = None,
    epochs: float | None = None,
    cache: str | os.PathLike | None = None,
    vit: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a LoRA (or, with full=True, the experts' weights) and write it to `output`.

    Args:
        data: a folder, or a .jsonl, .parquet or .yaml file; see docs/training.md.
        model: the checkpoint.
        output: a .safetensors file. Beside it the folder STEM.training holds states, lines, samples and plot.
        dtype, device: of the computation; adapters are float32.
        resume: go on from the newest state, with the same result as without the stop. Without a state,
            start.
        strict: refuse a data set with a bad row, which is left out and listed otherwise.
        steps: optimiser steps, 1000 by default; epochs: instead, how often every row is seen.
        cache: folder of latents and ViT embeddings; by default in STEM.training.
        progress: (what, done, total). on_step: called after every step; raise in either to stop: the state
            is saved.
        options: see `settings.Settings`.

    Returns: file, folder, steps, loss (of the last step), validation, rows, skipped (name: why), notes.

    Raises:
        RequestError, MediaError, CheckpointError, NumericsError.
    """
    if steps is not None and epochs is not None:
        raise RequestError("steps and epochs were both given; give one of them")
    settings = settings_of(options | ({} if steps is None else {"steps": steps}))
    device = parallel.start(torch.device(device))
    run = _Run(Path(output), settings, progress, on_step)
    opened = Checkpoint(model, vit, vae)
    try:
        run.open(data, opened, dtype_of(dtype), device, resume, strict, cache, epochs)
        return run.steps()
    finally:
        parallel.stop()


class _Run:
    """One training from opening to the file."""

    def __init__(
        self, output: Path, settings: Settings, progress: Progress | None, on_step: OnStep | None
    ) -> None:
        self.output, self.settings = output, settings
        self.progress, self.on_step = progress, on_step
        self.done = 0
        self.stepping = False  # inside a step, weights are not those of any number of steps

    def open(
        self,
        data: str | os.PathLike,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        resume: bool,
        strict: bool,
        cache: str | os.PathLike | None,
        epochs: float | None,
    ) -> None:
        """Everything before the first step."""
        s, self.checkpoint = self.settings, checkpoint
        found = read(data, None if s.task == "auto" else s.task, s.question)
        require(found, data, strict)
        _check_tasks(found, checkpoint.config.variant)
        self.folder = prepare(self.output, resume)
        self.journal = Journal(self.folder)
        self.components = Components(checkpoint, device, dtype, self.progress)
        place = Path(cache) if cache is not None else self.folder / "cache"
        self.encoder = Encoder(self.components, place, s.resolution, s.num_frames)
        self._encode(found)
        require(found, data, strict)
        self.data = found
        self.batches = Batches(found.rows, self.encoder, checkpoint.tokenizer, s)
        if epochs is not None:
            often = checks.real("epochs", epochs, above=0)
            s = replace(s, steps=math.ceil(often * len(self.batches.numbers) / s.batch))
            self.settings = s
        self.told = {"settings": s.told(), "data": self.batches.fingerprint(), "dtype": str(dtype)}
        self.told["model"] = _model(checkpoint)
        before = state.newest(self.folder) if resume else None
        if before is not None:
            self._check_continues(*before)
        generation = s.experts != "understanding" or any(not row.answer for row in found.rows)
        self.learner = Learner(checkpoint, s, dtype, device, generation, self.progress)
        if before is not None:
            state.restore(before[0], self.learner.weights, self.learner.optimizer, self.learner.average)
            self.done = before[1]["step"]
        if parallel.rank() == 0:
            self.journal.cut(self.done)

    def _encode(self, found: DataSet) -> None:
        """Latents and embeddings of every row, before the experts are loaded; bad rows are listed."""
        kept = []
        with parallel.first_alone():
            for i, row in enumerate(found.rows):
                try:
                    self.encoder.material(row)
                    kept.append(row)
                except LanceError as error:
                    found.problems[row.name] = str(error)
                if self.progress is not None:
                    self.progress("encoding the data set", i + 1, len(found.rows))
        found.rows = kept
        self.components.unload()

    def _check_continues(self, path: Path, told: dict[str, Any]) -> None:
        self.settings.check_continues(told.get("settings", {}), str(path))
        for what, name in (("model", "checkpoint"), ("data", "data set"), ("dtype", "dtype")):
            if told.get(what) != self.told[what]:
                raise RequestError(
                    f"{path} is of a run with another {name}; give the same one, or leave --resume out to "
                    "start anew"
                )

    # -- steps -----------------------------------------------------------------------------------------------

    def steps(self) -> dict[str, Any]:
        """All steps that are left, and the file."""
        s, result = self.settings, None
        held = self._validate(0) if self.done == 0 else None
        saved = self.done
        try:
            while self.done < s.steps:
                result, last = self._step(), self.done == s.steps
                if self.done % s.save_every == 0 or last:
                    self._save()
                    saved, held = self.done, self._validate(self.done)
                if s.sample_prompts and (self.done % (s.sample_every or s.save_every) == 0 or last):
                    self._preview()
                if self.on_step is not None:
                    self.on_step(self.done, s.steps, result)
        except BaseException:
            # Of divided weights one process has a part only, and the others may not be asked any more.
            if self.done > saved and not self.stepping and not self.learner.sharded:
                self._save()
            raise
        self._write_output()
        return {
            "file": str(self.output),
            "folder": str(self.folder),
            "steps": self.done,
            "loss": None if result is None else result.loss,
            "validation": held,
            "rows": len(self.data.rows),
            "held_out": len(self.batches.held),
            "skipped": self.data.problems,
            "notes": self.data.notes,
        }

    def _step(self) -> Result:
        """One step, and its line."""
        s, began = self.settings, time.perf_counter()
        items = self.batches.items(self.done, parallel.rank(), parallel.world())
        names = self.batches.names(self.done)
        self.stepping = True
        result = self.learner.step(self.done, items)
        self.done += 1
        self.stepping = False
        if parallel.rank() == 0:
            line: dict[str, Any] = {"step": self.done, "loss": result.loss, "ce": result.ce}
            line |= {"mse": result.mse, "lr": result.lr, "grad_norm": result.grad_norm}
            line |= {"tokens": result.tokens, "rows": names}
            line |= {"seconds": round(time.perf_counter() - began, 3)}
            self.journal.step(line | ({"gpu_gb": result.gpu_gb} if result.gpu_gb else {}))
        if self.progress is not None:
            self.progress("training", self.done, s.steps)
        return result

    def _validate(self, step: int) -> float:
        """The loss of the held-out rows (of the first trained ones, where none are) at fixed noise and times.

        Every rank measures its share.
        """
        result = self.learner.measure(self.batches.validation(parallel.rank(), parallel.world()))
        if parallel.rank() == 0:
            line = {"step": step, "loss": result.loss, "ce": result.ce, "mse": result.mse}
            self.journal.validation(line | {"held_out": bool(self.batches.held)})
            self.journal.plot()
        return result.loss

    def _save(self) -> None:
        learner = self.learner
        tensors = state.collect(learner.weights, learner.optimizer, learner.average)
        if parallel.rank() == 0:
            state.write(self.folder, self.done, tensors, self.told)
            self.journal.plot()
        self._write_output()

    def _write_output(self) -> None:
        """The file, and that of the average where there is one."""
        learner, told = self.learner, {"step": self.done, **self.told}
        outputs: list[tuple[Path, Any]] = [(self.output, None)]
        if learner.average is not None and learner.average.values:
            outputs.append((self.output.with_suffix(".ema.safetensors"), learner.average.values))
        for path, values in outputs:
            if self.settings.full:
                tensors = full.collect(learner.experts, values)
            else:
                tensors = lora.file_tensors(learner.adapters, values)
            if parallel.rank() != 0:
                continue
            if self.settings.full:
                full.write(path, self.checkpoint, tensors, told)
            else:
                state.save(
                    path, tensors, {"format": "pt", "lance_training": json.dumps(told, sort_keys=True)}
                )

    def _preview(self) -> None:
        if parallel.rank() != 0 or self.learner.sharded:  # one process alone cannot run divided weights
            return
        row = self.data.rows[self.batches.measured[0]]
        place = self.folder / "samples"
        previews.save(self.components, self.learner.experts, place, self.done, row, self.settings)


def _check_tasks(found: DataSet, variant: str) -> None:
    """Refuse a task the checkpoint cannot do."""
    for row in found.rows:
        try:
            tasks.check_variant(row.kind, variant)
        except RequestError as error:
            raise RequestError(f"{row.name}: {error}") from None


def _model(checkpoint: Checkpoint) -> str:
    """What tells one checkpoint from another: its sizes, and its files' names and sizes."""
    tensors = [place for part in ("und", "gen") for place in checkpoint.parts[part].tensors.values()]
    files = sorted({file.path for file, _ in tensors})
    return f"{checkpoint.config.llm} {[(f.name, os.stat(f).st_size) for f in files]}"
