"""The trained templates: a system prompt, references and a caption as one sequence, its spans known because
it was built here.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import RequestError
from ..model.sequence import Kind, Role, Segment, Sequence
from .tokenizer import Tokenizer

SYSTEM_PROMPTS = {
    "t2i": "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial "
    "relationships of the objects "
    "and background:",
    "t2v": "Describe the video by detailing the color, quantity, visible text, shape, size, texture, "
    "spatial relationships and "
    "motion/camera movements of the objects and background:",
    "edit": "Describe the key features of the input {vision} (color, shape, size, texture, objects, "
    "background), then explain how the "
    "user’s text instruction should alter or modify the {vision}. Generate a new {vision} that meets the "
    "user’s requirements while "
    "maintaining consistency with the original input where appropriate.",
    "subject": "Describe the key features of the input image (color, shape, size, texture, objects, "
    "background, style), then "
    "incorporate the user’s text description to generate a new {vision} that satisfies the user’s "
    "requirements while preserving the "
    "essential identity and object or style information from the reference input.",
    "x2t_image": "Look at the image carefully and answer the question.",
    "x2t_video": "Watch the video carefully and answer the question.",
}
"""The instructions the weights were trained with; {vision} is what to make, "image" or "video"."""

MAX_TEXT_TOKENS = 32768
"""Text tokens of one sequence. Attention's memory grows with them, and the model never saw longer texts."""


def _assemble(
    tokenizer: Tokenizer,
    system: str,
    visuals: Iterable[Segment],
    caption: str,
    role: Role,
    target: Segment | None,
) -> Sequence:
    """<|im_start|>system … user … visuals, caption … assistant, then the target. Each text is tokenised on
    its own.
    """
    t = tokenizer
    newline = t.encode("\n")
    opening = [
        t.im_start,
        *t.encode(f"system\n{system}"),
        t.im_end,
        *newline,
        t.im_start,
        *t.encode("user\n"),
    ]
    closing = [t.im_end, *newline, t.im_start, *t.encode("assistant\n")]
    context = (
        Segment(Kind.TEXT, Role.TEMPLATE, tuple(opening)),
        *visuals,
        Segment(Kind.TEXT, role, tuple(t.encode(caption))),
        Segment(Kind.TEXT, Role.TEMPLATE, tuple(closing)),
    )
    texts = sum(len(segment.ids) for segment in context)
    if texts > MAX_TEXT_TOKENS:
        raise RequestError(
            f"The text is too long: prompt and instruction have {texts:,} tokens together, at most "
            f"{MAX_TEXT_TOKENS:,} are possible. Shorten the prompt by {texts - MAX_TEXT_TOKENS:,} tokens."
        )
    return Sequence(context, target, t.vision_start, t.vision_end, t.pad)


def generation(
    tokenizer: Tokenizer, system: str, visuals: Iterable[Segment], caption: str, grid: tuple[int, int, int]
) -> Sequence:
    """The sequence of a generation task whose target has `grid` latent tokens (t, h, w).

    Raises:
        RequestError: the texts have more than MAX_TEXT_TOKENS tokens, or cannot be encoded.
    """
    return _assemble(
        tokenizer, system, visuals, caption, Role.CAPTION, Segment(Kind.TARGET, Role.TARGET, grid=grid)
    )


def question(tokenizer: Tokenizer, system: str, visuals: Iterable[Segment], text: str) -> Sequence:
    """The sequence of an understanding task, ending where the answer begins. Raises as `generation`."""
    return _assemble(tokenizer, system, visuals, text, Role.TEMPLATE, None)
