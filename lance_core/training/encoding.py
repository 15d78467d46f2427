"""Media to latents and ViT embeddings, once: kept on disk under the hash of what they come from.

A file's own hash is in it, so that a damaged one is made again. Neither VAE nor ViT is needed afterwards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.writing import Planned, write_safetensors
from ..components import Components
from ..config import FRAMES_PER_LATENT, latent_frames, pixel_frames
from ..errors import MediaError
from ..inputs import media as files
from ..inputs.preprocess import frame_indices
from ..inputs.tokenizer import Tokenizer
from ..model.sequence import Kind, Role, Segment, VisualSegment
from .rows import Media, Row, digest, is_video, source_of
from .sample import Sample, answer_sample, generation_sample, system_prompt

LEAST_FRAMES = FRAMES_PER_LATENT + 1  # of a clip to learn motion from: two latent frames


@dataclass(frozen=True, eq=False)
class Material:
    """A row's tensors. latent: of the target [t, h, w, 48]; seen: per source or question its ViT embeddings
    [tokens, hidden] and grid; clean: per source its latent.
    """

    latent: Tensor | None = None
    seen: list[tuple[Tensor, tuple[int, int, int]]] = field(default_factory=list)
    clean: list[Tensor] = field(default_factory=list)


class Encoder:
    """Rows' media as the model takes them, from the cache or by way of VAE and ViT.

    Args:
        resolution: a preset; None for each task's own.
        num_frames: at most so many frames of a target clip, 12 a second from its start; None takes what
            inference takes of one, up to 73 frames spread over all of it.
    """

    def __init__(
        self,
        components: Components,
        cache: Path,
        resolution: str | None = None,
        num_frames: int | None = None,
    ) -> None:
        self.components, self.cache, self.resolution = components, cache, resolution
        self.num_frames = None if num_frames is None else pixel_frames(latent_frames(num_frames))
        self._digests: dict[Media, str] = {}
        self._stamp = _stamp(components)

    def material(self, row: Row) -> Material:
        """A row's tensors.

        Raises:
            MediaError: a file cannot be read, or a clip is too short.
        """
        preset = self.resolution or row.kind.default_resolution
        if row.answer:
            return Material(seen=[self._seen(row.media, preset)])
        latent = self._latent(row.media, preset)
        if row.kind.output == "video" and len(latent) < 2:
            raise MediaError(
                f"a clip of fewer than {LEAST_FRAMES} frames (at 12 a second) came; there is no motion to "
                "learn in it. Use it as a picture"
            )
        seen = [self._seen(source, preset) for source in row.sources]
        return Material(latent, seen, [self._latent(source, preset) for source in row.sources])

    def fingerprint(self, row: Row) -> str:
        """What changes when a row's media do."""
        return hashlib.sha256("".join(map(self._digest, (row.media, *row.sources))).encode()).hexdigest()

    def _digest(self, media: Media) -> str:
        if media not in self._digests:
            self._digests[media] = digest(media)
        return self._digests[media]

    def _latent(self, media: Media, preset: str) -> Tensor:
        def make() -> dict[str, Tensor]:
            return {"latent": self.components.encode_vae(self._clip(media), preset).float()}

        return self._kept(media, f"latent {preset} {self.num_frames}", make)["latent"]

    def _seen(self, media: Media, preset: str) -> tuple[Tensor, tuple[int, int, int]]:
        def make() -> dict[str, Tensor]:
            segment = self.components.vit_segment(self._clip(media), preset, Role.SOURCE)
            return {"embeds": segment.data, "grid": torch.tensor(segment.grid)}

        found = self._kept(media, f"vit {preset} {self.num_frames}", make)
        t, h, w = (int(n) for n in found["grid"])
        return found["embeds"], (t, h, w)

    def _clip(self, media: Media) -> np.ndarray:
        """uint8 [T, H, W, 3]."""
        source = source_of(media)
        if not is_video(media):
            return files.load_image(source)[None]
        if self.num_frames is None:
            return files.read_clip(source)[0]
        most = self.num_frames

        def pick(total: int, fps: float) -> list[int]:
            whole = frame_indices(total, fps, max_seconds=total / max(round(fps), 1))
            return whole[:most]

        return files.read_clip(source, pick=pick)[0]

    def _kept(self, media: Media, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors from the cache; made, and put there, where they are missing or damaged."""
        key = hashlib.sha256(f"{self._digest(media)} {what} {self._stamp}".encode()).hexdigest()[:40]
        path = self.cache / f"{key}.safetensors"
        found = _read(path)
        if found is None:
            with torch.inference_mode():
                new = make()
            _write(path, {name: tensor.cpu() for name, tensor in new.items()})
            found = _read(path)
        if found is None:
            raise MediaError(f"{path} cannot be read back after it was written; check the disk")
        return found


def _stamp(components: Components) -> str:
    """What embeddings and latents depend on beside the media: the files of VAE and ViT, and the dtype."""
    told = []
    for part in ("vit", "vae"):
        tensors = components.checkpoint.parts[part].tensors
        for path in sorted({file.path for file, _ in tensors.values()}):
            size = os.stat(path).st_size
            told.append(f"{part} {path.name} {size}")
    return f"{' '.join(told)} {components.dtype}"


def _hash(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """A cached file's tensors; None where it is missing or not what was written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get("hash")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors' own type says nothing that helps; the file is made again
        if isinstance(error, MemoryError):
            raise
        return None
    return tensors if told == _hash(tensors) else None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    planned = [Planned(n, t.dtype, tuple(t.shape), partial(_same, t)) for n, t in tensors.items()]
    write_safetensors(path, planned, {"hash": _hash(tensors)})


def _same(tensor: Tensor) -> Tensor:
    return tensor


def sample_of(
    row: Row,
    material: Material,
    tokenizer: Tokenizer,
    *,
    drop_caption: bool = False,
    drop_references: bool = False,
    as_released: bool = False,
) -> Sample:
    """A row as a sample to learn from."""
    system = row.system if row.system is not None else system_prompt(row.kind, as_released)
    subject = row.kind.takes == "references"
    role = Role.QUESTION if row.answer else Role.SUBJECT if subject else Role.SOURCE
    visuals: list[Segment] = []
    if not drop_references:
        clean = [*material.clean, *[None] * (len(material.seen) - len(material.clean))]
        for (embeds, grid), latent in zip(material.seen, clean, strict=True):
            visuals.append(VisualSegment(Kind.VIT, role, grid, embeds))
            if latent is not None:
                t, h, w = latent.shape[:3]
                visuals.append(VisualSegment(Kind.CLEAN, role, (t, h, w), latent))
    if material.latent is None:
        return answer_sample(tokenizer, system, visuals, row.text, row.answer)
    frames = (0,) if row.task == "i2v" else ()
    return generation_sample(tokenizer, system, visuals, row.text, material.latent, frames, drop_caption)
