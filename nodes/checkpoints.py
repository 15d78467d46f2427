"""Which checkpoints there are: listed, refused with the way out, downloaded when chosen."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import comfy.model_management as mm
import folder_paths

from ..lance_core.checkpoint import finding
from ..lance_core.checkpoint.checkpoint import Checkpoint, stored_config
from ..lance_core.checkpoint.tensor_files import SafetensorsFile
from ..lance_core.errors import CheckpointError
from ..lance_core.hub import download
from . import comfy_compat

FOLDER = "lance"
CHOOSE = "choose a checkpoint"
CACHED = "models--"  # how the Hugging Face cache names a repository's folder
# Where configurations of checkpoint folders are: two levels deep, and in the cache's snapshots.
FOLDERS = ["*/llm_config.json", "*/*/llm_config.json"]
FOLDERS += [f"{CACHED}*/snapshots/{pattern}" for pattern in ("*/llm_config.json", "*/*/llm_config.json")]
FILES = ("*.safetensors", "*/*.safetensors")
SAVED = ("checkpoints", "diffusion_models")  # kinds of model folders, to which ComfyUI adds its output/ ones
DTYPES = ("default", "bf16", "fp16", "fp8_e4m3fn")


def register_folder() -> None:
    """Make models/lance known, beside whatever extra_model_paths.yaml names."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def checkpoints() -> dict[str, Path]:
    """Name in the list -> path of every released folder and self-contained file under the lance folders, two
    levels deep; and of such files where ComfyUI's save nodes put them.
    """
    found: dict[str, Path] = {}
    for base in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for pattern in FOLDERS:
            for config in sorted(base.glob(pattern)):
                if finding.is_checkpoint(config.parent):
                    found.setdefault(_listed(config.parent, base), config.parent)
        for pattern in FILES:
            for file in sorted(base.glob(pattern)):
                if _self_contained(file):
                    found.setdefault(file.relative_to(base).as_posix(), file)
    for kind in SAVED:
        for base in map(Path, folder_paths.get_folder_paths(kind)):
            for pattern in FILES:
                for file in sorted(base.glob(pattern)):
                    if _self_contained(file):
                        found.setdefault(f"{kind}/{file.relative_to(base).as_posix()}", file)
    return found


def _listed(folder: Path, base: Path) -> str:
    """A checkpoint folder's name in the list; of the Hugging Face cache's, repository and folder alone."""
    repository, *inside = folder.relative_to(base).parts
    if repository.startswith(CACHED) and inside[:1] == ["snapshots"]:
        return "/".join([repository.removeprefix(CACHED).replace("--", "/"), *inside[2:]])
    return "/".join([repository, *inside])


def _self_contained(file: Path) -> bool:
    """Whether a file says enough of itself to be loaded alone; looked at once while it does not change."""
    try:
        stat = file.stat()
    except OSError:
        return False
    return _says_enough(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _says_enough(file: Path, changed: int, size: int) -> bool:
    try:
        stored_config(SafetensorsFile(file))
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
        f"into {places} (from huggingface.co/{download.REPO}; {download.MIRROR_HINT} in the environment)."
    )


def fingerprint(choice: str) -> str:
    """Changes when any file of the checkpoint does, its ViT and VAE included, or one that was missing is put
    there.
    """
    there = checkpoints()
    path = there.get(download.name_of(choice) or choice)
    return str(None if path is None else finding.fingerprint(path, also=_also(path, there)))


def _also(path: Path, there: Mapping[str, Path]) -> list[Path]:
    """Where the ViT and the VAE of a file that lies elsewhere may be: wherever another checkpoint has them,
    and with ComfyUI's VAEs.
    """
    if path.is_dir():
        return []
    return [
        *dict.fromkeys(p.parent for p in there.values()),
        *map(Path, folder_paths.get_folder_paths("vae")),
    ]


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
    there = checkpoints()
    path = there.get(name)
    if path is None:
        raise CheckpointError(f"The checkpoint {name!r} is not there any more. {missing_message()}")
    return Checkpoint(path, also=_also(path, there))
