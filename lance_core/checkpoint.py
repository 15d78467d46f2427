"""A checkpoint on disk -> configuration, tokeniser and modules: found, checked whole, then streamed part by part.

A checkpoint has four parts, each loadable on its own: "und" and "gen" (the two experts), "vit" and "vae". Names and
shapes of all of them are checked when it is opened, before anything is allocated. Loading builds the module on the meta
device and fills it tensor by tensor in its final dtype: peak memory is the result plus one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import LanceConfig, Shapes, llm_config, read_json, vae_config, variant_of, vit_config
from .errors import CheckpointError
from .model import Generation, Understanding
from .ops import TorchOps
from .prompts import Tokenizer
from .vae import WanVAE
from .vit import VisionTower
from .weights import WeightFile, open_weights

PARTS = ("und", "gen", "vit", "vae")
MODEL_FILES = ("model.safetensors", "ema.safetensors")
VIT_FOLDER, VIT_FILE = "Qwen2.5-VL-ViT", "vit.safetensors"
VAE_FILES = ("Wan2.2_VAE.pth", "Wan2.2_VAE.safetensors", "wan2.2_vae.safetensors")
IGNORED = ("latent_pos_embed.pos_embed",)  # a fixed table, computed instead (MODEL: whatever its shape)

Progress = Callable[[str, int, int], None]  # what is going on, done, total


@dataclass
class Part:
    """Where one part's tensors are: names in the module -> (file, name in the file)."""

    tensors: dict[str, tuple[WeightFile, str]] = field(default_factory=dict)

    @property
    def shapes(self) -> Shapes:
        return {name: file.shapes[key] for name, (file, key) in self.tensors.items()}

    @property
    def parameters(self) -> int:
        return sum(torch.Size(s).numel() for s in self.shapes.values())


def part_of(key: str) -> tuple[str, str] | None:
    """A model-file tensor name -> (part, name in the part's module); None if it belongs to none."""
    if key.startswith("vit_model."):
        return "vit", key.removeprefix("vit_model.")
    if key.startswith(("time_embedder.", "vae2llm.", "llm2vae.")):
        return "gen", key
    if not key.startswith("language_model."):
        return None
    name = key.removeprefix("language_model.").removeprefix("model.")
    return ("gen", name.replace("_moe_gen", "")) if "_moe_gen" in name else ("und", name)


