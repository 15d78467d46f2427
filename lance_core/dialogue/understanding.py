"""Questions about pictures, clips and nothing at all, alone or after what was said before."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from .. import checks
from ..components import Components
from ..errors import NumericsError, RequestError
from ..inputs import seen as media_seen
from ..inputs import tasks, turns
from ..inputs.seen import ClipRange, Seen
from ..model.kv_cache import Context
from ..model.sequence import Role, VisualSegment
from ..model.sequence import Sequence as TokenSequence
from ..text_generation import Chooser, NewText, write_after
from .conversation import Conversation, Kept, Turn, place, read
from .history import Said, turns_of

RELEASED, AS_TRAINED = "released", "as trained"
POSITIONS = (RELEASED, AS_TRAINED)


@dataclass(frozen=True)
class Answer:
    """What `understand` wrote: text without the end token, and every id with it when it was reached.

    history: the conversation up to and with this answer, for `understand(history=…)`; it holds the keys and
    values computed so far (about 36 KB a token at the released sizes, in bfloat16) until it is dropped.
    """

    text: str
    token_ids: list[int]
    history: Conversation = field(default_factory=Conversation, compare=False, repr=False)


def positions_of(positions: Any) -> bool:
    """Whether positions are those of training.

    Raises:
        RequestError: neither "released" nor "as trained".
    """
    word = positions.replace("_", " ").replace("-", " ") if isinstance(positions, str) else positions
    return checks.choice("positions", word, POSITIONS) == AS_TRAINED


def gather(image: Any, video: Any, images: Any, part: ClipRange, components: Components) -> list[Seen]:
    """What one question shows, read.

    Raises:
        RequestError: image= or video= beside images=, or a clip shown to the image checkpoint.
        MediaError: it cannot be read.
    """

    def progress(done: int, total: int) -> None:
        components.report("reading the clip", done, total)

    if images is not None and (image is not None or video is not None):
        raise RequestError("images= and image= or video= were given; put all pictures and clips into images=")
    if image is not None:
        return [media_seen.read_picture(image)]
    if video is not None:
        return [media_seen.read_clip(video, part, progress)]
    out = [
        media_seen.read_either(one, part, progress)
        for one in (media_seen.listed(images) if images is not None else ())
    ]
    if any(one.clip for one in out):
        tasks.check_variant(tasks.TASKS["x2t_video"], components.config.variant)
    return out


def embed(components: Components, shown: Iterable[Seen], resolution: str | None) -> tuple[VisualSegment, ...]:
    """ViT embeddings of pictures and clips, each at its own default preset where none is given."""
    defaults = {
        clip: tasks.TASKS["x2t_video" if clip else "x2t_image"].default_resolution for clip in (False, True)
    }
    return tuple(
        components.vit_segment(one.frames, resolution or defaults[one.clip], Role.QUESTION) for one in shown
    )


def default_system(shown: Iterable[Seen]) -> str:
    """The instruction the weights were trained with for what is shown; Qwen2.5's where nothing is."""
    kinds = {one.clip for one in shown}
    if not kinds:
        return turns.PLAIN_SYSTEM
    return tasks.TASKS["x2t_video" if True in kinds else "x2t_image"].default_system_prompt


def resume(
    components: Components,
    history: Any,
    shown: list[Seen],
    part: ClipRange,
    system_prompt: str | None,
    resolution: str | None,
    as_trained: bool,
) -> Conversation:
    """The conversation a question follows, encoded, with what is kept of it where that still holds."""
    before = turns_of(history)
    if isinstance(before, Conversation):
        system = before.system if system_prompt is None else system_prompt
        if system is None:
            system = default_system(shown)
        if (system, as_trained) == (before.system, before.as_trained):
            return before
        return Conversation(before.turns, system, as_trained)
    encoded, first = [], None
    for turn in before:
        if isinstance(turn, Said):
            pictures = gather(None, None, turn.images, part, components)
            first = default_system(pictures) if first is None else first
            ids = tuple(components.checkpoint.tokenizer.encode(turn.answer))
            visuals = embed(components, pictures, resolution)
            turn = Turn(turn.question, turn.answer, visuals, tuple(p.name for p in pictures if p.name), ids)
        elif first is None:
            clips = any(s.grid[0] > 1 for s in turn.visuals)
            task = "x2t_video" if clips else "x2t_image"
            first = tasks.TASKS[task].default_system_prompt if turn.visuals else turns.PLAIN_SYSTEM
        encoded.append(turn)
    system = system_prompt if system_prompt is not None else first or default_system(shown)
    return Conversation(tuple(encoded), system, as_trained)


def ask(
    components: Components,
    before: Conversation,
    question: str,
    shown: list[Seen],
    resolution: str | None,
    max_new_tokens: int,
    choose: Chooser,
    on_token: Callable[[NewText], None] | None,
) -> Answer:
    """Answer one question after a conversation."""
    visuals = embed(components, shown, resolution)
    tokenizer = components.checkpoint.tokenizer
    sequence = turns.conversation(tokenizer, before.system or "", before.triples, visuals, question)
    text, ids, context = written(
        components, sequence, max_new_tokens, choose, on_token, before.as_trained, before.kept
    )
    ended = ids[-1] == tokenizer.im_end
    turn = Turn(
        question, text, visuals, tuple(s.name for s in shown if s.name), tuple(ids[:-1] if ended else ids)
    )
    kept = Kept(trimmed(components, context), weakref.ref(components.und))
    return Answer(text, ids, replace(before, turns=(*before.turns, turn), kept=kept))


def written(
    components: Components,
    sequence: TokenSequence,
    max_new_tokens: int,
    choose: Callable[[Any], int | None],
    on_token: Callable[[NewText], None] | None = None,
    as_trained: bool = False,
    kept: Kept | None = None,
) -> tuple[str, list[int], Context]:
    """Write tokens after an understanding sequence until the end token or the limit: text, ids, and the
    context, which holds all of it but the last token.
    """
    count = 0

    def show(new: NewText) -> None:
        nonlocal count
        count += 1
        components.report("writing", count, max_new_tokens)
        if on_token is not None:
            on_token(new)

    components.report("writing", 0, max_new_tokens)
    model = components.experts(generation=False)
    if kept is not None and not kept.fits(model, None):
        kept = None
    placed = place(sequence, components.config.tokens_per_second, as_trained)
    fixed = components.compile and components.device.type == "cuda"
    try:
        read_so_far = read(model, sequence, placed, max_new_tokens - 1, kept)
        tokenizer = components.checkpoint.tokenizer
        text, ids = write_after(model, tokenizer, read_so_far, max_new_tokens, choose, show, fixed)
    except NumericsError as error:
        raise NumericsError(f"{error}{components.blame('und', 'vit')}") from None
    return text, ids, read_so_far[0]


def trimmed(components: Components, context: Context) -> Context:
    """A context without its free room."""
    if not context.prefix.free:
        return context
    model = components.experts(generation=False)
    out = model.new_context(context.prefix.filled)
    out.copy_prefix(context, context.prefix.filled)
    return out
