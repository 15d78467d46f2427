"""Writing text: an understanding sequence in, tokens out one at a time, greedily or by a seeded draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import NumericsError, RequestError
from .model import DualExpert
from .prompts import Tokenizer
from .sequence import Sequence
from .token_loop import TokenLoop


class Piece(str):
    """Newly completed text of an answer, given to `on_token`; empty while a character's bytes are still coming."""

    token_id: int


class Chooser:
    """Logits -> a token: the likeliest, or a seeded draw at a temperature from the top-p nucleus (arXiv 1904.09751)."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        if not 0 <= temperature < float("inf"):
            raise RequestError(f"temperature is {temperature}, expected 0 (the likeliest token) or more")
        if not 0 < top_p <= 1:
            raise RequestError(f"top_p is {top_p}, expected above 0 and at most 1")
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int | None:
        """The token, or None where there is NaN or infinity in the logits."""
        if self.temperature == 0:
            token, finite = torch.stack([logits.argmax(), torch.isfinite(logits).all().long()]).tolist()  # one wait for the device
            return token if finite else None
        if not bool(torch.isfinite(logits).all()):
            return None
        probabilities = torch.softmax(logits.double().cpu() / self.temperature, dim=-1)
        ordered, index = probabilities.sort(descending=True, stable=True)
        ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0  # the nucleus includes the token that reaches top_p
        return int(index[torch.multinomial(ordered, 1, generator=self.generator)])


def write(
    model: DualExpert,
    tokenizer: Tokenizer,
    sequence: Sequence,
    tokens_per_second: float,
    max_new_tokens: int,
    choose: Chooser,
    on_token: Callable[[Piece], None] | None = None,
    fixed: bool = False,
) -> tuple[str, list[int]]:
    """Write after an understanding sequence until the end token or the limit.

    Args:
        on_token: called with each new piece of text; raise in it to stop.
        fixed: see `TokenLoop`.

    Returns: the text without the end token, and every id, the end token included if it was reached.

    Raises:
        NumericsError: NaN or infinity in the logits; says at which token.
    """
    context, logits, position = model.read(sequence, tokens_per_second, max_new_tokens - 1)
    following = TokenLoop(model, context, position, fixed)
    ids: list[int] = []
    written = 0
    while True:
        token = choose(logits[: len(tokenizer)])
        if token is None:
            raise NumericsError(f"token {len(ids) + 1} of the answer: NaN or infinity in the logits")
        ids.append(token)
        ended = token == tokenizer.im_end
        over = ended or len(ids) == max_new_tokens
        text = tokenizer.decode(ids[:-1] if ended else ids)
        if on_token is not None:
            # An unfinished character decodes to U+FFFD for now: hold it back until it is complete or the answer ends.
            stable = text if over else text.rstrip("\ufffd")
            piece = Piece(stable[written:])
            piece.token_id = token
            written = max(written, len(stable))
            on_token(piece)
        if over:
            return text, ids
        logits = following(token)
