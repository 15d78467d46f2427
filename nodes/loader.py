"""From a checkpoint to MODEL, LANCE and VAE, with ComfyUI's patchers around its parts."""

from __future__ import annotations

from typing import Any

from ..lance_core.checkpoint.checkpoint import Checkpoint
from ..lance_core.model.vit import VisionTower
from . import comfy_compat, model, patcher, quant
from .checkpoints import open_checkpoint
from .sockets import Reader
from .vae import LanceVAE


def load(name: str, dtype: str):
    """MODEL patcher, LANCE and VAE of a checkpoint by its name in the list.

    Raises:
        CheckpointError: not there, or damaged.
    """
    checkpoint = open_checkpoint(name)
    main, und, vit, compute = _patchers(checkpoint, dtype)
    patcher.reloadable([p for p in (main, und, vit) if p], reload, name, dtype)
    vae = LanceVAE(checkpoint)
    patcher.reloadable([vae.patcher], reload_vae, name)
    return main, Reader(checkpoint.config, checkpoint.tokenizer, und, vit, compute, name), vae


def reload(name: str, dtype: str, disable_dynamic: bool = False) -> list:
    """Patchers of a checkpoint with weights of their own, in the order in which `load` makes them."""
    return [p for p in _patchers(open_checkpoint(name), dtype, disable_dynamic)[:3] if p]


def reload_vae(name: str, disable_dynamic: bool = False) -> list:
    """The patcher of a checkpoint's VAE with weights of its own, in a list."""
    return [LanceVAE(open_checkpoint(name)).patcher]


def _patchers(checkpoint: Checkpoint, dtype: str, disable_dynamic: bool = False):
    """Patchers of the generation expert, the understanding expert and the vision tower (or None); and the
    compute dtype.

    Three patchers, so that ComfyUI holds what each task needs and no more: reading and answering run the
    vision tower and the understanding expert; sampling runs both experts. Where these do not fit together,
    the generation expert goes first (`patcher.main_first`): it reads every token of the picture in every
    step, the understanding expert two markers, so that streaming it costs a transfer a step, and little else.
    """
    config = checkpoint.config
    stored, compute = comfy_compat.weight_dtypes(
        dtype, checkpoint.parts["gen"].parameters + checkpoint.parts["und"].parameters
    )
    ops = comfy_compat.operations(stored, compute)

    def fill(which: str, module: Any, into: Any) -> None:
        patcher.fill(
            into, module, checkpoint.tensors(which, stored, module=module), checkpoint.count(which, module)
        )

    understanding = checkpoint.build("und", ops, dtype=stored, make=quant.make).eval()
    und = patcher.make_patcher(understanding, patcher.PatchesInForward, disable_dynamic=disable_dynamic)
    fill("und", understanding, und)
    main = model.build(config.llm, stored, compute, und, disable_dynamic, checkpoint.parts["gen"].formats)
    fill("gen", main.model.diffusion_model, main)
    vit = None
    if config.vit is not None:
        tower = VisionTower(
            config.vit, ops, device="meta", dtype=stored, attention=comfy_compat.attention
        ).eval()
        vit = patcher.make_patcher(tower, disable_dynamic=disable_dynamic)
        fill("vit", tower, vit)
    return main, und, vit, compute
