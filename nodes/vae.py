"""Lance's VAE as a native VAE of any width: Wan2.2's, streaming over time, with progress and interrupts.

Stock nodes (VAEDecode, VAEDecodeTiled, VAEEncode, Wan22ImageToVideoLatent, VAESave) take it as their own.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import comfy.sd
import torch
from torch import Tensor

from ..lance_core.checkpoint.checkpoint import Checkpoint
from ..lance_core.config import VAEConfig
from ..lance_core.errors import CheckpointError
from ..lance_core.vae.memory import decode_bytes, encode_bytes
from ..lance_core.vae.wan import WanVAE
from . import host


class FirstStage(WanVAE):
    """The VAE with the two methods ComfyUI calls."""

    def encode(self, pixels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[b, 3, T, H, W] in -1..1 -> mean latent; frames past the last 4k+1 are dropped, as the stock VAE
        does.
        """
        keep = (pixels.shape[2] - 1) // 4 * 4 + 1
        return super().encode(
            pixels[:, :, :keep], progress=host.progress(), check=mm.throw_exception_if_processing_interrupted
        )

    def decode(self, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Un-normalised latent -> pixels [b, 3, T, H, W] in -1..1."""
        return super().decode(
            latent, progress=host.progress(), check=mm.throw_exception_if_processing_interrupted
        )


def _to_pixels(image: Tensor) -> Tensor:
    """-1..1 -> 0..1 in place: newer hosts ignore what is returned."""
    return image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)


class LanceVAE(comfy.sd.VAE):
    """comfy.sd.VAE around `FirstStage`; the stock constructor insists on one width."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config.vae
        if config is None:
            checkpoint.build("vae")  # raises with the place to put it
            raise CheckpointError(f"{checkpoint.path} has no VAE.")
        time, space = config.temporal_ratio, config.spatial_ratio
        self.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
        self.device = mm.vae_device()
        self.vae_dtype = mm.vae_dtype(self.device, self.working_dtypes)
        self.output_device = mm.intermediate_device()
        self.latent_channels, self.latent_dim, self.output_channels = config.latent_channels, 3, 3
        self.upscale_ratio = (lambda t: max(0, t * time - (time - 1)), space, space)
        self.upscale_index_formula = (time, space, space)
        self.downscale_ratio = (lambda t: max(0, (t + time - 1) // time), space, space)
        self.downscale_index_formula = (time, space, space)
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = _to_pixels
        self.memory_used_encode = lambda shape, dtype: _encode_memory(config, shape, dtype)
        self.memory_used_decode = lambda shape, dtype: decode_bytes(config, _five(shape), dtype)
        self.disable_offload = self.not_video = False
        self.crop_input = True
        self.extra_1d_channel = self.pad_channel_value = self.audio_sample_rate = None
        self.handles_tiling, self.format_encoded = False, None
        self.first_stage_model = FirstStage(
            config, host.operations(self.vae_dtype, self.vae_dtype), device="meta"
        ).eval()
        self.patcher = host.make_patcher(self.first_stage_model, None, self.device, mm.vae_offload_device())
        host.fill(
            self.patcher,
            self.first_stage_model,
            checkpoint.tensors("vae", self.vae_dtype),
            len(checkpoint.parts["vae"].tensors),
        )
        self.size = self.patcher.size


def _five(shape: Any) -> tuple[int, ...]:
    """A latent's shape with a batch and a time axis."""
    shape = tuple(shape)
    return shape if len(shape) == 5 else (*shape[:2], 1, *shape[-2:])


def _encode_memory(config: VAEConfig, shape: Any, dtype: torch.dtype) -> int:
    b, c, t, h, w = _five(shape)
    cell = config.spatial_ratio
    return encode_bytes(
        config, (b, c, (t - 1) // 4 * 4 + 1, max(cell, h // cell * cell), max(cell, w // cell * cell)), dtype
    )
