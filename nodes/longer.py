"""Keyframes, and going on from the end of a clip, through ComfyUI's models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import numpy as np
import torch
from torch import Tensor

from ..lance_core.config import CELL, MAX_FRAMES, Grid, latent_grid
from ..lance_core.drawing.extend import lengths, matched
from ..lance_core.drawing.keyframes import latent_frame, still
from ..lance_core.errors import RequestError
from ..lance_core.inputs.pixels import to_levels
from ..lance_core.inputs.preprocess import crop_resize
from . import latents, pictures

Clip = np.ndarray  # uint8 [frames, height, width, 3]


def keep(latent: dict[str, Any], vae: Any, picture: np.ndarray, frame: int) -> dict[str, Any]:
    """A LATENT with a picture, uint8 [H, W, 3], kept at a pixel frame (negative from the end).

    Raises:
        RequestError: no such frame.
    """
    samples = latent["samples"]
    latents.check_latent(samples)
    if samples.ndim == 4:
        samples = samples.unsqueeze(2)
    frames = 4 * (samples.shape[2] - 1) + 1
    if not -frames <= frame < frames:
        raise RequestError(
            f"The latent has {frames} frames and the picture is for frame {frame}: choose 0 to "
            f"{frames - 1}, or -1 for the last."
        )
    at = latent_frame(frame % frames)
    size = (samples.shape[4] * CELL, samples.shape[3] * CELL)
    encoded = pictures.encode_frames(vae, still(crop_resize(picture, size), at))[:, :, at : at + 1]
    return held(latent | {"samples": samples}, encoded, at)


def held(latent: dict[str, Any], encoded: Tensor, at: int) -> dict[str, Any]:
    """A LATENT with raw latent frames [1, 48, n, h, w] from frame `at` on, which the noise mask keeps."""
    samples = latent["samples"]
    if not bool(samples.any()):  # empty ones are zeros in ComfyUI's own scale; those of a sampler are raw
        samples = comfy.latent_formats.Wan22().process_out(samples)
    samples, part = samples.clone(), slice(at, at + encoded.shape[2])
    samples[:, :, part] = encoded.to(samples)
    mask = latent.get("noise_mask")
    if mask is None or mask.shape[2:] != samples.shape[2:]:
        mask = torch.ones_like(samples[:, :1])
    mask = mask.clone()
    mask[:, :, part] = 0
    return latent | {"samples": samples, "noise_mask": mask}


@dataclass(eq=False)
class Going:
    """How parts are made: `sample` takes a LATENT, a prompt's number and a part's and gives a LATENT."""

    vae: Any
    sample: Callable[[dict[str, Any], int, int], dict[str, Any]]
    overlap: int
    hold_colours: bool

    def on(self, clip: Clip, prompts: int, new: int) -> np.ndarray:
        """The clip and, for each prompt, `new` frames more, float32 [T, H, W, 3] in 0..1."""
        seen = 4 * (min(self.overlap, (len(clip) - 1) // 4 + 1) - 1) + 1
        made, tail, number = [clip.astype(np.float32) / 255], clip[-seen:], 0
        for prompt in range(prompts):
            for count in lengths(new, MAX_FRAMES - seen):
                frames = self._part(tail, seen + count, prompt, number)
                made.append(frames[seen:])
                tail = to_levels(np.concatenate([made[-2][-seen:], made[-1]])[-seen:], (0.0, 1.0))
                number += 1
        return np.concatenate(made)

    def _part(self, tail: Clip, frames: int, prompt: int, number: int) -> np.ndarray:
        height, width = tail.shape[1:3]
        grid: Grid = latent_grid(width, height, frames)
        start = held({"samples": latents.empty_latent(grid)}, pictures.encode_frames(self.vae, tail), 0)
        pixels = latents.decode_latent(self.vae, self.sample(start, prompt, number)["samples"])
        out = pixels.float().cpu().numpy()
        if self.hold_colours:
            return matched(out, out[: len(tail)], tail.astype(np.float32) / 255)
        return out
