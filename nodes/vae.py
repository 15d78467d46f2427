"""Lance's VAE as a native VAE of any width: Wan2.2's, streaming over time, with progress and interrupts.

Stock nodes (VAEDecode, VAEDecodeTiled, VAEEncode, Wan22ImageToVideoLatent, VAESave) take it as their own.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import comfy.sd
from torch import Tensor

from ..lance_core.checkpoint.checkpoint import Checkpoint
from ..lance_core.config import VAEConfig, latent_frames, pixel_frames
from ..lance_core.errors import CheckpointError
from ..lance_core.vae.memory import decode_bytes, encode_bytes
from ..lance_core.vae.wan import WanVAE
from . import comfy_compat
from .latents import check_finite, check_latent
from .patcher import fill, make_patcher


class FirstStage(WanVAE):
    """The VAE with the two methods ComfyUI calls."""

    def encode(self, pixels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[b, 3, T, H, W] in -1..1 -> mean latent; frames past the last 4k+1 are dropped, as ComfyUI's VAE
        does.
        """
        keep = pixel_frames(latent_frames(pixels.shape[2]))
        return super().encode(
            pixels[:, :, :keep],
            progress=comfy_compat.progress(),
            check=mm.throw_exception_if_processing_interrupted,
        )

    def decode(self, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Un-normalised latent -> pixels [b, 3, T, H, W] in -1..1. Raises NumericsError instead of decoding
        to black.
        """
        check_finite(latent)
        return super().decode(
            latent, progress=comfy_compat.progress(), check=mm.throw_exception_if_processing_interrupted
        )


class LanceVAE(comfy.sd.VAE):
    """comfy.sd.VAE around `FirstStage`; the stock constructor insists on one width."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config.vae
        if config is None:
            checkpoint.build("vae")  # raises with the place to put it
            raise CheckpointError(f"{checkpoint.path} has no VAE.")
        comfy_compat.set_up_vae(
            self,
            config,
            lambda shape, dtype: _encode_memory(config, shape, dtype),
            lambda shape, dtype: decode_bytes(config, _five(shape), dtype),
        )
        self.first_stage_model = FirstStage(
            config, comfy_compat.operations(self.vae_dtype, self.vae_dtype), device="meta"
        ).eval()
        self.patcher = make_patcher(self.first_stage_model, None, self.device, mm.vae_offload_device())
        fill(
            self.patcher,
            self.first_stage_model,
            checkpoint.tensors("vae", self.vae_dtype),
            len(checkpoint.parts["vae"].tensors),
        )
        self.size = self.patcher.size

    def decode(self, samples_in: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """LATENT samples [b, 48, t, h, w] -> pixels [b, T, H, W, 3] in 0..1.

        Raises:
            RequestError: the latent is another model's.
            NumericsError: it has NaN or infinity in it, which would decode to black.
        """
        return super().decode(_decodable(samples_in), *args, **kwargs)

    def decode_tiled(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `decode`, a tile at a time."""
        return super().decode_tiled(_decodable(samples), *args, **kwargs)


def _decodable(samples: Tensor) -> Tensor:
    """With a time axis, if it is of this VAE and finite; else see `LanceVAE.decode`."""
    check_latent(samples)
    check_finite(samples)
    return samples.unsqueeze(2) if samples.ndim == 4 else samples


def _five(shape: Any) -> tuple[int, ...]:
    """A latent's shape with a batch and a time axis."""
    shape = tuple(shape)
    return shape if len(shape) == 5 else (*shape[:2], 1, *shape[-2:])


def _encode_memory(config: VAEConfig, shape: Any, dtype: Any) -> int:
    b, c, t, h, w = _five(shape)
    cell = config.spatial_ratio
    return encode_bytes(
        config,
        (b, c, pixel_frames(latent_frames(t)), max(cell, h // cell * cell), max(cell, w // cell * cell)),
        dtype,
    )
