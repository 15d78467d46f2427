"""Lance's schedule, guidance and noise as ComfyUI's SIGMAS, GUIDER and NOISE."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..lance_core.errors import RequestError
from ..lance_core.model.sampler import Guidance, schedule, seeded_noise
from . import comfy_compat
from .conditioning import KEY, Prompt, dropped_conditioning
from .latents import check_latent
from .model import LanceModel


def sigmas(steps: int, shift: float, denoise: float) -> Tensor:
    """Times from 1 (or, for denoise < 1, from part of the way) to 0; the exact schedule of the released code
    at denoise 1.
    """
    if not 0 < denoise <= 1:
        raise RequestError(f"denoise is {denoise}, expected above 0 and at most 1.")
    return schedule(int(steps / denoise), shift)[-(steps + 1) :]


def require_lance(patcher: Any) -> None:
    """Refuse a MODEL of another family."""
    if not isinstance(patcher.model, LanceModel):
        raise RequestError(
            f"This node samples Lance and the model connected is {type(patcher.model).__name__}: connect "
            "the MODEL of Lance Loader."
        )


class IntervalGuider(comfy.samplers.CFGGuider):
    """Guidance inside an interval of time, renormalised, as lance_core's `Guidance` has it."""

    def __init__(self, model_patcher: Any, guidance: Guidance) -> None:
        require_lance(model_patcher)
        super().__init__(model_patcher)
        self.guidance = guidance
        self.set_cfg(guidance.scale)
        if guidance.active and "sampler_cfg_function" in self.model_options:
            logging.warning("Lance guidance replaces the CFG function another node has put on the model.")

    def set_conds(self, positive: Any, negative: Any) -> None:
        """Both branches and, where what is shown is guided on, the one without it."""
        conds = {"positive": positive, "negative": negative}
        if self.guidance.shows:
            conds["dropped"] = dropped_conditioning(positive)
        self.inner_set_conds(conds)

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        options = dict(model_options or {})
        active = self.guidance.applies(timestep.flatten()[0].float().cpu())
        if active:
            options["sampler_cfg_function"] = self._combine
        positive, negative = self.conds.get("positive"), self.conds.get("negative")
        scale = self.guidance.scale if active else 1.0
        if active and self.guidance.shows:
            return self._with_vision(x, timestep, options)
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, scale, model_options=options, seed=seed
        )

    def _with_vision(self, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> Tensor:
        """The guided prediction from all three branches, in one forward where memory allows."""
        conds = [self.conds.get(name) for name in ("positive", "negative", "dropped")]
        cond, uncond, dropped = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        options["sampler_cfg_function"] = partial(self._combine, dropped=x - dropped)
        return comfy.samplers.cfg_function(
            self.inner_model,
            cond,
            uncond,
            self.guidance.scale,
            x,
            timestep,
            model_options=options,
            cond=conds[0],
            uncond=conds[1],
        )

    def _combine(self, args: dict[str, Any], dropped: Tensor | None = None) -> Tensor:
        """ComfyUI's protocol: "cond" and "uncond" are x - denoised, velocity times sigma, so the ratio of
        norms is the velocity's.
        """
        floor = 1e-8 * args["sigma"].flatten()[0].float()
        without = None if dropped is None else dropped.float()
        return self.guidance.combine(
            args["cond"].float(), args["uncond"].float(), channels=1, floor=floor, dropped=without
        )


class SeededNoise:
    """NOISE in the layout Lance was trained with: a row per token, references first; result i of a batch has
    seed + i.
    """

    def __init__(self, seed: int, references: int = 0) -> None:
        self.seed, self.references = seed, references

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """[b, 48, t, h, w], float32 on the CPU, for LATENT."""
        samples = latent["samples"]
        index = latent.get("batch_index")
        offsets = index if index is not None else range(samples.shape[0])
        grid = tuple(samples.shape[2:])
        rows = [seeded_noise((self.seed + int(i)) % 2**64, grid, self.references) for i in offsets]
        return torch.stack(rows).permute(0, 4, 1, 2, 3).contiguous()


def reference_tokens(positive: Any) -> int:
    """How many rows of the noise the references of a conditioning take."""
    prompts = [c[1].get(KEY) for c in positive or ()]
    return max((p.encoded.reference_tokens for p in prompts if isinstance(p, Prompt)), default=0)


def fit_latent(patcher: Any, latent: dict[str, Any]) -> dict[str, Any]:
    """The LATENT with five axes and 48 channels, as stock samplers repair an empty one.

    Raises:
        RequestError: it holds another model's latent.
    """
    samples = comfy_compat.fix_empty_latent(patcher, latent)
    check_latent(samples)
    return {**latent, "samples": samples.unsqueeze(2) if samples.ndim == 4 else samples}


def sample(
    guider: IntervalGuider,
    noise: SeededNoise,
    sampler: str,
    times: Tensor,
    latent: dict[str, Any],
    callback: Any,
) -> dict[str, Any]:
    """Run one of ComfyUI's samplers; returns the LATENT."""
    latent = fit_latent(guider.model_patcher, latent)
    samples = guider.sample(
        noise.generate_noise(latent),
        latent["samples"],
        comfy.samplers.sampler_object(sampler),
        times,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        seed=noise.seed,
    )
    kept = {key: value for key, value in latent.items() if key not in comfy_compat.LATENT_TAGS}
    return {**kept, "samples": samples.to("cpu")}
