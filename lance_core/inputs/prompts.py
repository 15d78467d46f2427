"""The trained templates: a system prompt, references and a caption as one sequence, its spans known because
it was built here.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..model.sequence import Role, Segment, Sequence, TargetSegment, TextSegment
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
"""The instructions the weights were trained with; {vision} is the kind of thing to make, "image" or "video"."""


def _assemble(
    tokenizer: Tokenizer,
    system: str,
    visuals: Iterable[Segment],
    caption: str,
    role: Role,
    target: TargetSegment | None,
) -> Sequence:
    """<|im_start|>system … user … visuals, caption … assistant, then the target. Pieces are tokenised on
    their own.
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
        TextSegment(Role.TEMPLATE, tuple(opening)),
        *visuals,
        TextSegment(role, tuple(t.encode(caption))),
        TextSegment(Role.TEMPLATE, tuple(closing)),
    )
    return Sequence(context, target, t.vision_start, t.vision_end, t.pad)


def generation(
    tokenizer: Tokenizer, system: str, visuals: Iterable[Segment], caption: str, grid: tuple[int, int, int]
) -> Sequence:
    """The sequence of a generation task whose target has `grid` latent tokens (t, h, w)."""
    return _assemble(tokenizer, system, visuals, caption, Role.CAPTION, TargetSegment(grid))


def question(tokenizer: Tokenizer, system: str, visuals: Iterable[Segment], text: str) -> Sequence:
    """The sequence of an understanding task, ending where the answer begins."""
    return _assemble(tokenizer, system, visuals, text, Role.TEMPLATE, None)
