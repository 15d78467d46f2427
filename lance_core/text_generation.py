"""Writing text: an understanding sequence in, tokens out one at a time, greedily or by a seeded draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import checks
from .errors import NumericsError, RequestError
from .inputs.tokenizer import Tokenizer
from .model.dual_expert import DualExpert
from .model.kv_cache import Context
from .model.sequence import Sequence
from .model.token_loop import TokenLoop

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e3
MAX_SEED = 2**64 - 1


class NewText(str):
    """Text that a token completes, given to `on_token`; empty while a character's bytes are still coming."""

    token_id: int


class Chooser:
    """Logits -> a token: the likeliest, or a seeded draw at a temperature from the top-p nucleus (arXiv
    1904.09751).
    """

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        temperature = checks.real("temperature", temperature, 0, MAX_TEMPERATURE)
        if 0 < temperature < MIN_TEMPERATURE:
            raise RequestError(
                f"temperature is {temperature:g}, expected 0 (the likeliest token) or at least "
                f"{MIN_TEMPERATURE:g}"
            )
        self.temperature, self.top_p = temperature, checks.real("top_p", top_p, 0, 1, above=0)
        self.generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0, MAX_SEED))

    def __call__(self, logits: Tensor) -> int | None:
        """The token, or None where there is NaN or infinity in the logits."""
        if self.temperature == 0:
            token, finite = torch.stack(
                [logits.argmax(), torch.isfinite(logits).all().long()]
            ).tolist()  # one wait for the device
            return token if finite else None
        if not bool(torch.isfinite(logits).all()):
            return None
        probabilities = torch.softmax(logits.double().cpu() / self.temperature, dim=-1)
        ordered, index = probabilities.sort(descending=True, stable=True)
        ordered[ordered.cumsum(-1) - ordered >= self.top_p] = (
            0  # the nucleus includes the token that reaches top_p
        )
        return int(index[torch.multinomial(ordered, 1, generator=self.generator)])


def write(
    model: DualExpert,
    tokenizer: Tokenizer,
    sequence: Sequence,
    tokens_per_second: float,
    max_new_tokens: int,
    choose: Chooser,
    on_token: Callable[[NewText], None] | None = None,
    fixed: bool = False,
    ahead: bool | None = None,
) -> tuple[str, list[int]]:
    """Write after an understanding sequence until the end token or the limit.

    Args:
        on_token: called with each new stretch of text; raise in it to stop.
        fixed: see `TokenLoop`.
        ahead: start on the next token before this one is told. None: where the device works by itself, that
            is not on the CPU.

    Returns: the text without the end token, and every id, the end token included if it was reached.

    Raises:
        NumericsError: NaN or infinity in the logits; says at which token.
    """
    read = model.read(sequence, tokens_per_second, max_new_tokens - 1)
    return write_after(model, tokenizer, read, max_new_tokens, choose, on_token, fixed, ahead)


def write_after(
    model: DualExpert,
    tokenizer: Tokenizer,
    read: tuple[Context, Tensor, int],
    max_new_tokens: int,
    choose: Callable[[Tensor], int | None],
    on_token: Callable[[NewText], None] | None = None,
    fixed: bool = False,
    ahead: bool | None = None,
) -> tuple[str, list[int]]:
    """`write` after a context that is computed already. read: as `DualExpert.read` gives it, with room for
    `max_new_tokens - 1`; afterwards the context holds the answer too, all but its last token.
    """
    context, logits, position = read
    following = TokenLoop(model, context, position, fixed)
    ahead = model.device.type != "cpu" if ahead is None else ahead
    ids: list[int] = []
    # Text of the first `complete` ids, and how many characters after it have been given to `on_token`.
    text, complete, told = "", 0, 0
    while True:
        token = choose(logits[: len(tokenizer)])
        if token is None:
            raise NumericsError(f"token {len(ids) + 1} of the answer: NaN or infinity in the logits")
        ids.append(token)
        ended = token == tokenizer.im_end
        over = ended or len(ids) == max_new_tokens
        if ahead and not over:
            logits = following(token)
        # Only what is not complete is decoded anew: an unfinished character decodes to U+FFFD for now and is
        # held back.
        tail = tokenizer.decode(ids[complete:-1] if ended else ids[complete:])
        stable = tail if over else tail.rstrip("\ufffd")
        new = NewText(stable[told:])
        new.token_id, told = token, max(told, len(stable))
        if stable == tail:
            text, complete, told = text + tail, len(ids), 0
        if on_token is not None:
            on_token(new)
        if over:
            return text, ids
        if not ahead:
            logits = following(token)
