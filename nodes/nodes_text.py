"""The node that answers questions."""

from __future__ import annotations

import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import io

from ..lance_core.errors import RequestError
from ..lance_core.inputs.tasks import MAX_NEW_TOKENS, check_text
from ..lance_core.model.sequence import VisualSegment
from ..lance_core.text_generation import Chooser
from . import comfy_compat, dialogue
from .sockets import CATEGORY, LANCE, LANCE_CHAT, LANCE_VISION, QUESTION, Chat, Reader, Vision, checked
from .widgets import seed_input, temperature_input

CHAT = 1  # the number of that output


class LanceUnderstand(io.ComfyNode):
    """Question -> answer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceUnderstand",
            display_name="Lance Understand",
            category=CATEGORY,
            description="Answers questions about pictures and clips, one after another. Loads the "
            "understanding half of the model only.",
            inputs=[
                LANCE.Input("lance", tooltip="From Lance Loader."),
                LANCE_VISION.Input(
                    "vision",
                    optional=True,
                    tooltip="From Lance Vision Encode, role 'question'; without it, a question without "
                    "pictures.",
                ),
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
                temperature_input(0.0, "0: always the likeliest word. Higher: more varied answers."),
                io.Float.Input(
                    "top_p",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Draws only from the likeliest words that make up this share.",
                ),
                seed_input(0, "For temperatures above 0."),
                LANCE_CHAT.Input(
                    "chat",
                    optional=True,
                    tooltip="The chat of an earlier Lance Understand: this question goes on from "
                    "there, and what "
                    "was said is not computed again.",
                ),
                io.Combo.Input(
                    "positions",
                    options=dialogue.POSITIONS,
                    default="released",
                    optional=True,
                    tooltip="Where what is shown stands in time: as in the released inference, or as in its "
                    "training. Try which answers better.",
                ),
            ],
            outputs=[
                io.String.Output("answer", display_name="answer"),
                LANCE_CHAT.Output(
                    "conversation",
                    display_name="chat",
                    tooltip="The conversation so far, for another Lance Understand.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls,
        lance: Reader,
        question: str,
        system_prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        vision: Vision | None = None,
        chat: Chat | None = None,
        positions: str = "released",
    ) -> io.NodeOutput:
        check_text("The question", question)
        visuals = cls._visuals(lance, vision)
        if chat is not None and chat.checkpoint != lance.name:
            raise RequestError(
                f"The chat was held with {chat.checkpoint} and goes on with {lance.name}: use one Lance "
                f"Loader "
                "for both."
            )
        earlier = None if chat is None else chat.conversation
        trained = positions == dialogue.AS_TRAINED
        before = dialogue.begin(earlier, visuals, bool(vision and vision.video), system_prompt, trained)
        bar = comfy.utils.ProgressBar(max_new_tokens)
        node_id, written = cls.hidden.unique_id, []

        def show(piece) -> None:
            mm.throw_exception_if_processing_interrupted()
            written.append(piece)
            bar.update_absolute(len(written), max_new_tokens)
            comfy_compat.show_text("".join(written), node_id)

        choose = Chooser(temperature, top_p, seed)
        keep = dialogue.goes_on(cls.hidden.prompt, node_id, CHAT)
        text, after = dialogue.answer(lance, before, question, visuals, max_new_tokens, choose, show, keep)
        return io.NodeOutput(text, Chat(after, lance.name), ui={"text": [text]})

    @staticmethod
    def _visuals(lance: Reader, vision: Vision | None) -> tuple[VisualSegment, ...]:
        if vision is None:
            return ()
        if vision.role != QUESTION:
            raise RequestError(
                f"The vision has the role {vision.role!r}: set it to 'question' on Lance Vision Encode."
            )
        if vision.checkpoint != lance.name:
            raise RequestError(
                f"The vision was encoded with {vision.checkpoint} and is asked of {lance.name}: use one "
                "Lance Loader for both."
            )
        return tuple(s for s in vision.segments if isinstance(s, VisualSegment))
