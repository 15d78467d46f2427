"""Nodes that load the model and encode what goes into it."""

from __future__ import annotations

from comfy_api.latest import io

from ..lance_core.errors import RequestError
from ..lance_core.inputs import prompts
from ..lance_core.inputs.seen import ClipRange
from ..lance_core.inputs.sizes import PRESETS
from ..lance_core.inputs.tasks import SYSTEM_PROMPTS, check_text
from ..lance_core.model.sequence import Branch
from . import checkpoints, latents, loader, pictures
from .conditioning import Encoded, Prompt
from .sockets import CATEGORY, EDIT, LANCE, LANCE_VISION, QUESTION, ROLES, Reader, Vision, checked
from .widgets import range_inputs

AUTO = "auto"


class LanceLoader(io.ComfyNode):
    """Checkpoint -> MODEL, LANCE, VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceLoader",
            display_name="Lance Loader",
            category=CATEGORY,
            description="Loads a Lance checkpoint: the model for samplers, what reads text and pictures, "
            "and the VAE.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=checkpoints.choices(),
                    tooltip="A checkpoint under models/lance: a released folder or a converted file. "
                    "Lance_3B makes the better images, Lance_3B_Video "
                    "does every task. One marked (download, …) is fetched when you run it, and only then.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(checkpoints.DTYPES),
                    default="default",
                    tooltip="How the weights are kept. default: what suits this machine, usually bf16. "
                    "fp8_e4m3fn halves the memory and is "
                    "reported to cost fine detail. Layers of a converted file that are fp8, int8, int4 or "
                    "nvfp4 stay so; the last two are for "
                    "questions only.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="For samplers, LoRA loaders and model patches."),
                LANCE.Output("LANCE", tooltip="Reads prompts, pictures and questions."),
                io.Vae.Output("VAE", tooltip="Wan2.2's VAE, as every VAE node takes it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str = "") -> bool | str:
        return checkpoints.refusal(checkpoint) or True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **kwargs) -> str:
        return checkpoints.fingerprint(checkpoint)

    @classmethod
    @checked
    def execute(cls, checkpoint: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(*loader.load(checkpoints.fetch(checkpoint, cls.hidden.unique_id), weight_dtype))


class LanceVisionEncode(io.ComfyNode):
    """IMAGE or VIDEO -> LANCE_VISION, and a LATENT of its size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceVisionEncode",
            display_name="Lance Vision Encode",
            category=CATEGORY,
            description="Shows pictures or a clip to Lance: as the source of an edit, as subjects to keep, "
            "or to be asked about.",
            inputs=[
                LANCE.Input("lance", tooltip="From Lance Loader."),
                io.Combo.Input(
                    "role",
                    options=list(ROLES),
                    default=EDIT,
                    tooltip="edit source: the picture or clip to change. subject reference: who or what "
                    "shall appear. question: to be asked about.",
                ),
                io.Combo.Input(
                    "resolution",
                    options=[AUTO, *PRESETS],
                    default=AUTO,
                    tooltip="How large it is read, and how large an edit comes out. auto: image_768res for "
                    "images, video_480p for clips. "
                    "For the subjects of a video take video_480p.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Needed for edits and subjects, not for questions."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="One image; several are subjects, or for an edit or a question the frames of a "
                    "12 fps clip.",
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="A clip of any length; up to 6 seconds' worth of frames are picked from all of "
                    "it.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Load Image's mask: transparent parts are shown as white, as in training.",
                ),
                LANCE_VISION.Input(
                    "earlier",
                    optional=True,
                    tooltip="Subjects, or pictures and clips of a question, encoded before; these are added.",
                ),
                io.Latent.Input(
                    "size_from",
                    optional=True,
                    tooltip="A latent whose width and height an edit source is encoded at, for a second, "
                    "larger pass; resolution then is the size at which it is read.",
                ),
                *range_inputs(),
            ],
            outputs=[
                LANCE_VISION.Output(
                    "vision", display_name="vision", tooltip="For Lance Text Encode or Lance Understand."
                ),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="Empty, of the size an edit of this comes out in: connect it to the sampler.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        lance: Reader,
        role: str,
        resolution: str,
        vae=None,
        image=None,
        video=None,
        mask=None,
        earlier: Vision | None = None,
        size_from=None,
        clip_fps: float = 0.0,
        clip_start: float = 0.0,
        clip_length: float = 0.0,
        clip_frames: int = 0,
    ) -> io.NodeOutput:
        video_given = pictures.is_video(image, video, role)
        pictures.check_request(lance, video_given, role, earlier, vae)
        size = pictures.size_of(size_from, role)
        part = ClipRange(clip_fps or None, clip_start or None, clip_length or None, clip_frames or None)
        if part != ClipRange() and role != QUESTION:
            raise RequestError(
                "clip_fps, clip_start, clip_length and clip_frames are for questions: an edit changes "
                "the whole clip. Set them to 0, or cut the clip first."
            )
        if resolution == AUTO:
            resolution = "video_480p" if video_given else "image_768res"
        clips = pictures.clips_of(image, video, role, mask, part)
        seen, grid = pictures.encode(lance, vae, clips, video_given, role, resolution, earlier, size)
        return io.NodeOutput(seen, {"samples": latents.empty_latent(grid)})


