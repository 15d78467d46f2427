"""LATENT and VAE as Lance takes them: checked, decoded, empty."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_management as mm
import torch
from torch import Tensor

from ..lance_core.config import Grid
from ..lance_core.errors import NumericsError, RequestError

LATENT_CHANNELS = comfy.latent_formats.Wan22.latent_channels


def decode_latent(vae: Any, samples: Tensor) -> Tensor:
    """Pixels [n, h, w, 3] of LATENT samples, a batch's results one after the other.

    Raises:
        RequestError: the VAE or the latent is another model's, or the latent is empty.
        NumericsError: the latent has NaN or infinity in it.
    """
    check_vae(vae)
    check_latent(samples)
    if not len(samples):
        raise RequestError("The latent is empty (a batch of 0): look at the node it comes from.")
    check_finite(samples)
    frames = vae.decode(samples.unsqueeze(2) if samples.ndim == 4 else samples)
    return frames.reshape(-1, *frames.shape[-3:])


def check_vae(vae: Any) -> None:
    """Refuse a VAE that is not Wan2.2's."""
    if getattr(vae, "latent_channels", None) != LATENT_CHANNELS:
        raise RequestError(
            "This VAE is not Wan2.2's: connect the VAE of Lance Loader, or load wan2.2_vae.safetensors."
        )


def check_latent(samples: Tensor) -> None:
    """Refuse another model's latent."""
    if samples.ndim not in (4, 5) or samples.shape[1] != LATENT_CHANNELS:
        raise RequestError(
            f"The latent has shape {list(samples.shape)}, Lance's have [batch, {LATENT_CHANNELS} channels, "
            "frames, height, width]: "
            "connect the latent of a sampler that ran Lance; to start with, use Empty Lance Latent."
        )


def check_finite(samples: Tensor) -> None:
    """Refuse a latent that would decode to black.

    Raises:
        NumericsError: NaN or infinity in it.
    """
    if not bool(torch.isfinite(samples).all()):
        raise NumericsError(
            "The latent has NaN or infinity in it, which would decode to black: the model it comes from "
            "failed. Sample "
            "with Lance Sampler, which looks for what is at fault: a LoRA, fp16 (choose bf16 in Lance "
            "Loader) or a damaged "
            "checkpoint."
        )


def normalised(latent: Tensor) -> Tensor:
    """LATENT samples -> what the model sees."""
    return comfy.latent_formats.Wan22().process_in(latent.float())


def empty_latent(grid: Grid, batch: int = 1) -> Tensor:
    """Samples of an empty LATENT [batch, 48, t, h, w]."""
    return torch.zeros(batch, LATENT_CHANNELS, *grid, device=mm.intermediate_device())
