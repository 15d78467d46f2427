"""Questions through ComfyUI's models: conversations, scores and prompts. Thin; the text is lance_core's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management as mm
import numpy as np
import torch

from ..lance_core.dialogue.conversation import Conversation, Kept, Turn, place, read
from ..lance_core.dialogue.scoring import likelihood
from ..lance_core.errors import RequestError
from ..lance_core.inputs import turns
from ..lance_core.inputs.tasks import TASKS
from ..lance_core.model.kv_cache import Context
from ..lance_core.model.memory import text_bytes
from ..lance_core.model.sequence import Role, VisualSegment
from ..lance_core.model.sequence import Sequence as TokenSequence
from ..lance_core.text_generation import Chooser, NewText, write_after
from . import pictures
from .sockets import Reader

AS_TRAINED = "as trained"
POSITIONS = ["released", AS_TRAINED]


def default_system(visuals: Sequence[VisualSegment], video: bool) -> str:
    """The instruction the weights were trained with for what is shown; Qwen2.5's where nothing is."""
    if not visuals:
        return turns.PLAIN_SYSTEM
    return TASKS["x2t_video" if video else "x2t_image"].default_system_prompt


def version(reader: Reader) -> Any:
    """What changes when the understanding expert's weights are patched."""
    return getattr(reader.und, "patches_uuid", None), reader.compute


def load(reader: Reader, sequence: TokenSequence, room: int) -> None:
    """Bring the understanding expert to its device, with memory for a sequence and `room` more tokens."""
    tokens = sum(s.length for s in sequence.context) + room
    needed = text_bytes(reader.config.llm, tokens, reader.compute.itemsize)
    mm.load_models_gpu([reader.und], memory_required=needed)


def answer(
    reader: Reader,
    before: Conversation,
    question: str,
    visuals: tuple[VisualSegment, ...],
    max_new_tokens: int,
    choose: Chooser,
    on_token: Callable[[NewText], None],
    keep: bool = True,
) -> tuple[str, Conversation]:
    """The answer to a question after a conversation, and the conversation with it.

    What is kept (unless nothing follows, `keep` False) lies in ComfyUI's intermediate memory, usually RAM.
    """
    sequence = turns.conversation(reader.tokenizer, before.system or "", before.triples, visuals, question)
    load(reader, sequence, max_new_tokens)
    model = reader.understanding()
    kept = before.kept if before.kept is not None and before.kept.fits(model, version(reader)) else None
    placed = place(sequence, reader.config.tokens_per_second, before.as_trained)
    begun = read(model, sequence, placed, max_new_tokens - 1, kept)
    text, ids = write_after(model, reader.tokenizer, begun, max_new_tokens, choose, on_token)
    ended = ids[-1] == reader.tokenizer.im_end
    turn = Turn(question, text, visuals, (), tuple(ids[:-1] if ended else ids))
    kept = None
    if keep:
        kept = Kept(put_aside(reader, begun[0]), weakref.ref(model.und), version(reader))
    return text, Conversation((*before.turns, turn), before.system, before.as_trained, kept)


def goes_on(prompt: Any, node_id: str | None, output: int) -> bool:
    """Whether anything in a queued prompt takes a node's output."""
    link = [node_id, output]
    nodes = prompt.values() if isinstance(prompt, dict) else ()
    return any(value == link for node in nodes for value in node.get("inputs", {}).values())


def put_aside(reader: Reader, context: Context) -> Context:
    """A context's tokens in ComfyUI's intermediate memory."""
    llm, tokens = reader.config.llm, context.prefix.filled
    out = Context(
        llm.num_layers,
        llm.num_kv_heads,
        llm.head_dim,
        prefix=tokens,
        device=mm.intermediate_device(),
        dtype=reader.compute,
    )
    out.copy_prefix(context, tokens)
    return out


def begin(
    chat: Conversation | None,
    visuals: tuple[VisualSegment, ...],
    video: bool,
    system_prompt: str,
    as_trained: bool,
) -> Conversation:
    """The conversation a question goes on from; what is kept is dropped where it would not hold."""
    told = system_prompt if system_prompt and system_prompt.strip() else None
    if chat is None:
        return Conversation((), told or default_system(visuals, video), as_trained)
    system = told or chat.system
    if (system, as_trained) == (chat.system, chat.as_trained):
        return chat
    return Conversation(chat.turns, system, as_trained)


def score(
    reader: Reader, visuals: tuple[VisualSegment, ...], video: bool, asked: str, word: str, as_trained: bool
) -> float:
    """The probability of an answer to a question about what is shown."""
    ids = reader.tokenizer.encode(word)
    if not ids:
        raise RequestError("The answer whose probability is wanted is empty: write a word, as Yes.")
    system = default_system(visuals, video)
    sequence = turns.conversation(reader.tokenizer, system, [], visuals, asked)
    load(reader, sequence, len(ids))
    return likelihood(
        reader.understanding(), reader.tokenizer, sequence, reader.config.tokens_per_second, ids, as_trained
    )


def show(reader: Reader, clips: Sequence[np.ndarray], resolution: str) -> tuple[VisualSegment, ...]:
    """ViT embeddings of pictures and clips, uint8 [T, H, W, 3].

    Raises:
        RequestError: there is no vision tower.
    """
    if reader.vit is None and clips:
        raise RequestError(
            f"{reader.name} came without its vision tower: put the folder Qwen2.5-VL-ViT beside it and load "
            "it again."
        )
    found = [pictures.embed(reader, clip, resolution, Role.QUESTION) for clip in clips]
    return tuple(s for s in found if isinstance(s, VisualSegment))


def levels(images: torch.Tensor) -> list[np.ndarray]:
    """IMAGE as single pictures, uint8 [1, H, W, 3] each."""
    return [frame[None] for frame in pictures.to_bytes(images)]
