"""Wan2.2's VAE, streaming over time."""

from .wan import WanVAE, denormalize_latent, normalize_latent

__all__ = ["WanVAE", "denormalize_latent", "normalize_latent"]
