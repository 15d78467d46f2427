"""A prompt enhanced: by the understanding expert, or by the service the user has set up."""

from __future__ import annotations

import logging
import re
from typing import Any

from .. import checks
from ..components import Components
from ..dialogue import understanding
from ..dialogue.conversation import Conversation
from ..inputs import tasks
from ..inputs.seen import ClipRange, Seen
from ..text_generation import MAX_SEED, Chooser
from .endpoint import TIMEOUT, Endpoint, Unanswered
from .instructions import instruction, wish

log = logging.getLogger(__name__)

WRITERS = ("auto", "model", "endpoint")
TEMPERATURE, TOP_P, NEW_TOKENS = 0.7, 0.9, 512
LONGEST = 8000  # characters of a prompt; more is no prompt
CONTROL = re.compile(r"<\|[^|>]*\|>")
QUOTES = {'"': '"', "“": "”", "'": "'", "「": "」"}


def enhance(
    components: Components,
    prompt: str,
    task: str,
    image: Any = None,
    *,
    by: str = "auto",
    seed: int = 0,
    temperature: float = TEMPERATURE,
    timeout: float = TIMEOUT,
) -> str:
    """See `Lance.enhance`."""
    kind = tasks.task_of(task, text=False)
    tasks.check_text("prompt", prompt)
    told = instruction(kind)
    by = checks.choice("by", by, WRITERS)
    seed = checks.whole("seed", seed, 0, MAX_SEED)
    choose = Chooser(temperature, TOP_P, seed)
    service = None if by == "model" else Endpoint.from_environment()
    single = kind.takes if kind.takes in ("image", "video") and image is not None else "images"
    given = dict.fromkeys(("image", "video", "images")) | {single: image}
    shown = understanding.gather(**given, part=ClipRange(), components=components)
    try:
        if by == "endpoint" and service is None:
            raise Unanswered("no service is set up: set LANCE_REWRITE_BASE_URL and LANCE_REWRITE_MODEL_NAME")
        if service is not None:
            pictures = [one.frames[0] for one in shown]
            text = service.ask(
                told, wish(prompt), pictures, temperature=choose.temperature, seed=seed, timeout=timeout
            )
        else:
            text = written(components, told, wish(prompt), shown, choose)
        return cleaned(text)
    except Unanswered as error:
        log.warning("The prompt was not enhanced: %s. It is used as it was.", error)
        return prompt


def written(components: Components, told: str, asked: str, shown: list[Seen], choose: Chooser) -> str:
    """What the understanding expert writes."""
    start = Conversation((), told)
    answer = understanding.ask(components, start, asked, shown, None, NEW_TOKENS, choose, None)
    return answer.text


def cleaned(text: str) -> str:
    """An answer as one line that can be a prompt.

    Raises:
        Unanswered: nothing is left, it is longer than any prompt, or no text.
    """
    line = " ".join(CONTROL.sub(" ", text).split())
    if len(line) > 1 and QUOTES.get(line[0]) == line[-1] and line[0] not in line[1:-1]:
        line = line[1:-1].strip()
    if not line:
        raise Unanswered("the answer was empty")
    if len(line) > LONGEST:
        raise Unanswered(f"the answer has {len(line):,} characters, which is no prompt")
    if any(ord(c) < 32 or c == "\ufffd" or "\ud800" <= c <= "\udfff" for c in line):
        raise Unanswered("the answer has characters in it that are no text")
    return line
