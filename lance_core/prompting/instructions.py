"""What the writer of a prompt is told, for each task.

The weights were trained on long captions: what is there, its colours, numbers, shapes, sizes and textures,
where things stand, what is behind them; for videos how they and the camera move; for edits an instruction
that says what changes and what stays.
"""

from __future__ import annotations

from ..errors import RequestError
from ..inputs.tasks import Task

COMMON = (
    "You write prompts for a model that makes {output}s. The user gives a short wish. Answer with one "
    "prompt that "
    "fulfils it and nothing else: no title, no list, no quotation marks, no remarks. Keep everything the "
    "user "
    "says, every name, number and text in quotation marks as it is written. Add only what fits. Write in the "
    "language of the wish, in one paragraph of {length} words."
)
PICTURE = (
    "Describe the finished picture as if it were before you: the main subject first, with colours, "
    "number, shape, "
    "size and texture; then where things stand to each other, the background, the light, and the style."
)
VIDEO = (
    "Describe the finished video as if it were playing: the main subject first, with colours, number, "
    "shape, size "
    "and texture; what it does from beginning to end; then the surroundings, the light, the style, and "
    "how the "
    "camera moves."
)
FIRST_FRAME = (
    "The picture shown is the first frame of the video. Describe what is in it as it is, then how it "
    "moves and "
    "how the camera moves from there. Do not change what the picture shows."
)
EDIT = (
    "The {takes} shown is to be edited. Write the edit as one clear instruction: what is changed, where "
    "it is, and "
    "what it looks like afterwards, with colours, material and size. Then say what stays as it is. Do "
    "not describe "
    "anything else."
)
SUBJECT = (
    "The pictures shown are of subjects that appear in the {output}. Name each as what it is and keep "
    "its looks; "
    "describe the new scene around them: what they do, where they are, the background, the light, and "
    "the style."
)


def instruction(task: Task) -> str:
    """The instruction to whoever writes a prompt for a task.

    Raises:
        RequestError: a task that draws nothing.
    """
    if task.output == "text":
        raise RequestError(f"{task.name} takes a question, which is not enhanced; use a task that draws")
    common = COMMON.format(output=task.output, length="20 to 60" if task.system == "edit" else "60 to 150")
    if task.system == "edit":
        special = EDIT.format(takes="picture" if task.takes == "image" else "clip")
    elif task.takes == "references":
        special = SUBJECT.format(output=task.output)
    elif task.takes == "image":
        special = FIRST_FRAME
    else:
        special = VIDEO if task.output == "video" else PICTURE
    return f"{common} {special}"


def wish(prompt: str) -> str:
    """The wish as it is put to the writer."""
    return f"The wish: {prompt.strip()}"
