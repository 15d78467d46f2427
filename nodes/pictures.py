"""IMAGE and VIDEO -> what the model sees: the vision tower's embeddings and clean latents, through ComfyUI's
models.

Requests are refused first, by what is connected alone; only then is a clip opened, decoded and encoded.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import numpy as np
import torch
from torch import Tensor

from ..lance_core.config import CELL, OUTPUT_FPS, Grid, latent_grid
from ..lance_core.errors import MediaError, NumericsError, RequestError
from ..lance_core.inputs import media, preprocess
from ..lance_core.inputs.clips import Pick
from ..lance_core.inputs.seen import ClipRange
from ..lance_core.inputs.sizes import Size
from ..lance_core.inputs.tasks import check_size
from ..lance_core.model.memory import vit_bytes
from ..lance_core.model.sequence import Kind, Role, Segment, VisualSegment
from . import comfy_compat
from .latents import check_latent, check_vae, normalised
from .sockets import EDIT, QUESTION, SUBJECT, Reader, Vision

Clip = np.ndarray  # uint8 [frames, height, width, 3]


def is_video(images: Tensor | None, video: Any, role: str) -> bool:
    """Whether what is connected is a clip: a VIDEO, or several images that are not subjects.

    Raises:
        RequestError: neither image nor video came, or both, or no image at all.
    """
    if (images is None) == (video is None):
        raise RequestError("Connect an image or a video to Lance Vision Encode, one of the two.")
    if images is not None and not len(images):
        raise RequestError("The image input is empty (a batch of 0 images): look at the node it comes from.")
    return images is None or (role != SUBJECT and len(images) > 1)


def check_request(reader: Reader, video: bool, role: str, earlier: Vision | None, vae: Any) -> None:
    """Refuse what no task of the model takes, with the way out."""
    if earlier is not None and earlier.role != role:
        raise RequestError(
            f"The earlier vision is for the role {earlier.role!r} and this one for {role!r}: use one role "
            "for all of them."
        )
    if earlier is not None and role == EDIT:
        raise RequestError(
            f"One picture or clip is all a {role} takes; only subject references can be appended to an "
            "earlier vision, and what a question is about."
        )
    if video and role == SUBJECT:
        raise RequestError(
            "Subject references are images: take a frame of the video (Get Video Components, then an image)."
        )
    if video and reader.config.variant == "image":
        raise RequestError(
            f"{reader.name} is the image checkpoint and cannot read video: load Lance_3B_Video."
        )
    if role != QUESTION and vae is None:
        raise RequestError(f"Connect a VAE: a {role} is also encoded as a latent.")
    if reader.vit is None:
        raise RequestError(
            f"{reader.name} came without its vision tower: put the folder Qwen2.5-VL-ViT beside it and load "
            "it again."
        )


def size_of(latent: dict[str, Any] | None, role: str) -> Size | None:
    """(width, height) of a LATENT whose size an edit source is to have; None without one.

    Raises:
        RequestError: the LATENT is another model's or too large, or it is not for an edit.
    """
    if latent is None:
        return None
    if role != EDIT:
        raise RequestError(f"size_from is for an edit source only, and the role is {role!r}: disconnect it.")
    samples = latent["samples"]
    check_latent(samples)
    return check_size(samples.shape[-1] * CELL, samples.shape[-2] * CELL)


def clips_of(
    images: Tensor | None, video: Any, role: str, mask: Tensor | None, part: ClipRange | None = None
) -> list[Clip]:
    """Clips to encode: the frames the model sees of a VIDEO or of an IMAGE that is one, or each image on its
    own. part: which frames of a clip, None for those of training.
    """
    pick = None if part is None else part.pick
    if images is None:
        return [_clip_of(video, pick)]
    if is_video(images, video, role):
        return [_thinned(images, OUTPUT_FPS, mask, pick)]
    return [frame[None] for frame in to_bytes(images, mask)]


def to_bytes(images: Tensor, mask: Tensor | None = None, picks: list[int] | None = None) -> Clip:
    """IMAGE [n, h, w, c] of any usual range as uint8 [n, h, w, 3]; where the mask (1 is transparent) says so,
    white shows through. picks: which of the images to keep.

    Raises:
        NumericsError: NaN or infinity.
        RequestError: a mask of another size or number, or a range that cannot be told.
    """
    if not bool(torch.isfinite(images).all()):
        raise NumericsError("The image has NaN or infinity in it; look at the node it comes from.")
    if mask is not None and bool(mask.any()):  # Load Image gives an empty one of 64x64 for a picture without
        height, width = images.shape[-3:-1]
        masks = mask.reshape(-1, *mask.shape[-2:])
        if masks.shape[1:] != (height, width):
            raise RequestError(
                f"The mask is {mask.shape[-1]}x{mask.shape[-2]} and the image {width}x{height}: connect the "
                "mask "
                "of the same image."
            )
        if len(masks) > len(images):
            raise RequestError(
                f"{len(masks)} masks came for {len(images)} image(s): connect a mask for each, or one for "
                "all."
            )
    try:
        return media.pictures(images, mask, picks)
    except MediaError as error:
        raise RequestError(f"The image cannot be used: {error} Look at the node it comes from.") from None


def _thinned(images: Tensor, fps: float, mask: Tensor | None = None, pick: Pick | None = None) -> Clip:
    """The frames of a clip the model sees; images [n, h, w, c] at `fps`."""
    return to_bytes(images, mask, (pick or preprocess.frame_indices)(len(images), fps))


def _clip_of(video: Any, pick: Pick | None = None) -> Clip:
    """The frames of a VIDEO the model sees.

    A file is read as lance_core reads it: ComfyUI's versions turn colours into RGB in different ways, and
    hold every frame in memory.
    """
    file = comfy_compat.video_file(video)
    if file is not None:
        return media.read_clip(file, pick=pick, progress=comfy_compat.progress())[0]
    components = video.get_components()
    return _thinned(components.images, float(components.frame_rate), pick=pick)


def encode(
    reader: Reader,
    vae: Any,
    clips: list[Clip],
    video: bool,
    role: str,
    resolution: str,
    earlier: Vision | None,
    size: Size | None = None,
) -> tuple[Vision, Grid]:
    """Run the vision tower and, unless for a question, the VAE over the clips.

    size: (width, height) of the clean latents in pixels, if not what the resolution gives a clip.
    Returns: what the model sees, and the latent grid that the last clip has at this resolution.
    """
    segments = list(earlier.segments) if earlier else []
    kind = {EDIT: Role.SOURCE, QUESTION: Role.QUESTION}.get(role, Role.SUBJECT)
    for clip in clips:
        pixels = size or preprocess.vae_size(clip.shape[2], clip.shape[1], resolution)
        grid = latent_grid(*pixels, len(clip))
        segments.append(embed(reader, clip, resolution, kind))
        if role != QUESTION:
            segments.append(VisualSegment(Kind.CLEAN, kind, grid, latent_of(vae, clip, pixels)))
    seen_before = earlier is not None and earlier.video
    return Vision(role, tuple(segments), video or seen_before, reader.name), grid


def embed(reader: Reader, clip: Clip, resolution: str, role: Role) -> Segment:
    """The vision tower's block of a clip, kept on the CPU."""
    config, tower = reader.config.vit, reader.vit
    if config is None or tower is None:
        raise RequestError(f"{reader.name} came without its vision tower.")
    patches, (t, h, w) = preprocess.vit_patches(clip, resolution, config)
    needed = vit_bytes(config, len(patches), reader.compute.itemsize)
    mm.load_models_gpu([tower], memory_required=needed)
    given = patches.to(tower.load_device, reader.compute)
    embeds = tower.model(given, [(t, h, w)], progress=comfy_compat.progress())
    if not bool(torch.isfinite(embeds).all()):
        raise NumericsError(
            "The vision tower gave NaN or infinity: the checkpoint is damaged, or fp16 overflowed; try bf16."
        )
    merge = config.spatial_merge_size
    return VisualSegment(Kind.VIT, role, (t, h // merge, w // merge), embeds.to(mm.intermediate_device()))


def latent_of(vae: Any, clip: Clip, size: Size) -> Tensor:
    """Normalised latent, float32 [t, h, w, 48], of a clip brought to (width, height), by any Wan2.2 VAE."""
    latent = encode_frames(vae, preprocess.resize_frames(clip, size))
    return normalised(latent)[0].permute(1, 2, 3, 0).contiguous()


def encode_frames(vae: Any, frames: Clip) -> Tensor:
    """Raw latent [1, 48, t, h, w] of frames whose size fits the VAE."""
    check_vae(vae)
    latent = vae.encode(torch.from_numpy(frames.astype(np.float32)) / 255)
    if not bool(torch.isfinite(latent).all()):
        raise NumericsError(
            "The VAE gave NaN or infinity while encoding: its file is damaged, or fp16 overflowed."
        )
    return latent