class Checkpoint:
    """An opened checkpoint: all names and shapes known and checked, no weights read yet.

    Args:
        path: a released folder (`.../Lance_3B` or `.../Lance_3B_Video`).
        vit, vae: files or folders to use instead of the ones found inside or beside it.

    Raises:
        CheckpointError: something is missing, damaged or of another model; the message names it.
    """

    def __init__(self, path: str | os.PathLike, vit: str | os.PathLike | None = None, vae: str | os.PathLike | None = None) -> None:
        self.path = Path(path)
        self.parts = {name: Part() for name in PARTS}
        file = self._open_model_file()
        raw = read_json(self.path / "llm_config.json")
        self.tokenizer = Tokenizer.from_folder(self.path)
        unexpected = self._sort_tensors(file)
        vit_raw = self._find_vit(vit, raw)
        vae_path = self._find_vae(vae)

        llm = llm_config(raw, file.shapes, str(self.path))
        if len(self.tokenizer) > llm.vocab_size:
            raise CheckpointError(
                f"{self.path}: the tokeniser has {len(self.tokenizer)} tokens, the embeddings {llm.vocab_size} rows: they are of two models."
            )
        vision = vit_config(vit_raw, str(self.path)) if vit_raw else None
        wan = vae_config(self.parts["vae"].shapes, str(vae_path)) if vae_path else None
        self.config = LanceConfig(llm, vision, wan, variant_of(file.shapes, self.path.name), raw)
        if vision and vision.out_hidden_size != llm.hidden_size:
            raise CheckpointError(
                f"{self.path}: the ViT writes embeddings of width {vision.out_hidden_size}, the decoder reads {llm.hidden_size}: "
                "they are of two models."
            )
        self._check(unexpected)

    # -- finding ------------------------------------------------------------------------------------------------

    def _open_model_file(self) -> WeightFile:
        if not self.path.is_dir():
            what = "is a file" if self.path.is_file() else "does not exist"
            raise CheckpointError(f"{self.path} {what}; expected a checkpoint folder such as models/lance/Lance_3B.")
        for name in MODEL_FILES:
            if (self.path / name).is_file():
                return open_weights(self.path / name)
        inner = [p.parent.name for p in self.path.glob("*/model.safetensors")]
        hint = f" Did you mean {self.path / inner[0]}?" if inner else ""
        raise CheckpointError(f"{self.path} is not a Lance checkpoint: it has no {' or '.join(MODEL_FILES)}.{hint}")

    def _sort_tensors(self, file: WeightFile) -> list[str]:
        unexpected = []
        for key in file.shapes:
            where = part_of(key)
            if where:
                self.parts[where[0]].tensors[where[1]] = (file, key)
            elif key not in IGNORED:
                unexpected.append(key)
        return unexpected

    def _find_vit(self, given: str | os.PathLike | None, raw: dict) -> dict | None:
        """Point the "vit" part at its file; returns its configuration, None where there is no ViT."""
        inside = bool(self.parts["vit"].tensors)
        candidates = [Path(given)] if given else [] if inside else [self.path / VIT_FOLDER, self.path.parent / VIT_FOLDER]
        for place in candidates:
            path = place / VIT_FILE if place.is_dir() else place
            if not path.is_file():
                continue
            file = open_weights(path)
            self.parts["vit"] = Part({key: (file, key) for key in file.shapes})
            beside = path.parent / "config.json"
            config = read_json(beside) if beside.is_file() else raw
            return config.get("vision_config", config)
        if given:
            raise CheckpointError(f"{given} (given as vit=) is neither a vision tower file nor a folder with {VIT_FILE}.")
        if inside and not isinstance(raw.get("vision_config"), dict):
            raise CheckpointError(f"{self.path}: llm_config.json has no vision_config for the ViT inside; download it again.")
        return raw["vision_config"] if inside else None

    def _find_vae(self, given: str | os.PathLike | None) -> Path | None:
        folders = (self.path, self.path.parent)
        candidates = [Path(given)] if given else [folder / name for folder in folders for name in VAE_FILES]
        for path in candidates:
            if path.is_file():
                file = open_weights(path)
                self.parts["vae"] = Part({key: (file, key) for key in file.shapes})
                return path
        if given:
            raise CheckpointError(f"{given} (given as vae=) does not exist; expected Wan2.2_VAE.pth.")
        return None

    # -- checking and loading -----------------------------------------------------------------------------------

    def build(self, part: str, ops=TorchOps, device="meta", dtype: torch.dtype | None = None) -> nn.Module:
        """The part's module, its weights not yet loaded.

        Raises:
            CheckpointError: the checkpoint has no such part; says where it is looked for.
        """
        kw = {"ops": ops, "device": device, "dtype": dtype}
        if part == "vit":
            if self.config.vit is None:
                raise CheckpointError(
                    f"{self.path} has no vision tower, which reading pictures needs: put {VIT_FOLDER}/{VIT_FILE} with its config.json "
                    f"beside it, in {self.path.parent}, or give vit=."
                )
            return VisionTower(self.config.vit, **kw)
        if part == "vae":
            if self.config.vae is None:
                raise CheckpointError(f"{self.path} has no VAE: put {VAE_FILES[0]} beside it, in {self.path.parent}, or give vae=.")
            return WanVAE(self.config.vae, **kw)
        return {"und": Understanding, "gen": Generation}[part](self.config.llm, **kw)

    def _check(self, unexpected: list[str]) -> None:
        """Every part's names, shapes and dtypes against the module they are for."""
        problems = [f"unexpected tensor {name}" for name in unexpected]
        for name, part in self.parts.items():
            if not part.tensors and name in ("vit", "vae"):
                continue
            expected = {k: tuple(v.shape) for k, v in self.build(name).state_dict().items()}
            found = part.shapes
            label = {key: part.tensors[key][1] for key in found}
            problems += [f"missing tensor {key} of the {name} part" for key in expected if key not in found]
            problems += [f"unexpected tensor {label[key]}" for key in found if key not in expected]
            problems += [
                f"{label[key]} has shape {list(found[key])}, expected {list(expected[key])}"
                for key in expected.keys() & found.keys()
                if found[key] != expected[key]
            ]
            dtypes = {key: file.dtypes[k] for key, (file, k) in part.tensors.items()}
            problems += [f"{label[k]} is {d}, expected floating point" for k, d in dtypes.items() if not d.is_floating_point]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"{self.path} does not hold the model its configuration describes: {'; '.join(sorted(problems)[:5])}{more}. Download it again."
            )

    def tensors(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """The part's tensors one at a time, in the order they lie in the file."""
        items = self.parts[part].tensors.items()
        for name, (file, key) in sorted(items, key=lambda item: item[1][0].offset(item[1][1])):
            yield name, file.read(key)

    def load(
        self,
        part: str,
        ops=TorchOps,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        progress: Progress | None = None,
    ) -> nn.Module:
        """The part's module with its weights in `dtype` on `device`."""
        module = self.build(part, ops).eval().requires_grad_(False)
        done, total = 0, len(self.parts[part].tensors)
        for name, tensor in self.tensors(part):  # not enumerate, which keeps its last pair: the tensor must be gone by then
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(_owned(tensor, device, dtype), requires_grad=False))
            del tensor
            done += 1
            if progress is not None:
                progress(f"loading {part}", done, total)
        return module


def _owned(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The tensor on `device` in `dtype`, never sharing memory with the file it came from."""
    return tensor.to(device=device, dtype=dtype, copy=True)


def non_finite(module: nn.Module) -> str | None:
    """Name of the first weight with NaN or infinity in it, for error messages."""
    return next((name for name, p in module.named_parameters() if not bool(torch.isfinite(p.float()).all())), None)
