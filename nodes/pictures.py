"""IMAGE and VIDEO -> what the model reads: the vision tower's blocks and clean latents, through ComfyUI's
models.
"""

from __future__ import annotations

import comfy.model_management as mm
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..lance_core.config import OUTPUT_FPS
from ..lance_core.errors import NumericsError, RequestError
from ..lance_core.inputs import media, preprocess
from ..lance_core.model.sequence import Kind, Role, Segment, VisualSegment
from . import host
from .types import EDIT, QUESTION, Lance, Vision


def to_bytes(images: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """IMAGE [n, h, w, c] in 0..1 -> uint8 [n, h, w, 3]; where mask (1 is transparent) says so, white shows
    through.
    """
    images = images.float().cpu()
    if not bool(torch.isfinite(images).all()):
        raise NumericsError("The image has NaN or infinity in it; look at the node it comes from.")
    if mask is not None and bool(
        mask.any()
    ):  # Load Image gives an empty one of 64x64 with a picture that has none
        mask = mask.float().cpu().reshape(-1, *mask.shape[-2:])
        if mask.shape[1:] != images.shape[1:3]:
            sizes = [f"{t.shape[2]}x{t.shape[1]}" for t in (mask, images)]
            raise RequestError(
                f"The mask is {sizes[0]} and the image {sizes[1]}: connect the mask of the same image."
            )
        images = torch.cat([images[..., :3], (1 - mask)[..., None].expand(len(images), -1, -1, -1)], dim=-1)
    levels = (images * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    if levels.shape[-1] == 4:  # as the core does it, so that the same picture gives the same bytes
        return np.stack([preprocess.rgb_from_image(Image.fromarray(frame, "RGBA")) for frame in levels])
    return np.ascontiguousarray(levels[..., :3])


def clip_of(video) -> np.ndarray:
    """The frames of a VIDEO the model sees, uint8 [n, h, w, 3].

    A file is read as the core reads it: hosts turn colours into RGB in different ways, and hold every frame
    in memory.
    """
    file = host.video_file(video)
    if file is not None:
        return media.read_clip(file, progress=host.progress())[0]
    components = video.get_components()
    return thin(components.images, float(components.frame_rate))


def thin(images: Tensor, fps: float) -> np.ndarray:
    """The frames of a clip the model sees, uint8; images [n, h, w, 3] at `fps`."""
    return to_bytes(images[preprocess.frame_indices(len(images), fps)])


def clips_of(images: Tensor | None, video, role: str, mask: Tensor | None) -> tuple[list[np.ndarray], bool]:
    """Clips uint8 [n, h, w, 3] to encode, and whether they are video: several images are references or a
    clip's frames.
    """
    if (images is None) == (video is None):
        raise RequestError("Connect an image or a video to Lance Vision Encode, one of the two.")
    if video is not None:
        return [clip_of(video)], True
    if role in (EDIT, QUESTION) and len(images) > 1:
        return [thin(images, OUTPUT_FPS)], True
    return [frame[None] for frame in to_bytes(images, mask)], False


def encode(
    lance: Lance,
    vae,
    clips: list[np.ndarray],
    video: bool,
    role: str,
    resolution: str,
    earlier: Vision | None,
) -> Vision:
    """Run the vision tower and, unless for a question, the VAE over the clips."""
    check_roles(lance, video, role, earlier, len(clips), vae)
    segments = list(earlier.segments) if earlier else []
    kind = Role.SOURCE if role == EDIT else Role.QUESTION if role == QUESTION else Role.SUBJECT
    for clip in clips:
        segments.append(see(lance, clip, resolution, kind))
        if role != QUESTION:
            latent = latent_of(vae, clip, resolution)
            t, h, w = latent.shape[:3]
            segments.append(VisualSegment(Kind.CLEAN, kind, (t, h, w), latent))
    return Vision(role, tuple(segments), video, lance.name)


def check_roles(lance: Lance, video: bool, role: str, earlier: Vision | None, count: int, vae) -> None:
    """Refuse what no task of the model takes, with the way out."""
    if earlier is not None and earlier.role != role:
        raise RequestError(
            f"The earlier vision is for the role {earlier.role!r} and this one for {role!r}: use one role "
            "for all of them."
        )
    if earlier is not None and role != "subject reference":
        raise RequestError(
            f"One picture or clip is all a {role} takes; only subject references can be appended to an "
            "earlier vision."
        )
    if video and role == "subject reference":
        raise RequestError(
            "Subject references are images: take a frame of the video (Get Video Components, then an image)."
        )
    if video and lance.config.variant == "image":
        raise RequestError(
            f"{lance.name} is the image checkpoint and cannot read video: load Lance_3B_Video."
        )
    if role != QUESTION and vae is None:
        raise RequestError(f"Connect a VAE: a {role} is also encoded as a latent.")
    if lance.vit is None:
        raise RequestError(
            f"{lance.name} came without its vision tower: put the folder Qwen2.5-VL-ViT beside it and load "
            "it again."
        )


def see(lance: Lance, clip: np.ndarray, resolution: str, role: Role) -> Segment:
    """The vision tower's block of a clip, kept on the CPU."""
    config = lance.config.vit
    patches, grid = preprocess.vit_patches(clip, resolution, config)
    device = lance.vit.load_device
    mm.load_models_gpu([lance.vit], memory_required=_vit_memory(config, len(patches), lance.compute))
    embeds = lance.vit.model(patches.to(device, lance.compute), [grid], progress=host.progress())
    if not bool(torch.isfinite(embeds).all()):
        raise NumericsError(
            "The vision tower gave NaN or infinity: the checkpoint is damaged, or fp16 overflowed; try bf16."
        )
    merge = config.spatial_merge_size
    return VisualSegment(
        Kind.VIT,
        role,
        grid=(grid[0], grid[1] // merge, grid[2] // merge),
        data=embeds.to(mm.intermediate_device()),
    )


def _vit_memory(config, patches: int, dtype: torch.dtype) -> int:
    """Bytes of activations: the widest moment is the feed-forward's three tensors beside the residual stream
    and q, k, v.
    """
    return patches * (3 * config.intermediate_size + 8 * config.hidden_size) * dtype.itemsize


def latent_of(vae, clip: np.ndarray, resolution: str) -> Tensor:
    """Normalised latent, float32 [t, h, w, 48], of a clip brought to the preset's size, by any Wan2.2 VAE."""
    return (
        normalised(encode_frames(vae, preprocess.vae_frames(clip, resolution)))[0]
        .permute(1, 2, 3, 0)
        .contiguous()
    )


def encode_frames(vae, frames: np.ndarray) -> Tensor:
    """Raw latent [1, 48, t, h, w] of frames uint8 [n, h, w, 3] whose size fits the VAE."""
    check_vae(vae)
    latent = vae.encode(torch.from_numpy(frames.astype(np.float32)) / 255)
    if not bool(torch.isfinite(latent).all()):
        raise NumericsError(
            "The VAE gave NaN or infinity while encoding: its file is damaged, or fp16 overflowed."
        )
    return latent