class LanceTextEncode(io.ComfyNode):
    """Prompt -> CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceTextEncode",
            display_name="Lance Text Encode",
            category=CATEGORY,
            description="Encodes a prompt, with the pictures it speaks of, for any sampler.",
            inputs=[
                LANCE.Input("lance", tooltip="From Lance Loader."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to make, or how to change the picture.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to stay away from. Empty is best: guidance then works as the model was "
                    "trained.",
                ),
                io.Combo.Input(
                    "target",
                    options=["image", "video"],
                    default="image",
                    tooltip="What is to be made. Must fit the latent.",
                ),
                LANCE_VISION.Input(
                    "vision", optional=True, tooltip="The picture or clip to edit, or the subjects to keep."
                ),
                io.String.Input(
                    "system_prompt",
                    multiline=True,
                    optional=True,
                    default="",
                    tooltip="Empty: the instruction the weights were trained with for this task.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="For the sampler's positive."
                ),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="For the sampler's negative: the negative prompt, or the prompt left out, as "
                    "trained.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        lance: Reader,
        prompt: str,
        negative_prompt: str,
        target: str,
        vision: Vision | None = None,
        system_prompt: str = "",
    ) -> io.NodeOutput:
        if isinstance(prompt, str) and not prompt.strip():
            raise RequestError(
                "The prompt is empty; say what is wanted. As the sampler's negative, connect the `negative` "
                "output of the positive's Lance Text Encode: it is the prompt left out, as in training."
            )
        check_text("The prompt", prompt)
        key = _task_key(lance, target, vision)
        system = (
            system_prompt
            if system_prompt and system_prompt.strip()
            else SYSTEM_PROMPTS[key].format(vision=target)
        )
        # The context is the same for every size, which the latent will bring: the target is a placeholder.
        visuals = vision.segments if vision else ()
        sequence = prompts.generation(lance.tokenizer, system, visuals, prompt, (1, 1, 1))
        ids = prompts.negative(lance.tokenizer, negative_prompt, sequence)
        encoded = Encoded(sequence, ids, target == "video", lance.config.tokens_per_second)
        branches = (
            Prompt(encoded, branch).conditioning() for branch in (Branch.CONDITIONAL, Branch.UNCONDITIONAL)
        )
        return io.NodeOutput(*branches)


def _task_key(lance: Reader, target: str, vision: Vision | None) -> str:
    """Which trained instruction fits; refuses what is no task of the model, with the way out."""
    if target == "video" and lance.config.variant == "image":
        raise RequestError(
            f"{lance.name} is the image checkpoint and makes no video: load Lance_3B_Video in Lance Loader."
        )
    if vision is None:
        return "t2v" if target == "video" else "t2i"
    if vision.checkpoint != lance.name:
        raise RequestError(
            f"The vision was encoded with {vision.checkpoint} and the text is with {lance.name}: use one "
            "Lance Loader for both."
        )
    if vision.role == QUESTION:
        raise RequestError(
            "The vision has the role 'question': connect it to Lance Understand, or set its role to 'edit "
            "source'."
        )
    if vision.role == EDIT and vision.video != (target == "video"):
        if vision.video:
            raise RequestError(
                "A video is to be edited and the target is image: set target to video, or connect one image "
                "as the edit source."
            )
        raise RequestError(
            "An image is to be edited and the target is video: set target to image. For a video that starts "
            "with this image use "
            "Lance Image To Video Latent and no vision; for a video of this subject set the role to "
            "'subject reference'."
        )
    return "edit" if vision.role == EDIT else "subject"
