"""Nodes for chosen frames and long videos: Lance Keyframes and Lance Extend Video."""

from __future__ import annotations

from fractions import Fraction

import comfy.model_management as mm
import latent_preview
import torch
from comfy_api.latest import InputImpl, Types, io

from ..lance_core.config import OUTPUT_FPS
from ..lance_core.drawing.extend import MAX_OVERLAP
from ..lance_core.errors import RequestError
from ..lance_core.inputs import prompts as templates
from ..lance_core.inputs.preprocess import resize_frames, vae_size
from ..lance_core.inputs.tasks import SYSTEM_PROMPTS
from ..lance_core.model.sampler import Guidance
from ..lance_core.model.sequence import Branch
from . import longer, pictures, sampling
from .conditioning import Encoded, Prompt
from .nodes_latent import VIDEO_PRESETS
from .sockets import CATEGORY, LANCE, Reader, checked
from .widgets import seed_input

MAX_PARTS = 64


class LanceKeyframes(io.ComfyNode):
    """A LATENT with a picture kept at a chosen time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceKeyframes",
            display_name="Lance Keyframes",
            category=CATEGORY,
            is_experimental=True,
            description="Keeps a picture at a chosen time of a video: chain one node for each. "
            "First, and first "
            "with last, are what the weights know; other times are an experiment.",
            inputs=[
                io.Vae.Input("vae", tooltip="From Lance Loader."),
                io.Latent.Input(
                    "latent",
                    tooltip="Empty Lance Latent, Lance Image To Video Latent, or another Lance Keyframes.",
                ),
                io.Image.Input("image", tooltip="The picture. It is cropped to the latent's shape."),
                io.Int.Input(
                    "frame",
                    default=-1,
                    min=-121,
                    max=120,
                    tooltip=(
                        "Which frame, from 0; -1 is the last. Each four frames after the first share one."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "kept", display_name="latent", tooltip="With a noise mask that keeps the picture."
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls, vae, latent, image, frame: int) -> io.NodeOutput:
        if len(image) != 1:
            raise RequestError(
                f"{len(image)} images came for one frame: connect one, and chain a Lance Keyframes for each."
            )
        return io.NodeOutput(longer.keep(latent, vae, pictures.to_bytes(image)[0], frame))


class LanceExtendVideo(io.ComfyNode):
    """A clip and what comes after it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceExtendVideo",
            display_name="Lance Extend Video",
            category=CATEGORY,
            description="Goes on from the end of a clip, part after part, with a prompt for each.",
            inputs=[
                io.Model.Input("model", tooltip="From Lance Loader, LoRAs and patches applied."),
                LANCE.Input("lance", tooltip="From Lance Loader."),
                io.Vae.Input("vae", tooltip="From Lance Loader."),
                io.Image.Input(
                    "images", tooltip="The clip, at 12 frames a second; one picture starts a new one."
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What happens next: one line for each part.",
                ),
                io.Int.Input(
                    "frames",
                    default=48,
                    min=4,
                    max=7200,
                    step=4,
                    tooltip="New frames for each line, 12 a second.",
                ),
                io.Combo.Input(
                    "size",
                    options=VIDEO_PRESETS,
                    default="video_480p",
                    tooltip="The clip's own shape at this size.",
                ),
                io.Int.Input(
                    "overlap",
                    default=1,
                    min=1,
                    max=MAX_OVERLAP,
                    tooltip="Latent frames (of four) each part starts from. 1: the last frame, as "
                    "trained. More "
                    "also give the motion: an experiment.",
                ),
                io.Boolean.Input(
                    "hold_colours", default=True, tooltip="Bring each part's colours to those it starts from."
                ),
                seed_input(42, "Part i has seed + i."),
                io.Int.Input("steps", default=30, min=1, max=1000, tooltip="Denoising steps of each part."),
                io.Float.Input(
                    "cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale. 4 as released."
                ),
                io.Image.Input(
                    "before",
                    optional=True,
                    tooltip="Frames of a video so far, put in front: joins the shots of a story.",
                ),
            ],
            outputs=[
                io.Image.Output("whole", display_name="images", tooltip="Old and new frames."),
                io.Video.Output(
                    "video", display_name="video", tooltip="The same at 12 a second, for Save Video."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model,
        lance: Reader,
        vae,
        images,
        prompts,
        frames,
        size,
        overlap,
        hold_colours,
        seed,
        steps,
        cfg,
        before=None,
    ) -> io.NodeOutput:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines or len(lines) > MAX_PARTS:
            raise RequestError(
                f"{len(lines)} prompts came: write one line for each part, at most {MAX_PARTS}."
            )
        if lance.config.variant == "image":
            raise RequestError(
                f"{lance.name} is the image checkpoint and makes no video: load Lance_3B_Video in Lance "
                f"Loader."
            )
        clip = pictures.to_bytes(images)
        clip = resize_frames(clip, vae_size(clip.shape[2], clip.shape[1], size))
        guidance = Guidance(cfg)
        times = sampling.sigmas(steps, 3.5, 1.0)

        def sample(latent: dict, line: int, part: int) -> dict:
            mm.throw_exception_if_processing_interrupted()
            sequence = templates.generation(
                lance.tokenizer, SYSTEM_PROMPTS["t2v"], (), lines[line], (1, 1, 1)
            )
            encoded = Encoded(sequence, None, True, lance.config.tokens_per_second)
            guider = sampling.IntervalGuider(model, guidance)
            guider.set_conds(*(Prompt(encoded, branch).conditioning() for branch in Branch))
            noise = sampling.SeededNoise((seed + part) % 2**64)
            callback = latent_preview.prepare_callback(model, len(times) - 1)
            return sampling.sample(guider, noise, "euler", times, latent, callback)

        made = longer.Going(vae, sample, overlap, hold_colours).on(clip, len(lines), frames // 4 * 4)
        out = torch.from_numpy(made)
        if before is not None:
            shown = resize_frames(pictures.to_bytes(before), (made.shape[2], made.shape[1]))
            out = torch.cat([torch.from_numpy(shown).float() / 255, out])
        parts = Types.VideoComponents(images=out, frame_rate=Fraction(OUTPUT_FPS))
        return io.NodeOutput(out, InputImpl.VideoFromComponents(parts))
