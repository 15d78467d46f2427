"""Text to token ids and back: Qwen2's byte-level BPE with its special tokens by name.

A user's text is text: the tokeniser used for it has no added tokens, so `<|im_end|>` typed in a prompt is
spelled out letter by letter and can never end a turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from ..config import read_json
from ..errors import CheckpointError

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")


MAX_ID = 1 << 24


# Qwen2's pre-tokenisation pattern, needed where a checkpoint has vocab.json and merges.txt only.
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Qwen2's byte-level BPE with its special tokens by name.

    Args:
        definition: contents of a tokenizer.json.
        where: what to call the source in errors.

    Raises:
        CheckpointError: the definition is not a tokeniser, or a special token is missing.
    """

    def __init__(self, definition: dict, where: str) -> None:
        try:
            added = {t["content"]: int(t["id"]) for t in definition.get("added_tokens") or []}
            if not all(0 <= i < MAX_ID for i in added.values()):
                raise ValueError("an added token's id is out of range")
            plain = {k: v for k, v in definition.items() if k != "added_tokens"} | {
                "added_tokens": [],
                "post_processor": None,
            }
            self._tokenizer = _Tokenizer.from_str(json.dumps(plain))
            self._special_text = {i: text for text, i in added.items()}
        except Exception as error:  # the tokenizers library raises bare Exception for every parse failure
            raise CheckpointError(
                f"{where} does not define a tokeniser ({error}); download it again."
            ) from None
        missing = [name for name in SPECIALS if name not in added]
        if missing:
            raise CheckpointError(
                f"{where} lacks the special tokens {', '.join(missing)}; these are not Lance's tokeniser "
                "files."
            )
        self.definition = definition
        self.im_start, self.im_end, self.vision_start, self.vision_end, self.pad = (
            added[name] for name in SPECIALS
        )
        self._size = max(self._tokenizer.get_vocab_size(with_added_tokens=False), 1 + max(added.values()))

    def __len__(self) -> int:
        """Number of ids in use; rows of lm_head past it are padding."""
        return self._size

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From tokenizer.json, or else vocab.json + merges.txt with the special tokens of
        tokenizer_config.json or added_tokens.json.
        """
        path = folder / "tokenizer.json"
        if path.is_file():
            return cls(read_json(path), str(path))
        vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
        if not vocab_path.is_file() or not merges_path.is_file():
            raise CheckpointError(
                f"{folder} has no tokeniser: expected tokenizer.json, or vocab.json with merges.txt. Copy "
                "them from the released checkpoint."
            )
        try:
            lines = merges_path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{merges_path} cannot be read ({error}); download it again.") from None
        merges = [line for line in lines if line and not line.startswith("#version")]
        return cls(_definition(read_json(vocab_path), merges, _added_tokens(folder)), str(vocab_path))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no special token can come out of it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Special tokens are written out by name; bytes that are not UTF-8 become U+FFFD."""
        out, run = [], []
        for i in ids:
            if i in self._special_text:
                out += [self._plain(run), self._special_text[i]]
                run = []
            else:
                run.append(i)
        return "".join([*out, self._plain(run)])

    def _plain(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""


def _added_tokens(folder: Path) -> dict[str, int]:
    """Special tokens by name from whichever of the tokeniser's side files has them."""
    if (folder / "added_tokens.json").is_file():
        return read_json(folder / "added_tokens.json")
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        raise CheckpointError(
            f"{folder}/tokenizer_config.json has no added_tokens_decoder, so the special tokens are unknown."
        )
    return {
        v["content"]: int(k)
        for k, v in decoder.items()
        if isinstance(v, dict) and "content" in v and k.isdecimal()
    }


def _definition(vocab: dict, merges: list[str], added: dict[str, int]) -> dict:
    """A tokenizer.json equal to Qwen2's, from the older files."""
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": t,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for t, i in added.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "byte_fallback": False,
            "ignore_merges": False,
        },
    }
