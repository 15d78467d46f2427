"""Which checkpoints there are: listed, refused with the way out, downloaded when chosen."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from pathlib import Path

import comfy.model_management as mm
import folder_paths

from ..lance_core.checkpoint.checkpoint import MODEL_FILES, Checkpoint, stored_config
from ..lance_core.checkpoint.tensor_files import SafetensorsFile
from ..lance_core.errors import CheckpointError
from ..lance_core.hub import download
from . import comfy_compat

FOLDER = "lance"
CHOOSE = "choose a checkpoint"
DTYPES = ("default", "bf16", "fp16", "fp8_e4m3fn")


def register_folder() -> None:
    """Make models/lance known, beside whatever extra_model_paths.yaml names."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def checkpoints() -> dict[str, Path]:
    """Name in the list -> path of every released folder and self-contained file under the lance folders, two
    levels deep.
    """
    found: dict[str, Path] = {}
    for base in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for pattern in ("*/llm_config.json", "*/*/llm_config.json"):
            for config in sorted(base.glob(pattern)):
                if any((config.parent / name).is_file() for name in MODEL_FILES):
                    found.setdefault(config.parent.relative_to(base).as_posix(), config.parent)
        for pattern in ("*.safetensors", "*/*.safetensors"):
            for file in sorted(base.glob(pattern)):
                if _self_contained(file):
                    found.setdefault(file.relative_to(base).as_posix(), file)
    return found


def _self_contained(file: Path) -> bool:
    """Whether a file says enough of itself to be loaded alone; looked at once as long as it does not change."""
    try:
        stat = file.stat()
    except OSError:
        return False
    return _says_enough(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)
def _says_enough(file: Path, changed: int, size: int) -> bool:
    try:
        stored_config(SafetensorsFile(file).metadata, file)
    except CheckpointError:
        return False
    return True


def choices() -> list[str]:
    """What the loader lists: the checkpoints on disk, then the released ones that can be downloaded.

    Where nothing is on disk the first choice is none, so that nothing is downloaded without being chosen.
    """
    there = checkpoints()
    names = {path.name for path in there.values()}
    return [
        *there,
        *([] if there else [CHOOSE]),
        *(download.label(name) for name in download.RELEASED if name not in names),
    ]


def refusal(choice: str) -> str | None:
    """Why a choice cannot be loaded, with the way out; None if it can."""
    there = checkpoints()
    if choice in there or download.name_of(choice):
        return None
    if choice in download.RELEASED:
        return (
            f"{choice} is not under models/lance yet: choose '{download.label(choice)}' in Lance Loader "
            f"to fetch it. {missing_message()}"
        )
    if there:
        return f"{choice!r} is not under models/lance: choose another checkpoint in Lance Loader."
    return (
        "No Lance checkpoint found: choose one marked (download, …) in Lance Loader to fetch it. "
        f"{missing_message()}"
    )


def missing_message() -> str:
    """Where to put the models by hand."""
    places = " or ".join(folder_paths.get_folder_paths(FOLDER))
    return (
        "By hand: put the folders Lance_3B and/or Lance_3B_Video, Qwen2.5-VL-ViT and the file "
        "Wan2.2_VAE.pth "
        f"into {places} (from huggingface.co/{download.REPO})."
    )


def fingerprint(choice: str) -> str:
    """Changes when the checkpoint's file does."""
    path = checkpoints().get(download.name_of(choice) or choice)
    files = (
        [path]
        if path and path.is_file()
        else [path / f for f in MODEL_FILES if (path / f).is_file()]
        if path
        else []
    )
    return str([(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files])


def fetch(choice: str, node_id: str | None) -> str:
    """The name of a chosen checkpoint, downloaded first if that is what was chosen. Shows progress and obeys
    interrupts.
    """
    name = download.name_of(choice)
    if name is None or name in checkpoints():
        return name or choice
    bar = comfy_compat.progress()

    def progress(what: str, done: int, total: int) -> None:
        bar(done, total)
        comfy_compat.show_text(f"{what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", node_id)

    root = folder_paths.get_folder_paths(FOLDER)[0]
    logging.info(f"Downloading {name} to {root}")
    download.download(name, root, progress=progress, check=mm.throw_exception_if_processing_interrupted)
    logging.info(f"{name} is complete in {root}")
    return name


def open_checkpoint(name: str) -> Checkpoint:
    """A checkpoint by its name in the list.

    Raises:
        CheckpointError: not there any more, or damaged.
    """
    path = checkpoints().get(name)
    if path is None:
        raise CheckpointError(f"The checkpoint {name!r} is not there any more. {missing_message()}")
    return Checkpoint(path)
