"""What other nodes have put on the conditionings of a sampling run, looked over before anything is loaded.

Stock nodes write into a conditioning's dictionary whatever the model they were made for reads. Lance reads
its prompt, and ComfyUI itself strengths, times, hooks, areas and masks. The rest would be ignored without a
word, so it is refused where the picture would not be what was asked for, and else told in a warning.

Areas and masks are counted in cells of 8 pixels by the nodes that set them; Lance's cells are of 16.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ..lance_core.config import CELL, FRAMES_PER_LATENT
from ..lance_core.errors import NumericsError, RequestError
from ..lance_core.model.sequence import Role, clean_latents
from .conditioning import KEY, Prompt
from .patcher import blame

STOCK_CELL = 8  # pixels, in which ConditioningSetArea counts

SHOW = (
    "show the picture to Lance Vision Encode instead, as 'edit source' or 'subject reference', and connect "
    "its vision to Lance Text Encode"
)
START = (
    "to start a video with a picture use Lance Image To Video Latent; for inpainting, set a noise mask on "
    "the latent"
)
TAKE_OUT = "take that node out"

# key in a conditioning -> the nodes that put it there, and what to do instead
REFUSED: dict[str, tuple[str, str]] = {
    "reference_latents": ("Reference Latent, or an encoder for another edit model,", SHOW),
    "ref_latent": ("a node for Hunyuan's image to video", START),
    "guiding_frame_index": ("a node for Hunyuan's image to video", START),
    "concat_latent_image": ("WanImageToVideo, or a node like it,", START),
    "concat_image": ("a node for another upscaling model", TAKE_OUT),
    "time_dim_concat": ("Wan's phantom or subject node", SHOW),
    "time_dim_replace": ("Kandinsky5ImageToVideo", START),
    "context_latents": ("a node for Wan's context latents", SHOW),
    "control": (
        "Apply ControlNet",
        "Lance has no control nets, so take it out; to keep a picture's layout, edit it",
    ),
    "gligen": ("GLIGEN Textbox Apply", "use Conditioning (Set Area) for what shall be where"),
    "clip_vision_output": ("a node with a CLIP vision output", SHOW),
    "clip_vision_output_ref": ("a node with a CLIP vision output", SHOW),
    "clip_vision_outputs": ("a node with a CLIP vision output", SHOW),
    "unclip_conditioning": ("unCLIPConditioning", SHOW),
    "vace_frames": ("WanVaceToVideo", SHOW),
    "camera_conditions": ("WanCameraImageToVideo", TAKE_OUT),
    "audio_embed": ("a node for Wan's sound to video", TAKE_OUT),
    "ref_audio": ("a node for LTX's sound", TAKE_OUT),
    "reference_audio_timbre_latents": ("a node for ACE's sound", TAKE_OUT),
    "reference_motion": ("a node for Wan's sound to video", TAKE_OUT),
    "control_video": ("a node for Wan's control videos", TAKE_OUT),
    "pose_video_latent": ("a node for Wan's pose videos", TAKE_OUT),
    "face_video_pixels": ("WanAnimateToVideo", TAKE_OUT),
    "driving_mask_28ch": ("a node for SCAIL", TAKE_OUT),
    "ref_mask_28ch": ("a node for SCAIL", TAKE_OUT),
    "keyframe_idxs": ("LTXVAddGuide", START),
    "guide_attention_entries": ("LTXVAddGuide", START),
    "generated_keyframes": ("a node for LTX's keyframes", START),
    "minimax_keyframes": ("a node for MiniMax's keyframes", START),
    "minimax_refs": ("a node for MiniMax's references", SHOW),
    "stable_cascade_prior": ("StableCascade_StageB_Conditioning", TAKE_OUT),
    "lq_latent": ("a node for another upscaling model", TAKE_OUT),
}
# What Lance or ComfyUI's sampling reads, or fills in itself.
READ = frozenset(
    (
        *(KEY, "cross_attn", "model_conds", "uuid", "device", "noise", "width", "height", "prompt_type"),
        *("latent_image", "latent_shapes", "denoise_mask", "seed", "area", "strength", "set_area_to_bounds"),
        *("mask", "mask_strength", "start_percent", "end_percent", "timestep_start", "timestep_end"),
        *("clip_start_percent", "clip_end_percent", "hooks", "default", "additional_models"),
        # These come with others that count, or change nothing by themselves.
        *("pooled_output", "concat_latent_image", "concat_mask", "control_apply_to_uncond"),
    )
)
# Keys that only some nodes write, named so that people find them.
WRITERS = {
    "guidance": "FluxGuidance (Lance's own is the sampler's cfg)",
    "reference_latents_method": "FluxKontextMultiReferenceLatentMethod",
    "frame_rate": "LTXVConditioning (Lance makes 12 frames a second)",
    "lyrics_strength": "a node for ACE's songs",
}


def review(guider: Any, shape: Sequence[int], denoise_mask: Any) -> None:
    """Look over the conditionings of a guider's run, and place their areas and masks.

    shape: of the noise, [b, 48, t, h, w]. Its lists are changed, the dictionaries in them are not.

    Raises:
        RequestError: a conditioning asks for what Lance does not do, with what to use instead.
    """
    ignored: set[str] = set()
    windows = (guider.model_options or {}).get("context_handler") is not None
    for listed in guider.conds.values():
        for i, cond in enumerate(listed):
            prompt = cond.get(KEY)
            if not isinstance(prompt, Prompt):  # refused when it is encoded
                continue
            present = {key for key, value in cond.items() if value is not None}
            if denoise_mask is not None:
                present -= {"concat_latent_image"}
            for key in sorted(present & REFUSED.keys()):
                writer, instead = REFUSED[key]
                raise RequestError(
                    f"{writer} has put {key!r} on the conditioning, which Lance does not read: {instead}."
                )
            ignored |= present - READ - REFUSED.keys()
            listed[i] = placed(cond, tuple(shape[2:]), prompt)
            if windows and listed[i].get("mask") is not None:
                check_windows(listed[i]["mask"], shape[2])
    for key in sorted(ignored):
        writer = WRITERS.get(key, "a node for another model")
        logging.warning("Lance ignores %r, which %s has put on the conditioning.", key, writer)


def check_made(samples: Tensor, guider: Any) -> None:
    """Refuse what a guider's run has made if it would decode to black.

    Raises:
        NumericsError: NaN or infinity in it, with what is at fault.
    """
    if not bool(torch.isfinite(samples).all()):
        raise NumericsError(f"Denoising gave NaN or infinity: {blame(guider.model_patcher)}")


def check_windows(mask: Tensor, frames: int) -> None:
    """Refuse a mask [batch, t, h, w] in cells that context windows would cut along a wrong axis, or not at
    all: they take the third for time.
    """
    if mask.shape[1] > 1 or mask.shape[2] == frames:
        raise RequestError(
            "Context windows cannot cut the mask of a conditioning: take one of them out, or use one mask "
            "for all frames with set_cond_area 'default' and another number of frames."
        )


def placed(cond: dict[str, Any], dims: tuple[int, ...], prompt: Prompt) -> dict[str, Any]:
    """A conditioning whose area and mask are in latent cells; itself where it has neither.

    dims: frames, rows and columns of the latent.
    """
    out = dict(cond)
    if cond.get("mask") is not None:
        mask = mask_in_cells(cond["mask"], dims)
        if cond.get("set_area_to_bounds"):
            out["area"], out["set_area_to_bounds"] = bounds(mask, dims), False
        # ComfyUI takes an area's frames out of the mask's.
        out["mask"] = mask.expand(-1, dims[0], -1, -1) if out.get("area") is not None else mask
    if out.get("area") is not None:
        out["area"] = area_in_cells(tuple(out["area"]), dims)
        sizes = tuple(map(min, out["area"][: len(dims)], dims))
        source = any(s.role is Role.SOURCE for s in clean_latents(prompt.encoded.sequence.context))
        if source and sizes != dims:
            raise RequestError(
                "What is to be edited is as large as the whole picture, so its prompt cannot be set to an "
                "area: use Conditioning (Set Mask) with set_cond_area 'default'."
            )
    return out


def area_in_cells(area: tuple[Any, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    """An area as a node set it -> (frames, rows, columns, and where each begins) in latent cells.

    Edges are rounded to the nearest cell, so that areas which touch in pixels touch here.

    Raises:
        RequestError: it lies outside of the picture.
    """
    if area[0] == "percentage":
        shares = area[1:]
        sizes, starts = shares[: len(shares) // 2], shares[len(shares) // 2 :]
        scale: tuple[float, ...] = dims[-len(sizes) :]
    elif len(area) == 4:
        sizes, starts = area[:2], area[2:]
        scale = (STOCK_CELL / CELL,) * 2
    else:
        return area
    first, last = [], []
    for size, start, per, whole in zip(sizes, starts, scale, dims[-len(sizes) :], strict=True):
        begin, end = _nearest(start * per), min(_nearest((start + size) * per), whole)
        if begin >= whole:
            width, height = dims[-1] * CELL, dims[-2] * CELL
            raise RequestError(
                f"An area set on the conditioning begins outside of the picture, which is {width}x{height} "
                "pixels: give Conditioning (Set Area) an x and y inside of it."
            )
        first.append(begin)
        last.append(max(end, begin + 1))
    missing = len(dims) - len(first)  # an area without time is of all frames
    first, last = [0] * missing + first, [*dims[:missing], *last]
    return (*(end - begin for begin, end in zip(first, last, strict=True)), *first)


def _nearest(cells: float) -> int:
    return math.floor(cells + 0.5)


def mask_in_cells(mask: Tensor, dims: tuple[int, ...]) -> Tensor:
    """MASK [n, h, w] -> [batch, t or 1, h, w] in cells: one for all, one per picture of a batch, or one per
    frame.

    Raises:
        RequestError: as many masks as neither frames nor pictures.
    """
    if mask.ndim > 3:
        return mask
    frames, rows, columns = dims
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    mask = comfy.utils.common_upscale(mask[:, None], columns, rows, "bilinear", "disabled")[:, 0]
    pixel_frames = (frames - 1) * FRAMES_PER_LATENT + 1
    if len(mask) == 1:
        return mask[None]
    if frames == 1:
        return mask[:, None]
    if len(mask) == pixel_frames:  # a latent frame stands for the four that end with this one
        mask = mask[::FRAMES_PER_LATENT]
    if len(mask) != frames:
        raise RequestError(
            f"{len(mask)} masks came with a conditioning for a video of {pixel_frames} frames: connect one "
            "mask for all frames, or one for each."
        )
    return mask[None]


def bounds(mask: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest area of all frames that holds what a mask [batch, t, h, w] shows; one cell if that is
    nothing.
    """
    shown = (mask != 0).any(0).any(0)
    if not bool(shown.any()):
        return (dims[0], 1, 1, 0, 0, 0)
    rows, columns = torch.where(shown)
    top, left = int(rows.min()), int(columns.min())
    return (dims[0], int(rows.max()) + 1 - top, int(columns.max()) + 1 - left, 0, top, left)
