"""The node that answers questions."""

from __future__ import annotations

import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import io

from ..lance_core.errors import RequestError
from ..lance_core.inputs import prompts
from ..lance_core.inputs.prompts import SYSTEM_PROMPTS
from ..lance_core.inputs.tasks import MAX_NEW_TOKENS, check_text
from ..lance_core.model.memory import text_bytes
from ..lance_core.text_generation import Chooser, write
from . import comfy_compat
from .sockets import CATEGORY, LANCE, LANCE_VISION, QUESTION, Reader, Vision, checked


class LanceUnderstand(io.ComfyNode):
    """Question -> answer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceUnderstand",
            display_name="Lance Understand",
            category=CATEGORY,
            description="Answers a question about a picture or a clip. Loads the understanding half of the "
            "model only.",
            inputs=[
                LANCE.Input("lance", tooltip="From Lance Loader."),
                LANCE_VISION.Input("vision", tooltip="From Lance Vision Encode, role 'question'."),
                io.String.Input(
                    "question",
                    multiline=True,
                    dynamic_prompts=True,
                    default="Describe this.",
                    tooltip="What you want to know.",
                ),
                io.String.Input(
                    "system_prompt",
                    multiline=True,
                    default="",
                    tooltip="Empty: the instruction the weights were trained with.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=256,
                    min=1,
                    max=MAX_NEW_TOKENS,
                    tooltip="The answer is cut here; a token is about a word.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="0: always the likeliest word. Higher: more varied answers.",
                ),
                io.Float.Input(
                    "top_p",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Draws only from the likeliest words that make up this share.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="For temperatures above 0.",
                ),
            ],
            outputs=[io.String.Output("answer", display_name="answer")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls,
        lance: Reader,
        vision: Vision,
        question: str,
        system_prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> io.NodeOutput:
        check_text("The question", question)
        if vision.role != QUESTION:
            raise RequestError(
                f"The vision has the role {vision.role!r}: set it to 'question' on Lance Vision Encode."
            )
        if vision.checkpoint != lance.name:
            raise RequestError(
                f"The vision was encoded with {vision.checkpoint} and is asked of {lance.name}: use one "
                "Lance Loader for both."
            )
        trained = SYSTEM_PROMPTS["x2t_video" if vision.video else "x2t_image"]
        system = system_prompt if system_prompt and system_prompt.strip() else trained
        sequence = prompts.question(lance.tokenizer, system, vision.segments, question)
        tokens = sum(s.length for s in sequence.context) + max_new_tokens
        needed = text_bytes(lance.config.llm, tokens, lance.compute.itemsize)
        mm.load_models_gpu([lance.und], memory_required=needed)
        bar = comfy.utils.ProgressBar(max_new_tokens)
        node_id, written = cls.hidden.unique_id, []

        def show(piece) -> None:
            mm.throw_exception_if_processing_interrupted()
            written.append(piece)
            bar.update_absolute(len(written), max_new_tokens)
            comfy_compat.show_text("".join(written), node_id)

        text, _ = write(
            lance.understanding(),
            lance.tokenizer,
            sequence,
            lance.config.tokens_per_second,
            max_new_tokens,
            Chooser(temperature, top_p, seed),
            show,
        )
        return io.NodeOutput(text, ui={"text": [text]})
