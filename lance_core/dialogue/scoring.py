"""How well a picture or clip fits a text: the probability that the model says yes to it.

Source: VQAScore (arXiv 2404.01291), P("Yes" | picture, 'Does this figure show "…"? Please answer yes or
no.').
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import checks
from ..components import Components
from ..errors import NumericsError, RequestError
from ..inputs import turns
from ..inputs.seen import Seen
from ..inputs.tokenizer import Tokenizer
from ..model.dual_expert import DualExpert
from ..model.sequence import Sequence as TokenSequence
from ..model.token_loop import TokenLoop
from .conversation import place, read
from .understanding import default_system, embed

QUESTION = 'Does this figure show "{text}"? Please answer yes or no.'
EDIT_QUESTION = (
    'The second figure was made from the first by this instruction: "{text}". Was it carried out, and '
    "nothing "
    "else changed? Please answer yes or no."
)
SUBJECT_QUESTION = (
    'Does the last figure show "{text}", with the same subjects as the figures before it? Please '
    "answer yes or no."
)
ANSWER = "Yes"


def wording(question: str | None, text: str) -> str:
    """The question about a text; {text} in it stands for the text.

    Raises:
        RequestError: a question without {text}.
    """
    question = QUESTION if question is None else checks.text("the question of a score", question)
    if "{text}" not in question:
        raise RequestError(
            f"the question of a score is {checks.shown(question)}; write {{text}} in it where the text "
            f"belongs"
        )
    return question.replace("{text}", text)


def scores(
    components: Components,
    groups: Sequence[Sequence[Seen]],
    asked: str,
    answer: str = ANSWER,
    *,
    resolution: str | None = None,
    system_prompt: str | None = None,
    as_trained: bool = False,
) -> list[float]:
    """The probability of `answer` to `asked` about each group of pictures and clips, in 0..1.

    Raises:
        RequestError: an empty answer.
        NumericsError: NaN or infinity in the logits.
    """
    ids = components.checkpoint.tokenizer.encode(checks.text("the answer of a score", answer))
    if not ids:
        raise RequestError("the answer of a score is empty; expected a word, as 'Yes'")
    out = []
    for number, group in enumerate(groups, 1):
        system = default_system(group) if system_prompt is None else system_prompt
        visuals = embed(components, group, resolution)
        sequence = turns.conversation(components.checkpoint.tokenizer, system, [], visuals, asked)
        out.append(probability(components, sequence, ids, as_trained))
        components.report("scoring", number, len(groups))
    return out


def probability(
    components: Components, sequence: TokenSequence, answer: Sequence[int], as_trained: bool = False
) -> float:
    """The probability that an understanding sequence goes on with the tokens of `answer`, the product of each
    one's softmax over the tokeniser's vocabulary.
    """
    model, rate = components.experts(generation=False), components.config.tokens_per_second
    try:
        return likelihood(model, components.checkpoint.tokenizer, sequence, rate, answer, as_trained)
    except NumericsError as error:
        raise NumericsError(f"{error}{components.blame('und', 'vit')}") from None


def likelihood(
    model: DualExpert,
    tokenizer: Tokenizer,
    sequence: TokenSequence,
    tokens_per_second: float,
    answer: Sequence[int],
    as_trained: bool = False,
) -> float:
    """`probability` with the parts given.

    Raises:
        NumericsError: NaN or infinity in the logits.
    """
    placed = place(sequence, tokens_per_second, as_trained)
    context, logits, position = read(model, sequence, placed, len(answer) - 1)
    following = TokenLoop(model, context, position)
    total = 0.0
    for i, token in enumerate(answer):
        total += _log_softmax(logits[: len(tokenizer)])[token].item()
        if i + 1 < len(answer):
            logits = following(token)
    if not math.isfinite(total):
        raise NumericsError("scoring gave NaN or infinity")
    return math.exp(total)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def order(values: Iterable[float]) -> list[int]:
    """Indices of scores, the best first; equal ones in the order they came."""
    listed = list(values)
    return sorted(range(len(listed)), key=lambda i: -listed[i])
