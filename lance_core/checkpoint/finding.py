"""Which files a checkpoint is made of, and where the ones beside it are looked for.

    models/lance/
      Lance_3B/             model.safetensors (or shards with an index), llm_config.json, tokenizer.json
      Qwen2.5-VL-ViT/       vit.safetensors, config.json
      Wan2.2_VAE.pth

A single file has configuration and tokeniser in its metadata. In a Hugging Face cache the same folders lie
below models--OWNER--NAME/snapshots/COMMIT, as links.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..stored_values import read_json
from .tensor_files import SafetensorsFile, WeightFile, open_weights

MODEL_FILES = ("model.safetensors", "ema.safetensors")
INDEX_FILES = tuple(f"{name}.index.json" for name in MODEL_FILES)
CONFIG_FILE = "llm_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
VIT_FOLDER, VIT_FILE, VIT_CONFIG = "Qwen2.5-VL-ViT", "vit.safetensors", "config.json"
VAE_FILES = ("Wan2.2_VAE.pth", "Wan2.2_VAE.safetensors", "wan2.2_vae.safetensors")
CONFIG_KEYS = ("llm_config", "llm_config.json", "config", "config.json")
TOKENIZER_KEYS = ("tokenizer", "tokenizer.json")
CONFIG_TENSOR = "lance_config"  # JSON as bytes, where a file's metadata is not ours to write
MAX_SHARDS = 1000

Given = str | os.PathLike | None  # a ViT or VAE named by the caller
Stamp = tuple[str, int, int, int] | tuple[str]  # path, and size, time and inode of a file that is there


# -- places --------------------------------------------------------------------------------------------------


def resolve(path: str | os.PathLike) -> Path:
    """The folder or file itself; for a repository in the Hugging Face cache, its snapshot that is in use."""
    path = Path(path)
    snapshots = path / "snapshots"
    if holds_model(path) or not snapshots.is_dir():
        return path
    try:
        named = (path / "refs" / "main").read_text(encoding="utf-8", errors="replace")[:64].strip()
    except OSError:
        named = ""
    if re.fullmatch(r"\w+", named) and (snapshots / named).is_dir():
        return snapshots / named
    there = sorted((p for p in snapshots.iterdir() if p.is_dir()), key=lambda p: (p.stat().st_mtime, p.name))
    return there[-1] if there else path


def holds_model(folder: Path) -> bool:
    """Whether a folder has a model file or the index of one in shards."""
    return any((folder / name).is_file() for name in (*MODEL_FILES, *INDEX_FILES))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint, by the names in it; nothing is opened."""
    return (folder / CONFIG_FILE).is_file() and holds_model(folder)


def candidates(
    path: str | os.PathLike, vit: Given = None, vae: Given = None, also: Sequence[Path] = ()
) -> list[Path]:
    """Every file that `Checkpoint(path, vit, vae, also)` opens or looks for, there or not, in no special
    order.
    """
    asked, found = Path(path), resolve(path)
    places = [asked / "refs" / "main"] if found != asked else []
    if found.is_dir():
        names = (*MODEL_FILES, *INDEX_FILES, CONFIG_FILE, *TOKENIZER_FILES)
        places += [found / name for name in names]
        places += [p for p in sorted(found.glob("*.safetensors")) if p.name not in MODEL_FILES]  # shards
    else:
        places.append(found)
    for place in vit_places(found, vit, also):
        file = place if vit and not place.is_dir() else place / VIT_FILE
        places += [file, file.parent / VIT_CONFIG]
    return places + vae_places(found, vae, also)


def fingerprint(
    path: str | os.PathLike, vit: Given = None, vae: Given = None, also: Sequence[Path] = ()
) -> tuple[Stamp, ...]:
    """What changes when a file of the checkpoint does, appears or goes: equal as long as opening it again
    would find the same. Looks at names, sizes, times and inodes only.
    """
    return tuple(map(_stamp, candidates(path, vit, vae, also)))


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return (str(path),)
    return str(path), found.st_size, found.st_mtime_ns, found.st_ino


def vit_places(path: Path, given: Given = None, also: Sequence[Path] = ()) -> list[Path]:
    """Where a ViT is looked for: folders, or what was given. also: further folders that may hold one."""
    return [Path(given)] if given else [p / VIT_FOLDER for p in (*_around(path), *also)]


def vae_places(path: Path, given: Given = None, also: Sequence[Path] = ()) -> list[Path]:
    """Where a VAE is looked for: files. also: see `vit_places`."""
    return [Path(given)] if given else [p / name for p in (*_around(path), *also) for name in VAE_FILES]


def _around(path: Path) -> list[Path]:
    """The folders that may hold what is beside a checkpoint: itself if it is one, and the one above."""
    return [path, path.parent] if path.is_dir() else [path.parent]


def find_vit(path: Path, given: Given, also: Sequence[Path] = ()) -> Path | None:
    """The ViT's weight file; None if there is none. A FIFO in its place is found, and refused when opened."""
    for place in vit_places(path, given, also):
        file = place / VIT_FILE if place.is_dir() else place
        if file.exists() and not file.is_dir():
            return file
    if given:
        raise CheckpointError(
            f"{given} (given as vit=) is neither a vision tower file nor a folder with {VIT_FILE}."
        )
    return None


