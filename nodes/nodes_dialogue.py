"""Nodes that judge and write: Lance Score and Lance Enhance Prompt."""

from __future__ import annotations

import logging

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io

from ..lance_core.dialogue import scoring
from ..lance_core.dialogue.conversation import Conversation
from ..lance_core.errors import RequestError
from ..lance_core.inputs.sizes import PRESETS
from ..lance_core.inputs.tasks import TASKS, check_text
from ..lance_core.prompting.endpoint import Endpoint, Unanswered
from ..lance_core.prompting.enhance import NEW_TOKENS, TEMPERATURE, TOP_P, cleaned
from ..lance_core.prompting.instructions import instruction, wish
from ..lance_core.text_generation import Chooser
from . import comfy_compat, dialogue, pictures
from .sockets import CATEGORY, LANCE, Reader, checked
from .widgets import seed_input, temperature_input

MODEL, ENDPOINT = "this model", "service"
DRAWN = [name for name, task in TASKS.items() if task.output != "text"]


class LanceScore(io.ComfyNode):
    """Pictures or a clip and a text -> how well they fit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceScore",
            display_name="Lance Score",
            category=CATEGORY,
            description="How well pictures or a clip fit a text: the probability that the model says "
            "yes to it. "
            "Sorts a batch, the best first.",
            inputs=[
                LANCE.Input("lance", tooltip="From Lance Loader."),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True, tooltip="What should be seen: the prompt."
                ),
                io.Int.Input(
                    "keep", default=1, min=1, max=4096, tooltip="How many of the best pictures come out."
                ),
                io.String.Input(
                    "question",
                    default=scoring.QUESTION,
                    tooltip="{text} stands for the text. As it is: VQAScore's.",
                ),
                io.String.Input("answer", default=scoring.ANSWER, tooltip="Whose probability is the score."),
                io.Combo.Input(
                    "resolution",
                    options=list(PRESETS),
                    default="image_768res",
                    tooltip="How large pictures are read; a clip is read at video_480p at most.",
                ),
                io.Combo.Input(
                    "positions",
                    options=dialogue.POSITIONS,
                    default="released",
                    tooltip=(
                        "Where what is shown stands in time: as in the released inference, or its training."
                    ),
                ),
                io.Image.Input("image", optional=True, tooltip="Pictures, each scored on its own."),
                io.Video.Input("video", optional=True, tooltip="A clip, scored as a whole."),
            ],
            outputs=[
                io.Image.Output(
                    "images", display_name="images", tooltip="The best pictures, the best first."
                ),
                io.Float.Output("best", display_name="best", tooltip="The best score, 0 to 1."),
                io.String.Output(
                    "scores", display_name="scores", tooltip="All scores as they came, one a line."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls,
        lance: Reader,
        text: str,
        keep: int,
        question: str,
        answer: str,
        resolution: str,
        positions: str,
        image=None,
        video=None,
    ) -> io.NodeOutput:
        check_text("The text", text)
        asked = scoring.wording(question, text)
        if (image is None) == (video is None):
            raise RequestError("Connect images or a video to Lance Score, one of the two.")
        if video is not None and lance.config.variant == "image":
            raise RequestError(
                f"{lance.name} is the image checkpoint and cannot read video: load Lance_3B_Video."
            )
        if image is not None and not len(image):
            raise RequestError(
                "The image input is empty (a batch of 0 images): look at the node it comes from."
            )
        clips = pictures.clips_of(None, video, "", None) if image is None else dialogue.levels(image)
        if video is not None and not resolution.startswith("video"):
            resolution = "video_480p"
        bar, values = comfy.utils.ProgressBar(len(clips)), []
        for clip in clips:
            mm.throw_exception_if_processing_interrupted()
            visuals = dialogue.show(lance, [clip], resolution)
            trained = positions == dialogue.AS_TRAINED
            values.append(dialogue.score(lance, visuals, video is not None, asked, answer, trained))
            bar.update(1)
        order = scoring.order(values)[: keep if image is not None else 1]
        shown = torch.from_numpy(clips[0]).float() / 255 if image is None else image[order]
        listed = "\n".join(f"{value:.4f}" for value in values)
        return io.NodeOutput(shown, max(values), listed, ui={"text": [listed]})


class LanceEnhancePrompt(io.ComfyNode):
    """A short wish -> a detailed prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceEnhancePrompt",
            display_name="Lance Enhance Prompt",
            category=CATEGORY,
            description="Writes a short wish out into the detailed prompt the model was trained on, in the "
            "wish's language.",
            inputs=[
                LANCE.Input("lance", tooltip="From Lance Loader."),
                io.String.Input(
                    "wish", multiline=True, dynamic_prompts=True, tooltip="What you want, in a few words."
                ),
                io.Combo.Input("task", options=DRAWN, default="t2i", tooltip="What the prompt is for."),
                io.Combo.Input(
                    "writer",
                    options=[MODEL, ENDPOINT],
                    default=MODEL,
                    tooltip="this model: nothing leaves the machine. service: the OpenAI-compatible one that "
                    "LANCE_REWRITE_BASE_URL, _MODEL_NAME and _API_KEY name in ComfyUI's environment.",
                ),
                temperature_input(TEMPERATURE, "0: always the likeliest words. Higher: more varied prompts."),
                seed_input(0, "The same seed gives the same prompt."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="What the task is given: the first frame, the picture to edit, the subjects.",
                ),
            ],
            outputs=[io.String.Output("prompt", display_name="prompt", tooltip="For Lance Text Encode.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls, lance: Reader, wish: str, task: str, writer: str, temperature: float, seed: int, image=None
    ) -> io.NodeOutput:
        check_text("The wish", wish)
        told, choose = instruction(TASKS[task]), Chooser(temperature, TOP_P, seed)
        clips = [] if image is None else dialogue.levels(image)
        try:
            if writer == ENDPOINT:
                text = cls._by_service(told, wish, clips, temperature, seed)
            else:
                text = cls._by_model(lance, told, wish, clips, choose)
            prompt = cleaned(text)
        except Unanswered as error:
            logging.warning("The prompt was not enhanced: %s. It is used as it was.", error)
            prompt = wish
        return io.NodeOutput(prompt, ui={"text": [prompt]})

    @staticmethod
    def _by_service(told: str, asked: str, clips: list, temperature: float, seed: int) -> str:
        service = Endpoint.from_environment()
        if service is None:
            raise Unanswered("no service is set up: set LANCE_REWRITE_BASE_URL and LANCE_REWRITE_MODEL_NAME")
        shown = [clip[0] for clip in clips]
        stop = mm.throw_exception_if_processing_interrupted
        return service.ask(told, wish(asked), shown, temperature=temperature, seed=seed, waiting=stop)

    @classmethod
    def _by_model(cls, lance: Reader, told: str, asked: str, clips: list, choose: Chooser) -> str:
        visuals = dialogue.show(lance, clips, "image_768res")
        bar, node_id, pieces = comfy.utils.ProgressBar(NEW_TOKENS), cls.hidden.unique_id, []

        def show(piece: str) -> None:
            mm.throw_exception_if_processing_interrupted()
            pieces.append(piece)
            bar.update_absolute(len(pieces), NEW_TOKENS)
            comfy_compat.show_text("".join(pieces), node_id)

        start = Conversation((), told)
        return dialogue.answer(lance, start, wish(asked), visuals, NEW_TOKENS, choose, show)[0]
