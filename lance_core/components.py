"""A checkpoint's parts, loaded when first needed, and what stands between pictures and the decoder: ViT and
VAE.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint.checkpoint import Checkpoint, Progress, non_finite
from .config import LanceConfig
from .errors import NumericsError
from .inputs import preprocess
from .model.decoder import compile_layers
from .model.sequence import Kind, Role, Segment
from .model.side_stream import Side
from .vae.wan import denormalize_latent, normalize_latent


class Parts:
    """An opened checkpoint. compile, side: see `pipeline.load`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
        compile: bool = False,
        side: Side | None = None,
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.progress = checkpoint, device, dtype, progress
        self.compile, self.side = compile, side
        self._parts: dict[str, nn.Module] = {}

    @property
    def config(self) -> LanceConfig:
        """Sizes of all parts."""
        return self.checkpoint.config

    def part(self, name: str) -> nn.Module:
        """One of "und", "gen", "vit", "vae", loaded when first asked for."""
        if name not in self._parts:
            self._parts[name] = self.checkpoint.load(
                name, device=self.device, dtype=self.dtype, progress=self.progress
            )
            if self.compile and name in ("und", "gen"):
                compile_layers(self._parts[name])
        return self._parts[name]

    def unload(self, *names: str) -> None:
        """Forget loaded parts (all without names); they are read again when next needed."""
        for name in names or tuple(self._parts):
            self._parts.pop(name, None)

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell whoever asked for progress."""
        if self.progress is not None:
            self.progress(stage, done, total)

    def blame(self, *parts: str) -> str:
        """Which loaded weight is not finite, for an error message."""
        for name in parts:
            bad = name in self._parts and non_finite(self._parts[name])
            if bad:
                return (
                    f"; the weight {bad} of the {name} part is itself not finite: the checkpoint is "
                    "damaged, download it again"
                )
        return ""

    # -- pictures in and out ---------------------------------------------------------------------------------

    def visual_segments(self, clip: np.ndarray, resolution: str, role: Role) -> list[Segment]:
        """A reference's two blocks: as the ViT sees it, then its clean latent. clip: uint8 [T, H, W, 3]."""
        latent = self.encode_vae(clip, resolution)
        return [
            self.seen_segment(clip, resolution, role),
            Segment(Kind.CLEAN, role, grid=tuple(latent.shape[:3]), data=latent),
        ]

    def seen_segment(self, clip: np.ndarray, resolution: str, role: Role) -> Segment:
        """The ViT's block of a clip."""
        vit = self.part("vit")
        patches, (t, h, w) = preprocess.vit_patches(clip, resolution, self.config.vit)
        embeds = vit(
            patches.to(self.device, self.dtype),
            [(t, h, w)],
            progress=lambda i, n: self.report("looking", i, n),
        )
        if not bool(torch.isfinite(embeds).all()):
            raise NumericsError(f"the ViT gave NaN or infinity{self.blame('vit')}")
        merge = self.config.vit.spatial_merge_size
        return Segment(Kind.SEEN, role, grid=(t, h // merge, w // merge), data=embeds)

    def encode_vae(self, clip: np.ndarray, resolution: str) -> Tensor:
        """Normalised latent, float32 [t, h, w, 48], of a clip uint8 [T, H, W, 3] brought to the preset's
        size.
        """
        pixels = preprocess.vae_pixels(clip, resolution).to(self.device, self.dtype)
        latent = self.part("vae").encode(pixels, progress=lambda i, n: self.report("encoding", i, n))
        if not bool(torch.isfinite(latent).all()):
            raise NumericsError(f"the VAE's encoder gave NaN or infinity{self.blame('vae')}")
        return normalize_latent(latent.float())[0].permute(1, 2, 3, 0)

    def decode_vae(self, latent: Tensor) -> Tensor:
        """Frames, float32 [b, T, H, W, 3] in 0..1 on the CPU, of normalised latents [b, t, h, w, 48]; one at
        a time.
        """
        out = []
        for i, one in enumerate(latent):
            raw = denormalize_latent(one.permute(3, 0, 1, 2)[None]).to(self.device, self.dtype)
            done = i * latent.shape[1]
            pixels = self.part("vae").decode(
                raw,
                progress=lambda k, n, done=done: self.report(
                    "decoding", done + k * latent.shape[1] // n, latent[..., 0, 0, 0].numel()
                ),
            )
            if not bool(torch.isfinite(pixels).all()):
                raise NumericsError(f"the VAE's decoder gave NaN or infinity{self.blame('vae')}")
            out.append(((pixels[0].float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).cpu())
        return torch.stack(out)
