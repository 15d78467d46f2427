"""How much memory the passes of the decoder and the vision tower need beyond their weights, from their sizes
alone.

Bytes in the compute dtype. These are what ComfyUI is told before it loads a model, and what the canvas shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ..config import LLMConfig, ViTConfig
from .decoder import FEED_CHUNK

GUIDANCE_ROWS = 2  # a guided result takes two rows: with the prompt and without it
FLOAT32 = 4


@dataclass(frozen=True)
class DenoisingMemory:
    """Bytes of one forward of the decoder, by what they grow with.

    key_value: a token's key and value in every layer. residual: a token of the residual stream.
    attending: a token of a row around attention: residual, joined projections, rotated queries, keys and
    values, the queries and the result once more as ComfyUI's attention wants and gives them. rotating: a
    token of a row whose queries are rotated in float32, for at most `chunk` tokens at once.
    feeding: a token of a row around the feed-forward; widening: a token inside it, for at most `chunk` at
    once.
    """

    key_value: int
    residual: int
    attending: int
    rotating: int
    feeding: int
    widening: int
    chunk: int = FEED_CHUNK

    @classmethod
    def of(cls, llm: LLMConfig, size: int) -> DenoisingMemory:
        """For a model; size: bytes of an element of the compute dtype."""
        queries = llm.num_heads * llm.head_dim
        projections = queries + 2 * llm.num_kv_heads * llm.head_dim
        return cls(
            key_value=2 * llm.num_kv_heads * llm.head_dim * llm.num_layers * size,
            residual=llm.hidden_size * size,
            attending=(2 * (llm.hidden_size + projections + queries) + queries) * size,
            rotating=2 * queries * FLOAT32,
            feeding=4 * llm.hidden_size * size,
            widening=2 * llm.intermediate_size * size,
        )

    def activations(self, rows: int, tokens: int) -> int:
        """Bytes at the widest moment of a pass over `rows` of `tokens` each."""
        attending = rows * (tokens * self.attending + min(tokens, self.chunk) * self.rotating)
        feeding = rows * tokens * self.feeding + min(rows * tokens, self.chunk) * self.widening
        return max(attending, feeding)

    def step(self, rows: int, tokens: int, contexts: Iterable[int]) -> int:
        """Bytes of a denoising step over `rows` targets of `tokens` (markers included), each against one of
        the contexts, whose tokens' keys and values are kept. Computing the longest context may be wider than
        the step.
        """
        lengths = list(contexts)
        kept = self.key_value * sum(length + tokens for length in lengths)
        widest = max(self.activations(rows, tokens), self.activations(1, max(lengths, default=0)))
        return kept + widest + tokens * self.residual

    def to_json(self) -> dict[str, int]:
        """All of it, for the canvas."""
        return asdict(self) | {"rows": GUIDANCE_ROWS}


def text_bytes(llm: LLMConfig, tokens: int, size: int) -> int:
    """Bytes of reading a question and writing its answer: keys and values of all tokens, and the widest
    activations of the question's pass.
    """
    key_value = 2 * llm.num_kv_heads * llm.head_dim * llm.num_layers
    return tokens * (key_value + 3 * llm.intermediate_size + 8 * llm.hidden_size) * size


def vit_bytes(config: ViTConfig, patches: int, size: int) -> int:
    """Bytes of embedding so many patches: the feed-forward's three tensors beside the residual stream and q,
    k, v.
    """
    return patches * (3 * config.intermediate_size + 8 * config.hidden_size) * size
