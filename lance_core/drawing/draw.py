"""Drawing a checked request: media encoded, context computed, noise denoised, latents decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..components import Components
from ..config import LATENT_CHANNELS, OUTPUT_FPS, Grid, latent_frames, latent_grid
from ..errors import NumericsError, RequestError
from ..inputs import media, prompts, tasks
from ..model.denoise import denoise
from ..model.dual_expert import Plan, Prepared
from ..model.references import prefill_without_references
from ..model.sampler import seeded_noise
from ..model.sequence import Role, Segment, Sequence, clean_latents
from . import keyframes
from .request import Callback, Checked, Generated


def draw(components: Components, asked: Checked) -> Generated:
    """Make what was asked for.

    Raises:
        RequestError, MediaError, CheckpointError, NumericsError.
    """
    latent = draw_latent(components, asked)
    pixels = components.decode_vae(latent)
    said = described(asked, pixels) | {"checkpoint": components.checkpoint.path.name}
    if asked.batch == 1:
        latent, pixels = latent[0], pixels[0]
    return Generated(latent, pixels, OUTPUT_FPS, said)


def draw_latent(components: Components, asked: Checked) -> Tensor:
    """The request's latents, normalised float32 [b, t, h, w, 48]."""
    task, request = asked.task, asked.request
    sources = read_sources(components, asked)
    kept = dict(request.kept)
    if task.name == "i2v":
        first = components.encode_vae(sources[0], asked.resolution)
        kept[0] = first[0]
        segments: list[Segment] = []
        grid: Grid = (latent_frames(asked.frames), first.shape[1], first.shape[2])
    else:
        role = Role.SUBJECT if task.takes == "references" else Role.SOURCE
        segments = [s for clip in sources for s in components.visual_segments(clip, asked.resolution, role)]
        clean = clean_latents(segments)
        grid = clean[0].grid if role is Role.SOURCE and clean else latent_grid(*asked.size, asked.frames)
    kept |= keyframes.encode(components, asked.keyframes, grid)
    windows = request.windows if request.windows is not None and grid[0] > request.windows.size else None
    window = grid if windows is None else (windows.size, *grid[1:])
    system = task.default_system_prompt if request.system_prompt is None else request.system_prompt
    sequence = prompts.generation(components.checkpoint.tokenizer, system, segments, request.prompt, window)
    prepared, dropped = _prefill(components, sequence, asked)
    x = _noise(components, asked, grid, sum(s.visual for s in clean_latents(segments)))

    def step(i: int, total: int, latent: Tensor) -> None:
        components.report("denoising", i, total)
        if request.callback is not None:
            (request.callback if asked.batch > 1 else unbatched(request.callback))(i, total, latent)

    try:
        experts = components.experts()
        return denoise(
            experts,
            prepared,
            x,
            asked.times,
            asked.guidance,
            kept=kept,
            dropped=dropped,
            windows=windows,
            callback=step,
        )
    except NumericsError as error:
        raise NumericsError(f"{error}{components.blame('gen', 'und')}") from None


def read_sources(components: Components, asked: Checked) -> list[np.ndarray]:
    """The request's media as 8-bit clips [T, H, W, 3], videos already thinned to the frames the model
    sees.
    """
    takes, request = asked.task.takes, asked.request
    if takes == "video":

        def progress(done: int, total: int) -> None:
            components.report("reading the clip", done, total)

        return [media.read_clip(request.video, progress=progress)[0]]
    if takes == "references":
        given = request.references
        return [media.load_image(r)[None] for r in (given if isinstance(given, list | tuple) else [given])]
    return [media.load_image(request.image)[None]] if takes == "image" else []


def _prefill(components: Components, sequence: Sequence, asked: Checked) -> tuple[Prepared, Prepared | None]:
    """The request's context, and where guidance needs it the one without caption and references."""
    guidance, rate = asked.guidance, components.config.tokens_per_second
    negative = prompts.negative(components.checkpoint.tokenizer, asked.request.negative_prompt, sequence)
    plan = Plan.of(sequence, rate, guidance.active, negative)
    counted = components.counted("prefilling", [plan.prefix, *plan.rests.values()])
    experts = components.experts(attention=counted)
    prepared = experts.prefill(plan)
    return prepared, prefill_without_references(experts, prepared, rate) if guidance.shows else None


def _noise(components: Components, asked: Checked, grid: Grid, before: int) -> Tensor:
    """Starting noise [batch, t, h, w, 48] on the device: a row per latent token of the whole sequence,
    references first.
    """
    noise, batch = asked.request.noise, asked.batch
    if noise is None:
        rows = [seeded_noise(asked.seed + i, grid, before) for i in range(batch)]
        return torch.stack(rows).to(components.device)
    tasks.check_noise(noise, batch, grid)
    try:
        noise = torch.as_tensor(noise, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"noise is no array of numbers ({str(error)[:200]})") from None
    if not bool(torch.isfinite(noise).all()):
        raise NumericsError("the noise given has NaN or infinity in it")
    return noise.reshape(batch, *grid, LATENT_CHANNELS).to(components.device)


def described(asked: Checked, pixels: Tensor) -> dict[str, Any]:
    """What was asked, JSON-ready. pixels: [b, T, H, W, 3]."""
    request, guidance = asked.request, asked.guidance
    said: dict[str, Any] = {
        "task": asked.task.name,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "system_prompt": request.system_prompt,
        "resolution": asked.resolution,
        "width": pixels.shape[3],
        "height": pixels.shape[2],
        "num_frames": pixels.shape[1],
        "steps": len(asked.times) - 1,
        "shift": float(request.shift),
        "cfg": guidance.scale,
        "cfg_interval": list(guidance.interval),
        "renorm": guidance.renorm,
        "renorm_min": guidance.renorm_min,
        "seed": asked.seed,
    }
    if guidance.shows:
        said["cfg_vision"] = guidance.vision
    if asked.keyframes:
        said["keyframes"] = sorted(asked.keyframes)
    if request.windows is not None:
        w = request.windows
        said["windows"] = {"length": w.length, "overlap": w.overlap, "blend": w.blend}
    return said


def unbatched(callback: Callback) -> Callable[[int, int, Tensor], None]:
    """A callback that sees [t, h, w, 48] as results of a single request do."""
    return lambda step, total, latent: callback(step, total, latent[0])