def find_vae(path: Path, given: Given, also: Sequence[Path] = ()) -> Path | None:
    """The VAE's weight file; None if there is none."""
    for place in vae_places(path, given, also):
        if place.exists() and not place.is_dir():
            return place
    if given:
        raise CheckpointError(f"{given} (given as vae=) does not exist; expected {VAE_FILES[0]}.")
    return None


# -- the model file ------------------------------------------------------------------------------------------


class Shards:
    """A model in several safetensors files, with an index that says which tensor is in which.

    Raises:
        CheckpointError: the index is damaged, names files elsewhere, or does not fit the shards.
    """

    def __init__(self, index: Path) -> None:
        self.path = index
        self.metadata: dict[str, str] = {}
        self.holders: dict[str, SafetensorsFile] = {}
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not placed or not all(isinstance(v, str) for v in placed.values()):
            raise CheckpointError(f"{index} has no weight_map of tensors to files; download it again.")
        names = sorted(set(placed.values()))
        for name in names:
            if not re.fullmatch(r"\w[\w.+-]*\.safetensors", name):
                raise CheckpointError(
                    f"{index} names the file {name[:80]!r}, expected plain names of safetensors files beside "
                    "it; download it again."
                )
        if len(names) > MAX_SHARDS:
            raise CheckpointError(f"{index} names {len(names)} files, at most {MAX_SHARDS} are read.")
        absent = [name for name in names if not (index.parent / name).exists()]
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            raise CheckpointError(
                f"{index.parent} lacks {len(absent)} of the {len(names)} shards that {index.name} names: "
                f"{', '.join(absent[:3])}{more}. Download them."
            )
        files = {name: SafetensorsFile(index.parent / name) for name in names}
        for key, name in placed.items():
            if key not in files[name].entries:
                raise CheckpointError(
                    f"{files[name].path} has no tensor {key[:100]!r}, which {index.name} says is in it: they "
                    "are of two downloads. Download both again."
                )
            self.holders[key] = files[name]
        for name, file in files.items():
            for key in file.entries:
                if placed.get(key) != name:
                    raise CheckpointError(
                        f"{file.path} has a tensor {key[:100]!r}, which {index.name} does not place there: "
                        "they are of two downloads. Download both again."
                    )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: file.entries[key].shape for key, file in self.holders.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: file.entries[key].dtype for key, file in self.holders.items()}


def open_single_file(path: Path) -> SafetensorsFile:
    """A checkpoint that is one file.

    Raises:
        CheckpointError: it is no safetensors file.
    """
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(
            f"{path} is no checkpoint; expected a folder such as models/lance/Lance_3B, or a .safetensors "
            "file."
        )
    return SafetensorsFile(path)


def open_model(folder: Path) -> WeightFile | Shards:
    """The model file or shards of a checkpoint folder.

    Raises:
        CheckpointError: there is none; says which folder may be meant instead.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} does not exist; expected a checkpoint folder such as models/lance/Lance_3B "
            "(`python -m lance_core download` fetches one)."
        )
    for name in MODEL_FILES:
        if (folder / name).exists():
            return open_weights(folder / name)
    for name in INDEX_FILES:
        if (folder / name).exists():
            return Shards(folder / name)
    inner = [str(p) for p in _inner(folder)]
    hint = f" Did you mean {' or '.join(inner)}?" if inner else ""
    raise CheckpointError(f"{folder} is not a Lance checkpoint: it has no {' or '.join(MODEL_FILES)}.{hint}")


def _inner(folder: Path, most: int = 2) -> Iterator[Path]:
    """Checkpoints a folder has further in, in the Hugging Face cache as well."""
    commits = ["*/*"] if folder.name == "snapshots" else []
    for pattern in ("*", *commits, "snapshots/*/*", "models--*/snapshots/*/*", "hub/models--*/snapshots/*/*"):
        for inner in sorted(folder.glob(pattern)):
            if holds_model(inner):
                yield inner
                most -= 1
            if not most:
                return


def stored_config(file: SafetensorsFile) -> dict[str, Any]:
    """What a single file says of itself: {"llm_config": ..., "tokenizer": ..., "vit_config": ... or absent},
    in its metadata or, where a program of someone else's wrote these, in a tensor of bytes.

    Raises:
        CheckpointError: it does not say enough.
    """
    path, metadata = file.path, file.metadata

    def parse(text: str, where: str = "metadata in its header") -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: the {where} is not JSON ({str(error)[:150]}); get the file again."
            ) from None

    if "lance" in metadata:
        told = parse(metadata["lance"])
    elif file.dtypes.get(CONFIG_TENSOR) is torch.uint8:
        text = bytes(file.read(CONFIG_TENSOR).flatten().numpy()).decode("utf-8", "replace")
        told = parse(text, f"tensor {CONFIG_TENSOR}")
    else:
        told = {}
    if not isinstance(told, dict):
        raise CheckpointError(
            f"{path}: the `lance` metadata in its header is no JSON object; get the file again."
        )
    for wanted, keys in (
        ("llm_config", CONFIG_KEYS),
        ("tokenizer", TOKENIZER_KEYS),
        ("vit_config", ("vit_config",)),
    ):
        for key in keys:
            if wanted not in told and key in metadata:
                told[wanted] = parse(metadata[key])
    missing = [name for name in ("llm_config", "tokenizer") if not isinstance(told.get(name), dict)]
    if missing:
        raise CheckpointError(
            f"{path} is a single file without {' and '.join(missing)} in its metadata, so it cannot be read "
            "on its own; use the released folder, or make a file with `python -m lance_core convert`."
        )
    return told
