"""Text to token ids and back: Qwen2's byte-level BPE with its special tokens by name.

A user's text is text: the tokeniser used for it has no added tokens, so `<|im_end|>` typed in a prompt is
encoded letter by letter and can never end a turn.

A checkpoint's tokenizer.json decides three things only: vocabulary, merges and special tokens. The tokeniser
is built from these with Qwen2's own normalisation and splitting, because the tokenizers library obeys
whatever a file says, and some of it ends the process (a regular expression without end, an enormous padding)
or changes every prompt silently (truncation, dropout).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer as _Tokenizer

from ..errors import CheckpointError, RequestError
from ..files import read_bytes
from ..stored_values import read_json

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
MAX_ID = 1 << 24
MAX_MERGES = 1 << 22  # Qwen2 has 151,387
MAX_TEXT = 1 << 18  # characters encoded at once, in seconds; the library itself fails above some millions
MERGES_BYTES = 256 << 20

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2 cuts a text into words before merging."""


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in GPT-2's byte-level BPE: printable ones for themselves,
    others from U+0100.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


class Tokenizer:
    """Qwen2's byte-level BPE with its special tokens by name.

    Args:
        definition: contents of a tokenizer.json.
        where: what to call the source in errors.

    Raises:
        CheckpointError: the definition is not of Qwen2's kind, is damaged, or lacks a special token.
    """

    def __init__(self, definition: Mapping[str, Any], where: str) -> None:
        self._where = where
        added = self._added(definition.get("added_tokens"))
        self._check_kind(definition)
        model = definition["model"]
        vocab = self._vocabulary(model.get("vocab"))
        merges = self._merges(model.get("merges"), vocab)
        missing = [name for name in SPECIALS if name not in added]
        if missing:
            raise CheckpointError(
                f"{where} lacks the special tokens {', '.join(missing)}; these are not Lance's tokeniser "
                "files."
            )
        owner = {i: token for token, i in vocab.items()}
        for token, i in added.items():
            if owner.get(i, token) != token or vocab.get(token, i) != i:
                self._refuse(f"the id {i} of {token[:40]!r} is another token's, too")
        # Written as older releases of the library read them; pairs only where a token has a space in it.
        joined = [" ".join(pair) for pair in merges]
        simple = all(text.count(" ") == 1 for text in joined)
        self.definition = tokenizer_json(vocab, joined if simple else merges, added)
        plain = self.definition | {"added_tokens": []}
        self._tokenizer: _Tokenizer = self._guarded(_Tokenizer.from_str, json.dumps(plain))
        self._special_text = {i: text for text, i in added.items()}
        self.im_start, self.im_end, self.vision_start, self.vision_end, self.pad = (
            added[name] for name in SPECIALS
        )
        self._size = 1 + max(*vocab.values(), *added.values())

    def __len__(self) -> int:
        """Number of ids in use, the highest and one; rows of lm_head past it are padding."""
        return self._size

    # -- checking a definition -------------------------------------------------------------------------------

    def _refuse(self, why: str) -> NoReturn:
        raise CheckpointError(
            f"{self._where} does not define a tokeniser Lance can use: {why}. Get the released checkpoint's "
            "tokenizer.json."
        )

    def _check_kind(self, definition: Mapping[str, Any]) -> None:
        """Whether it is Qwen2's kind: what decides ids must be known, as another would give other ids."""
        model = definition.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            self._refuse("its model is not BPE")
        normal = _steps(definition.get("normalizer"), "normalizers")
        splits = _steps(definition.get("pre_tokenizer"), "pretokenizers")
        others = [s for s in normal if not _is_nfc(s)] + [s for s in splits if not _is_qwen2_split(s)]
        if others:
            self._refuse(f"it has a step that Qwen2's has not ({_shown(others[0])})")
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                self._refuse(f"its {key} is {_shown(model[key])}, Qwen2 has none")

    def _vocabulary(self, vocab: Any) -> dict[str, int]:
        if not isinstance(vocab, dict) or not vocab:
            self._refuse("it has no vocabulary")
        if not all(type(i) is int and 0 <= i < MAX_ID for i in vocab.values()):
            self._refuse(f"a token's id is no whole number below {MAX_ID}")
        if len(set(vocab.values())) != len(vocab):
            self._refuse("two tokens have one id")
        lacking = [c for c in byte_alphabet() if c not in vocab]
        if lacking:
            self._refuse(f"{len(lacking)} of the 256 bytes are no tokens of it, {lacking[0]!r} for one")
        if not _is_text("".join(vocab)):
            self._refuse("a token of it is no valid text")
        return vocab

    def _merges(self, merges: Any, vocab: Mapping[str, int]) -> list[list[str]]:
        """The merges as pairs; files have pairs or, older ones, "left right"."""
        if not isinstance(merges, list) or len(merges) > MAX_MERGES:
            self._refuse("it has no list of merges")
        pairs = []
        for merge in merges:
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)):
                self._refuse(f"the merge {_shown(merge)} is no pair of tokens")
            if not (pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab):
                self._refuse(f"the merge {_shown(merge)} joins or makes what is no token")
            pairs.append(pair)
        return pairs

    def _added(self, tokens: Any) -> dict[str, int]:
        """The special tokens' ids by name."""
        if not isinstance(tokens if tokens is not None else [], list):
            self._refuse("its added_tokens are no list")
        added: dict[str, int] = {}
        for token in tokens or []:
            name, i = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
            if not (isinstance(name, str) and name and _is_text(name) and type(i) is int and 0 <= i < MAX_ID):
                self._refuse(f"the added token {_shown(token)} has no name or no id below {MAX_ID}")
            if added.get(name, i) != i:
                self._refuse(f"the added token {name[:40]!r} has two ids")
            added[name] = i
        if len(set(added.values())) != len(added):
            self._refuse("two of its added tokens have one id")
        return added

    def _guarded(self, call: Any, *args: Any) -> Any:
        """Call the Rust library, whose panics are no Exception and would end a worker thread for good."""
        try:
            return call(*args)
        except Exception as error:  # it raises bare Exception for every failure
            reason = str(error)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            reason = f"panic: {error}"
        self._refuse(f"the tokenizers library cannot work with it ({reason[:120]})")

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From tokenizer.json, or else vocab.json + merges.txt with the special tokens of
        tokenizer_config.json or added_tokens.json.
        """
        path = folder / "tokenizer.json"
        if path.exists():
            return cls(read_json(path), str(path))
        vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
        if not vocab_path.is_file() or not merges_path.is_file():
            raise CheckpointError(
                f"{folder} has no tokeniser: expected tokenizer.json, or vocab.json with merges.txt. Copy "
                "them from the released checkpoint."
            )
        try:
            lines = read_bytes(merges_path, MERGES_BYTES).decode().replace("\r\n", "\n").split("\n")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{merges_path} cannot be read ({error}); download it again.") from None
        merges = [line for line in lines if line and not line.startswith("#version")]
        definition = {
            "model": {"vocab": read_json(vocab_path), "merges": merges},
            "added_tokens": _added_tokens(folder),
        }
        return cls(definition, str(vocab_path))

    # -- text and ids ----------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no special token can come out of it.

        Raises:
            RequestError: the text is too long to encode, or half of a surrogate pair is in it.
        """
        if len(text) > MAX_TEXT:
            raise RequestError(
                f"The text has {len(text):,} characters, at most {MAX_TEXT:,} can be encoded; shorten it."
            )
        for at, character in enumerate(text) if not _is_text(text) else ():
            if "\ud800" <= character <= "\udfff":
                raise RequestError(
                    f"The text is not valid Unicode: character {at + 1} is U+{ord(character):04X}, half of a "
                    "surrogate pair (a cut emoji, or bytes in another encoding than UTF-8). Type it again."
                )
        return self._guarded(self._tokenizer.encode, text, None, False, False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Special tokens are written out by name; bytes that are not UTF-8 become U+FFFD."""
        out: list[str] = []
        run: list[int] = []
        for i in ids:
            if i in self._special_text:
                out += [self._plain(run), self._special_text[i]]
                run = []
            else:
                run.append(i)
        return "".join([*out, self._plain(run)])

    def _plain(self, ids: list[int]) -> str:
        return self._guarded(self._tokenizer.decode, ids, False) if ids else ""


def _is_text(text: str) -> bool:
    """Whether it can be UTF-8: no half of a surrogate pair is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    """A value from a file, for a message."""
    return repr(str(value)[:80])


def _steps(step: Any, inner: str) -> list[Any]:
    """The steps of a normaliser or pre-tokeniser; a Sequence has several."""
    if step is None:
        return []
    if isinstance(step, dict) and step.get("type") == "Sequence" and isinstance(step.get(inner), list):
        return step[inner]
    return [step]


def _is_nfc(step: Any) -> bool:
    return step == {"type": "NFC"}


def _is_qwen2_split(step: Any) -> bool:
    """Qwen2's Split, or the byte level without a split of its own."""
    if not isinstance(step, dict):
        return False
    if step.get("type") == "Split":
        same = step.get("pattern") == {"Regex": QWEN2_SPLIT}
        return same and step.get("behavior") == "Isolated" and step.get("invert", False) is False
    byte_level = step.get("type") == "ByteLevel" and step.get("add_prefix_space", True) is False
    return byte_level and step.get("use_regex", True) is False


def _added_tokens(folder: Path) -> list[dict[str, Any]]:
    """Special tokens from whichever of the tokeniser's side files has them, as tokenizer.json lists them."""
    if (folder / "added_tokens.json").exists():
        named = read_json(folder / "added_tokens.json")
        return [{"content": name, "id": i} for name, i in named.items()]
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        raise CheckpointError(
            f"{folder}/tokenizer_config.json has no added_tokens_decoder, so the special tokens are unknown."
        )
    return [
        {"content": v["content"], "id": int(k)}
        for k, v in decoder.items()
        if isinstance(v, dict) and "content" in v and len(k) < 12 and k.isascii() and k.isdecimal()
    ]


def tokenizer_json(
    vocab: Mapping[str, int], merges: list[str] | list[list[str]], added: Mapping[str, int]
) -> dict[str, Any]:
    """A tokenizer.json of Qwen2's kind with this vocabulary, these merges and these special tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": QWEN2_SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name} | flags for name, i in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "dropout": None, "unk_token": None}
        | {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}
        | {"byte_fallback": False, "ignore_merges": False},
    }
