"""Which checkpoints there are, and a checkpoint -> MODEL, LANCE and VAE with ComfyUI's patchers around them."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..lance_core.checkpoint import MODEL_FILES, Checkpoint
from ..lance_core.errors import CheckpointError
from ..lance_core.model import Understanding
from ..lance_core.vit import VisionTower
from . import host, model
from .types import Lance
from .vae import LanceVAE

FOLDER = "lance"
DTYPES = ("default", "bf16", "fp16", "fp8_e4m3fn")


def register_folder() -> None:
    """Make models/lance known, beside whatever extra_model_paths.yaml names."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def checkpoints() -> dict[str, Path]:
    """Name in the list -> path of every released folder under the lance folders, two levels deep."""
    found: dict[str, Path] = {}
    for base in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for pattern in ("*/llm_config.json", "*/*/llm_config.json"):
            for config in sorted(base.glob(pattern)):
                folder = config.parent
                if any((folder / name).is_file() for name in MODEL_FILES):
                    found.setdefault(folder.relative_to(base).as_posix(), folder)
    return found


def missing_message() -> str:
    """Where to put the models, for a list that is empty."""
    places = " or ".join(folder_paths.get_folder_paths(FOLDER))
    return (
        f"No Lance checkpoint found. Put the folders Lance_3B and/or Lance_3B_Video, Qwen2.5-VL-ViT and the file Wan2.2_VAE.pth "
        f"into {places} (from huggingface.co/bytedance-research/Lance)."
    )


def fingerprint(name: str) -> str:
    """Changes when the checkpoint's file does."""
    path = checkpoints().get(name)
    files = [path / f for f in MODEL_FILES if (path / f).is_file()] if path else []
    return str([(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files])


def load(name: str, dtype: str):
    """MODEL patcher, LANCE and VAE of a checkpoint by its name in the list.

    Raises:
        CheckpointError: not there, or damaged.
    """
    checkpoint = _open(name)
    main, und, vit, compute = _patchers(checkpoint, dtype)
    host.reloadable([p for p in (main, und, vit) if p], reload, name, dtype)
    return main, Lance(checkpoint.config, checkpoint.tokenizer, und, vit, compute, name), LanceVAE(checkpoint)


def reload(name: str, dtype: str, disable_dynamic: bool = False) -> list:
    """Patchers of a checkpoint with weights of their own, in the order in which `load` makes them."""
    return [p for p in _patchers(_open(name), dtype, disable_dynamic)[:3] if p]


def _open(name: str) -> Checkpoint:
    path = checkpoints().get(name)
    if path is None:
        raise CheckpointError(f"The checkpoint {name!r} is not there any more. {missing_message()}")
    return Checkpoint(path)


def _patchers(checkpoint: Checkpoint, dtype: str, disable_dynamic: bool = False):
    """Patchers of the generation expert, the understanding expert and the vision tower (or None); and the compute dtype."""
    config = checkpoint.config
    stored, compute = host.weight_dtypes(dtype, checkpoint.parts["gen"].parameters + checkpoint.parts["und"].parameters)
    ops = host.operations(stored, compute)

    def part(which: str, module, patcher) -> None:
        host.fill(patcher, module, checkpoint.tensors(which), stored, len(checkpoint.parts[which].tensors))

    understanding = Understanding(config.llm, ops, device="meta", dtype=stored).eval()
    und = host.make_patcher(understanding, disable_dynamic=disable_dynamic)
    part("und", understanding, und)
    main = model.build(config.llm, stored, compute, und, disable_dynamic)
    part("gen", main.model.diffusion_model, main)
    vit = None
    if config.vit is not None:
        tower = VisionTower(config.vit, ops, device="meta", dtype=stored, attention=host.attention).eval()
        vit = host.make_patcher(tower, disable_dynamic=disable_dynamic)
        part("vit", tower, vit)
    return main, und, vit, compute
