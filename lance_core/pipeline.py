"""The public API: a checkpoint opened, and what can be asked of it (drawing/api.py, dialogue/api.py)."""

from __future__ import annotations

import os
from typing import Any

import torch

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.loading import Progress
from .components import Components
from .config import LanceConfig
from .dialogue.api import WITH_LESS, Talking
from .dialogue.understanding import Answer
from .drawing.api import Drawing
from .drawing.extend import Extension
from .drawing.request import MAX_BATCH, Generated
from .errors import RequestError
from .model.compiling import check_compiler
from .model.out_of_memory import said_when_out_of_memory
from .model.sampler import seeded_noise
from .model.side_stream import SideStream
from .model.windows import Windows
from .prompting import enhance as writing

__all__ = ["MAX_BATCH", "Answer", "Extension", "Generated", "Lance", "Windows", "load", "seeded_noise"]


def load(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    vit: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    compile: bool = False,
    overlap: bool = False,
    progress: Progress | None = None,
) -> Lance:
    """Open a checkpoint. Everything is checked now; each part's weights are read when first needed, and kept.

    Args:
        path: `.../Lance_3B` or `.../Lance_3B_Video`; the ViT and VAE are found inside or beside it.
        device, dtype: of the weights and the computation.
        vit, vae: files to use instead.
        compile: fuse the decoder's small steps with torch.compile, and on CUDA write text from a graph; the
            same up to rounding.
        overlap: the understanding expert works on a CUDA stream of its own while the generation expert does;
            the same result.
        progress: (what, done, total) on everything that takes time.

    Raises:
        CheckpointError: missing, damaged, or another model.
        RequestError: a device or dtype torch does not have, nothing that torch.compile could compile with, or
            overlap without CUDA.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RequestError(f"dtype is {dtype}, expected torch.float32, bfloat16 or float16")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device {device!r} cannot be used ({str(error).splitlines()[0]}); 'cpu' always can"
        ) from None
    side = SideStream(device) if overlap else None
    if compile:
        check_compiler(device)
    return Lance(Components(Checkpoint(path, vit, vae), device, dtype, progress, compile, side))


class Lance(Drawing, Talking):
    """An opened checkpoint that generates and understands. Made by `load`."""

    def __init__(self, components: Components) -> None:
        self.components = components

    @property
    def config(self) -> LanceConfig:
        """Sizes of the whole model."""
        return self.components.config

    @property
    def checkpoint(self) -> Checkpoint:
        """The files it was opened from, and the tokeniser."""
        return self.components.checkpoint

    def unload(self, *names: str) -> None:
        """Drop loaded components ("und", "gen", "vit", "vae"; all without names); they are read again when
        next needed.
        """
        self.components.unload(*names)

    @said_when_out_of_memory("writing a prompt", WITH_LESS)
    @torch.inference_mode()
    def enhance(
        self,
        prompt: str,
        task: str,
        image: Any = None,
        *,
        by: str = "auto",
        seed: int = 0,
        temperature: float = writing.TEMPERATURE,
        timeout: float = writing.TIMEOUT,
    ) -> str:
        """A short wish as the detailed prompt the weights were trained on, in the wish's language.

        What cannot be used (an empty answer, a service that fails) falls back to the wish, with a warning in
        the log.

        Args:
            task: what the prompt is for.
            image: what the task is given, which the writer sees: a picture, a clip, or a list of references.
            by: "model", this model's understanding expert; "endpoint", the OpenAI-compatible service in
                LANCE_REWRITE_BASE_URL, _MODEL_NAME and _API_KEY; "auto", the service where those are set.
            seed, temperature: of the draw.
            timeout: seconds a service may take.

        Raises:
            RequestError, MediaError, CheckpointError, NumericsError.
        """
        return writing.enhance(
            self.components, prompt, task, image, by=by, seed=seed, temperature=temperature, timeout=timeout
        )
