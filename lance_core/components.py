"""The loaded model: experts, vision tower and VAE, each read from the checkpoint when first needed."""

from __future__ import annotations

import logging
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.loading import Progress, non_finite
from .config import Grid, LanceConfig
from .errors import NumericsError
from .inputs import preprocess
from .model.attention import Attention, attention
from .model.compiling import compile_layers
from .model.dual_expert import DualExpert, Generation, Understanding
from .model.out_of_memory import is_out_of_memory
from .model.sequence import Kind, Placed, Role, Segment, VisualSegment, merge_text
from .model.side_stream import SideStream
from .model.vit import VisionTower
from .vae.wan import WanVAE, denormalize_latent, normalize_latent

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


class Components:
    """What an opened checkpoint is made of: "und" and "gen" (the two experts), "vit" and "vae".

    compile: fuse the experts' small steps (`decoder.compile_layers`). side: a second stream for the
    understanding expert (`decoder.run_layers`). progress: (what, done, total), may be set at any time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
        compile: bool = False,
        side: SideStream | None = None,
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.progress = checkpoint, device, dtype, progress
        self.compile, self.side = compile, side
        self._loaded: dict[str, nn.Module] = {}

    @property
    def config(self) -> LanceConfig:
        """Sizes of all components."""
        return self.checkpoint.config

    @property
    def und(self) -> Understanding:
        """The understanding expert."""
        return self._part(Understanding, "und")

    @property
    def gen(self) -> Generation:
        """The generation expert."""
        return self._part(Generation, "gen")

    @property
    def vit(self) -> VisionTower:
        """The vision tower."""
        return self._part(VisionTower, "vit")

    @property
    def vae(self) -> WanVAE:
        """The VAE."""
        return self._part(WanVAE, "vae")

    def _part(self, kind: type[M], name: str) -> M:
        """A component, loaded when first asked for."""
        module = self._loaded.get(name)
        if module is None:
            module = self.checkpoint.load(name, device=self.device, dtype=self.dtype, progress=self.progress)
            if self.compile and name in ("und", "gen"):
                compile_layers(module)
            self._loaded[name] = module
        if not isinstance(module, kind):
            raise TypeError(f"{name} was loaded as {type(module).__name__}, expected {kind.__name__}")
        return module

    def use(self, name: str, module: nn.Module) -> None:
        """Take a module that is loaded already, one in training say, as a component."""
        self._loaded[name] = module

    def unload(self, *names: str) -> None:
        """Drop loaded components (all without names); they are read again when next needed."""
        for name in names or tuple(self._loaded):
            self._loaded.pop(name, None)

    def report(self, stage: str, done: int, total: int) -> None:
        """Call `progress`, if there is one."""
        if self.progress is not None:
            self.progress(stage, done, total)

    def blame(self, *names: str) -> str:
        """The end of an error message: the first loaded weight that is not finite, empty if all are."""
        for name in names:
            bad = non_finite(self._loaded[name]) if name in self._loaded else None
            if bad:
                return (
                    f"; the weight {bad} of the {name} part is itself not finite: the checkpoint is "
                    "damaged, download it again"
                )
        return ""

    def experts(self, generation: bool = True, attention: Attention = attention) -> DualExpert:
        """The decoder, with its generation expert or without."""
        return DualExpert(
            self.config.llm,
            self.und,
            self.gen if generation else None,
            attention=attention,
            dtype=self.dtype,
            device=self.device,
            side=self.side,
        )

    def counted(self, stage: str, parts: list[list[Placed]]) -> Attention:
        """Attention that reports how far the passes over `parts` are, a layer at a time."""
        total = self.config.llm.num_layers * sum(len(merge_text(part)) for part in parts)
        done = 0

        def counted(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            nonlocal done
            out = attention(q, k, v, causal)
            done += 1
            if done <= total:
                self.report(stage, done, total)
            return out

        return counted

    # -- pictures in and out ---------------------------------------------------------------------------------

    def visual_segments(self, clip: np.ndarray, resolution: str, role: Role) -> list[Segment]:
        """A reference's two segments: its ViT embeddings, then its clean latent. clip: uint8 [T, H, W, 3]."""
        latent = self.encode_vae(clip, resolution)
        t, h, w = latent.shape[:3]
        return [
            self.vit_segment(clip, resolution, role),
            VisualSegment(Kind.CLEAN, role, (t, h, w), latent),
        ]

    def vit_segment(self, clip: np.ndarray, resolution: str, role: Role) -> VisualSegment:
        """A clip's ViT embeddings as a segment. clip: uint8 [T, H, W, 3]."""
        vit = self.vit
        patches, (t, h, w) = preprocess.vit_patches(clip, resolution, vit.config)
        embeds = self._embed(patches, (t, h, w))
        if not bool(torch.isfinite(embeds).all()):
            raise NumericsError(f"the ViT gave NaN or infinity{self.blame('vit')}")
        merge = vit.config.spatial_merge_size
        return VisualSegment(Kind.VIT, role, (t, h // merge, w // merge), embeds)

    def _embed(self, patches: Tensor, grid: Grid) -> Tensor:
        """The ViT's embeddings of a clip's patches, all frames at once or, out of memory, fewer at a time.

        The result is the same: attention never crosses the ViT's temporal patches.
        """
        t, h, w = grid
        while True:
            try:
                parts = [
                    self.vit(
                        part.to(self.device, self.dtype),
                        [(len(part) // (h * w), h, w)],
                        progress=lambda i, n: self.report("encoding the picture", i, n),
                    )
                    for part in patches.split(t * h * w)
                ]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except Exception as error:
                if t == 1 or not is_out_of_memory(error):
                    raise
            # Out here the exception is gone, and with it the frames that held the failed pass's tensors.
            t = (t + 1) // 2
            log.warning("Out of memory in the ViT; starting over with %d frame pairs at a time.", t)

    def encode_vae(self, clip: np.ndarray, resolution: str) -> Tensor:
        """Normalised latent, float32 [t, h, w, 48], of a clip uint8 [T, H, W, 3] brought to the preset's
        size.
        """
        return self.encode_frames(preprocess.vae_frames(clip, resolution))

    def encode_frames(self, frames: np.ndarray) -> Tensor:
        """Normalised latent, float32 [t, h, w, 48], of frames uint8 [T, H, W, 3], H and W multiples of 16."""
        pixels = preprocess.to_signed(frames).to(self.device, self.dtype)
        latent = self.vae.encode(pixels, progress=lambda i, n: self.report("encoding", i, n))
        if not bool(torch.isfinite(latent).all()):
            raise NumericsError(f"the VAE's encoder gave NaN or infinity{self.blame('vae')}")
        return normalize_latent(latent.float())[0].permute(1, 2, 3, 0)

    def decode_vae(self, latent: Tensor) -> Tensor:
        """Frames, float32 [b, T, H, W, 3] in 0..1 on the CPU, of normalised latents [b, t, h, w, 48]; one at
        a time.
        """
        out: list[Tensor] = []
        frames = latent.shape[1]

        def report(step: int, steps: int) -> None:
            self.report("decoding", len(out) * frames + step * frames // steps, len(latent) * frames)

        for one in latent:
            raw = denormalize_latent(one.permute(3, 0, 1, 2)[None]).to(self.device, self.dtype)
            pixels = self.vae.decode(raw, progress=report)
            if not bool(torch.isfinite(pixels).all()):
                raise NumericsError(f"the VAE's decoder gave NaN or infinity{self.blame('vae')}")
            out.append(((pixels[0].float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).cpu())
        return torch.stack(out)
