"""Nodes that make latents and turn them into frames."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import comfy.latent_formats
import torch
from comfy_api.latest import InputImpl, Types, io

from ..lance_core.config import (
    CELL,
    FRAMES_PER_LATENT,
    MAX_FRAMES,
    MAX_LATENT_SIDE,
    OUTPUT_FPS,
    RELEASED_LLM,
    latent_frames,
    latent_grid,
    pixel_frames,
)
from ..lance_core.errors import RequestError
from ..lance_core.inputs.preprocess import crop_resize, vae_size
from ..lance_core.inputs.sizes import PRESETS
from ..lance_core.inputs.tasks import SIZES, check_size
from ..lance_core.model.experts import expert_parameters
from ..lance_core.model.memory import DenoisingMemory
from . import comfy_compat, latents, pictures
from .sockets import CATEGORY, checked

CUSTOM = "custom"
SIZE_PRESETS = list(SIZES)
VIDEO_PRESETS = ["video_480p", "video_360p", "video_192p"]
MAX_SIDE = MAX_LATENT_SIDE * CELL
LONGEST = 1201  # frames of a latent that context windows sample
WIDEST = max(side for by_aspect in SIZES.values() for size in by_aspect.values() for side in size)
ASPECTS = list(SIZES["image_768res"])


def _frames_input(default: int) -> io.Int.Input:
    return io.Int.Input(
        "frames",
        default=default,
        min=1,
        max=LONGEST,
        step=FRAMES_PER_LATENT,
        tooltip=f"1 makes an image. Videos have 4k+1 frames at {OUTPUT_FPS} a second, at most {MAX_FRAMES} "
        f"({MAX_FRAMES // OUTPUT_FPS} s), or more with Wan Context Windows on the model.",
    )


def _frames(asked: int) -> int:
    """Frames of a latent, lowered to 4k+1. How many the model makes at once is known when it samples."""
    return pixel_frames(latent_frames(asked))


BF16 = 2  # bytes


@cache
def canvas_facts() -> dict[str, Any]:
    """What the canvas's script needs to say what a size means; it travels with the node's schema.

    Bytes are those of the released model in bfloat16.
    """
    memory = DenoisingMemory.of(RELEASED_LLM, BF16).to_json()
    return {
        "sizes": SIZES,
        "sides": {preset: PRESETS[preset][0] for preset in VIDEO_PRESETS},
        "cell": CELL,
        "frames_per_latent": FRAMES_PER_LATENT,
        "max_side": MAX_SIDE,
        "max_frames": MAX_FRAMES,
        "fps": OUTPUT_FPS,
        "memory": memory | {"weights": BF16 * expert_parameters(RELEASED_LLM)},
    }


def _size_input() -> io.Combo.Input:
    size = io.Combo.Input(
        "size",
        options=[*SIZE_PRESETS, CUSTOM],
        default="image_768res",
        tooltip="Sizes the model was trained for; 768 for images, 480p or 360p for video. custom: width and "
        "height below.",
    )
    return comfy_compat.with_extra(size, {"lance": canvas_facts()})


BATCH = {
    "default": 1,
    "min": 1,
    "max": 64,
    "tooltip": "How many to make; Lance Sampler gives them seed, seed+1, …",
}


class EmptyLanceLatent(io.ComfyNode):
    """An empty LATENT by preset and aspect, or by width and height."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EmptyLanceLatent",
            display_name="Empty Lance Latent",
            category=CATEGORY,
            description="The size of what is to be made from text or subjects.",
            inputs=[
                _size_input(),
                io.Combo.Input(
                    "aspect", options=ASPECTS, default="1:1", tooltip="Width to height, for the presets."
                ),
                io.Int.Input(
                    "width",
                    default=768,
                    min=16,
                    max=WIDEST,
                    step=16,
                    tooltip="Pixels, for custom; at most 1024 (1168 by 496).",
                ),
                io.Int.Input(
                    "height",
                    default=768,
                    min=16,
                    max=WIDEST,
                    step=16,
                    tooltip="Pixels, for custom; at most 1024.",
                ),
                _frames_input(1),
                io.Int.Input("batch_size", **BATCH),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent")],
        )

    @classmethod
    @checked
    def execute(
        cls, size: str, aspect: str, width: int, height: int, frames: int, batch_size: int
    ) -> io.NodeOutput:
        w, h = check_size(width, height) if size == CUSTOM else SIZES[size][aspect]
        grid = latent_grid(w, h, _frames(frames))
        return io.NodeOutput({"samples": latents.empty_latent(grid, batch_size)})


class LanceImageToVideoLatent(io.ComfyNode):
    """A LATENT whose first frame is a picture and stays it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceImageToVideoLatent",
            display_name="Lance Image To Video Latent",
            category=CATEGORY,
            description="Starts a video with a picture, which is kept as its first frame.",
            inputs=[
                io.Vae.Input("vae", tooltip="From Lance Loader."),
                io.Image.Input(
                    "start_image", tooltip="The first frame. It is cropped to the nearest trained shape."
                ),
                io.Combo.Input(
                    "size",
                    options=[*VIDEO_PRESETS, CUSTOM],
                    default="video_480p",
                    tooltip="The picture's own shape at this size, or custom: width and height below.",
                ),
                io.Int.Input(
                    "width", default=848, min=16, max=MAX_SIDE, step=16, tooltip="Pixels, for custom."
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=MAX_SIDE, step=16, tooltip="Pixels, for custom."
                ),
                _frames_input(49),
                io.Int.Input("batch_size", **BATCH),
            ],
            outputs=[
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="With a noise mask that keeps the first frame; for any sampler.",
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, vae, start_image, size: str, width: int, height: int, frames: int, batch_size: int
    ) -> io.NodeOutput:
        if len(start_image) != 1:
            raise RequestError(
                f"{len(start_image)} images came as the first frame: connect one (Image From Batch picks "
                "one)."
            )
        picture = pictures.to_bytes(start_image)[0]
        w, h = (
            check_size(width, height)
            if size == CUSTOM
            else vae_size(picture.shape[1], picture.shape[0], size)
        )
        first = pictures.encode_frames(vae, crop_resize(picture, (w, h))[None])
        samples = comfy.latent_formats.Wan22().process_out(
            latents.empty_latent(latent_grid(w, h, _frames(frames)))
        )
        samples[:, :, :1] = first.to(samples)
        mask = torch.ones_like(samples[:, :1])
        mask[:, :, :1] = 0
        repeat = (batch_size, 1, 1, 1, 1)
        return io.NodeOutput({"samples": samples.repeat(repeat), "noise_mask": mask.repeat(repeat)})


class LanceVAEDecode(io.ComfyNode):
    """LATENT -> IMAGE frames and VIDEO at 12 fps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceVAEDecode",
            display_name="Lance VAE Decode",
            category=CATEGORY,
            description="Turns a latent into images, and into a video at Lance's 12 frames a second.",
            inputs=[
                io.Vae.Input("vae", tooltip="From Lance Loader."),
                io.Latent.Input("samples", tooltip="From the sampler."),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    tooltip="All frames; a batch's results one after the other.",
                ),
                io.Video.Output(
                    "video", display_name="video", tooltip="The same frames at 12 a second, for Save Video."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, vae, samples) -> io.NodeOutput:
        images = latents.decode_latent(vae, samples["samples"])
        video = InputImpl.VideoFromComponents(
            Types.VideoComponents(images=images, frame_rate=Fraction(OUTPUT_FPS))
        )
        return io.NodeOutput(images, video)
