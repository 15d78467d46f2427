"""A node that saves what a graph has made of the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io

from ..lance_core.checkpoint.convert import stored_metadata
from ..lance_core.checkpoint.writing import write_safetensors
from ..lance_core.errors import RequestError
from . import comfy_compat, saving
from .model import LanceModel
from .sockets import CATEGORY, LANCE, Reader, checked


class LanceSaveCheckpoint(io.ComfyNode):
    """MODEL, and LANCE and VAE if wanted -> one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceSaveCheckpoint",
            display_name="Lance Save Checkpoint",
            category=CATEGORY,
            description="Saves the model with its LoRAs and merges as one file that Lance Loader loads.",
            inputs=[
                io.Model.Input("model", tooltip="Both experts are saved, with all that is on their weights."),
                io.String.Input(
                    "filename_prefix",
                    default="checkpoints/Lance",
                    tooltip="Below the output folder. In checkpoints/ or diffusion_models/ Lance Loader "
                    "finds it at once.",
                ),
                LANCE.Input(
                    "lance",
                    optional=True,
                    tooltip="Connected, the vision tower goes into the file; else Lance Loader looks for it "
                    "under models/lance.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Connected, the VAE goes into the file; else Lance Loader looks for it under "
                    "models/lance.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls, model: Any, filename_prefix: str, lance: Reader | None = None, vae=None
    ) -> io.NodeOutput:
        if not isinstance(model.model, LanceModel):
            raise RequestError("The model is not Lance: connect what comes from Lance Loader's MODEL.")
        tensors = saving.planned(model)
        if lance is not None:
            if lance.config.llm != model.model.llm:
                raise RequestError(
                    f"The LANCE is of {lance.name}, which has another size than the model: connect both "
                    "from one Lance Loader."
                )
            if lance.vit is not None:
                tensors += saving.beside("vit", lance.vit.model.state_dict())
        if vae is not None:
            tensors += saving.beside("vae", saving.vae_tensors(vae.get_sd()))
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = Path(folder, f"{name}_{counter:05}_.safetensors")
        size = write_safetensors(path, tensors, cls._metadata(model.model.told), comfy_compat.progress())
        shown = os.path.relpath(path, folder_paths.get_output_directory())
        return io.NodeOutput(ui={"text": [f"{shown}: {size / 1e9:.2f} GB"]})

    @classmethod
    def _metadata(cls, told: dict[str, Any]) -> dict[str, str]:
        """Ours, and the graph as ComfyUI's save nodes store it."""
        graph: dict[str, Any] = {}
        if not args.disable_metadata:
            graph = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        return {k: json.dumps(v) for k, v in graph.items() if v is not None} | stored_metadata(told)
