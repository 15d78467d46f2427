"""A checkpoint on disk -> configuration, tokeniser and modules: found, checked whole, then streamed part by
part.

A checkpoint has four parts, each loadable on its own: "und" and "gen" (the two experts), "vit" and "vae".
Names and shapes of all of them are checked when it is opened, before anything is allocated. Loading builds
the module on the meta
device and fills it tensor by tensor in its final dtype: peak memory is the result plus one tensor.

Besides the released folders, a single safetensors file is read when its metadata says enough: a JSON `lance`
(what `convert` writes), or configuration and tokeniser under the names other tools use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LanceConfig, llm_config, vae_config, variant_of, vit_config
from ..errors import CheckpointError
from ..inputs.tokenizer import Tokenizer
from ..model.ops import TorchOps
from ..model.vit import VisionTower
from ..stored_values import Shapes, numbered, read_json
from ..vae.wan import WanVAE
from . import finding, loading
from .finding import CONFIG_FILE, CONFIG_TENSOR, VAE_FILES, VIT_CONFIG, VIT_FILE, VIT_FOLDER, Given, Shards
from .finding import MODEL_FILES as MODEL_FILES
from .finding import stored_config as stored_config
from .loading import Progress
from .quantize import IGNORED_SUFFIXES, ON_DISK, SIDE_TENSORS, Format, formats_of
from .tensor_files import WeightFile, open_weights

PARTS = ("und", "gen", "vit", "vae")
# Ignored: the position table, which is recomputed; ComfyUI's mark of a scaled fp8 file: formats are detected
# from dtypes; and the configuration, which is read before.
IGNORED = ("latent_pos_embed.pos_embed", "scaled_fp8", CONFIG_TENSOR)
VIT_PREFIXES, VAE_PREFIXES = ("vit_model.", "visual."), ("vae.", "first_stage_model.")


@dataclass(frozen=True)
class Part:
    """Where one part's tensors are: names in the module -> (file, name in the file).

    What is known of all tensors together is worked out once: loops over a thousand of them ask for it.
    """

    tensors: Mapping[str, tuple[WeightFile, str]] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> Shapes:
        return {name: file.shapes[key] for name, (file, key) in self.tensors.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: file.dtypes[key] for name, (file, key) in self.tensors.items()}

    @cached_property
    def formats(self) -> dict[str, Format]:
        """Quantised layers, by module name."""
        return formats_of(self.dtypes)

    @property
    def parameters(self) -> int:
        """Number of weights; two in a byte count as the two they are."""
        packed = {f"{layer}.weight": f.per_byte for layer, f in self.formats.items()}
        shapes = {n: s for n, s in self.shapes.items() if n.rpartition(".")[2] not in SIDE_TENSORS}
        return sum(torch.Size(s).numel() * packed.get(n, 1) for n, s in shapes.items())

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(torch.Size(s).numel() * self.dtypes[n].itemsize for n, s in self.shapes.items())


def part_of(key: str) -> tuple[str, str] | None:
    """A model-file tensor name -> (part, name in the part's module); None if it belongs to none."""
    for part, prefixes in (("vit", VIT_PREFIXES), ("vae", VAE_PREFIXES)):
        for prefix in prefixes:
            if key.startswith(prefix):
                return part, key.removeprefix(prefix)
    if key.startswith(("time_embedder.", "vae2llm.", "llm2vae.")):
        return "gen", key
    if not key.startswith("language_model."):
        return None
    name = key.removeprefix("language_model.").removeprefix("model.")
    for inner, stored in ON_DISK["fp8"].items():
        if name.endswith(f".{stored}"):
            name = name.removesuffix(stored) + inner
    return ("gen", name.replace("_moe_gen", "")) if "_moe_gen" in name else ("und", name)


def released_name(key: str, generation: bool) -> str:
    """A module's tensor name -> its name in the released model file: the inverse of `part_of` for both
    experts.
    """
    if key.startswith(("time_embedder.", "vae2llm.", "llm2vae.")):
        return key
    if generation:
        parts = key.split(".")
        # The expert's mark follows the module's name: `mlp_moe_gen.up_proj`, `self_attn.q_proj_moe_gen`.
        at = parts.index("mlp") if "mlp" in parts else len(parts) - 2
        parts[at] += "_moe_gen"
        key = ".".join(parts)
    return f"language_model.{key}" if key.startswith("lm_head.") else f"language_model.model.{key}"


class Checkpoint:
    """An opened checkpoint: all names and shapes known and checked, no weights read yet.

    Args:
        path: a released folder (`.../Lance_3B` or `.../Lance_3B_Video`), the same in a Hugging Face cache, or
            a single file that `convert` wrote.
        vit, vae: files or folders to use instead of the ones found inside or beside it.
        also: further folders where the two are looked for, if they are neither inside nor beside it.

    Raises:
        CheckpointError: something is missing, damaged or of another model; the message names it.
    """

    path: Path
    parts: dict[str, Part]
    tokenizer: Tokenizer
    config: LanceConfig
    candidates: tuple[Path, ...]
    """Every file that was opened or looked for, there or not: see `finding.fingerprint`."""

    def __init__(
        self, path: str | os.PathLike, vit: Given = None, vae: Given = None, also: Sequence[Path] = ()
    ) -> None:
        try:
            self.path, self.also = finding.resolve(path), tuple(also)
            self.candidates = tuple(finding.candidates(path, vit, vae, self.also))
            self._open(vit, vae)
        except OSError as error:  # a name too long, a folder that may not be read
            raise CheckpointError(f"{str(path)[:200]} cannot be read ({str(error)[:200]}).") from None

    @property
    def files(self) -> tuple[Path, ...]:
        """The candidates that are there."""
        return tuple(path for path in self.candidates if path.is_file())

    def _open(self, vit: Given, vae: Given) -> None:
        file, raw, told = self._read_model()
        unexpected = self._sort_tensors(file)
        where = str(self.path)
        vit_raw = self._add_vit(vit, raw)
        vae_path = self._add_vae(vae)

        llm = llm_config(raw, file.shapes, where)
        if len(self.tokenizer) > llm.vocab_size:
            raise CheckpointError(
                f"{where}: the tokeniser has {len(self.tokenizer)} tokens, the embeddings {llm.vocab_size} "
                "rows: they are of two models."
            )
        vision = vit_config(vit_raw, where) if self.parts["vit"].tensors else None
        blocks = numbered(self.parts["vit"].shapes, "blocks.", where)
        if vision and vision.depth != blocks:
            raise CheckpointError(
                f"{where}: the ViT's configuration says {vision.depth} blocks, its file has {blocks}: they "
                "are of two models."
            )
        wan = vae_config(self.parts["vae"].shapes, str(vae_path)) if vae_path else None
        variant = told.get("variant")
        variant = variant if variant in ("image", "video") else variant_of(file.shapes, self.path.name)
        self.config = LanceConfig(llm, vision, wan, variant, raw)
        if vision and vision.out_hidden_size != llm.hidden_size:
            raise CheckpointError(
                f"{where}: the ViT writes embeddings of width {vision.out_hidden_size}, the decoder reads "
                f"{llm.hidden_size}: they are of two models."
            )
        self._check(unexpected)

    # -- finding ---------------------------------------------------------------------------------------------

    def _read_model(self) -> tuple[WeightFile | Shards, dict[str, Any], dict[str, Any]]:
        """Model file, configuration, and what a single file says of itself; the tokeniser is made."""
        if self.path.exists() and not self.path.is_dir():
            single = finding.open_single_file(self.path)
            told = finding.stored_config(single)
            self.tokenizer = Tokenizer(told["tokenizer"], str(self.path))
            raw = dict(told["llm_config"])
            if isinstance(told.get("vit_config"), dict):
                raw["vision_config"] = told["vit_config"]
            return single, raw, told
        file = finding.open_model(self.path)
        raw = read_json(self.path / CONFIG_FILE)
        self.tokenizer = Tokenizer.from_folder(self.path)
        return file, raw, {}

    def _sort_tensors(self, file: WeightFile | Shards) -> list[str]:
        """Fill the parts with the model file's tensors; returns the names that belong to none."""
        found: dict[str, dict[str, tuple[WeightFile, str]]] = {name: {} for name in PARTS}
        unexpected = []
        for key in file.shapes:
            where = part_of(key)
            if where is None:
                unexpected += [] if key in IGNORED else [key]
            elif where[1].rpartition(".")[2] not in IGNORED_SUFFIXES:
                holder = file.holders[key] if isinstance(file, Shards) else file
                found[where[0]][where[1]] = (holder, key)
        self.parts = {name: Part(tensors) for name, tensors in found.items()}
        return unexpected

    def _add_vit(self, given: Given, raw: dict[str, Any]) -> Any:
        """Point the "vit" part at its file; returns its configuration, None where there is no ViT."""
        inside = bool(self.parts["vit"].tensors)
        path = finding.find_vit(self.path, given, self.also) if given or not inside else None
        if path:
            file = open_weights(path)
            self.parts["vit"] = Part({key: (file, key) for key in file.shapes})
            beside = path.parent / VIT_CONFIG
            config = read_json(beside) if beside.exists() else raw
            return config.get("vision_config", config)
        if inside and not isinstance(raw.get("vision_config"), dict):
            raise CheckpointError(
                f"{self.path}: {CONFIG_FILE} has no vision_config for the ViT inside; download it again."
            )
        return raw["vision_config"] if inside else None

    def _add_vae(self, given: Given) -> Path | None:
        """Point the "vae" part at its file; returns the file, None where there is no VAE."""
        if not given and self.parts["vae"].tensors:
            return self.path
        path = finding.find_vae(self.path, given, self.also)
        if path:
            file = open_weights(path)
            self.parts["vae"] = Part({key: (file, key) for key in file.shapes})
        return path

    # -- checking and loading --------------------------------------------------------------------------------

    def build(
        self,
        part: str,
        ops: Any = TorchOps,
        device: Any = "meta",
        dtype: torch.dtype | None = None,
        make: Any = None,
        joined: bool = True,
    ) -> nn.Module:
        """The part's module, its weights not yet loaded.

        Args:
            make: builds ComfyUI's kind of quantised layer (see `quantize.swap`).
            joined: projections of one input are one layer, unless quantised; False keeps the file's.

        Raises:
            CheckpointError: the checkpoint has no such part; says where it is looked for.
        """
        kw: dict[str, Any] = {"ops": ops, "device": device, "dtype": dtype}
        if part == "vit":
            if self.config.vit is None:
                raise CheckpointError(
                    f"{self.path} has no vision tower, which reading pictures needs: put "
                    f"{VIT_FOLDER}/{VIT_FILE} with its config.json "
                    f"beside it, in {self.path.parent}, or give vit=."
                )
            return VisionTower(self.config.vit, **kw)
        if part == "vae":
            if self.config.vae is None:
                raise CheckpointError(
                    f"{self.path} has no VAE: put {VAE_FILES[0]} beside it, in {self.path.parent}, or give "
                    "vae=."
                )
            return WanVAE(self.config.vae, **kw)
        return loading.build_expert(self.config.llm, part, self.parts[part].formats, joined, make, **kw)

    def _check(self, unexpected: list[str]) -> None:
        """Every part's names, shapes and dtypes against the module they are for."""
        problems = [f"unexpected tensor {name}" for name in unexpected]
        for name, part in self.parts.items():
            if not part.tensors and name in ("vit", "vae"):
                continue
            built = self.build(name, joined=False).state_dict()
            expected = {k: tuple(v.shape) for k, v in built.items()}
            found = part.shapes
            label = {key: part.tensors[key][1] for key in found}
            problems += [f"missing tensor {key} of the {name} part" for key in expected if key not in found]
            problems += [f"unexpected tensor {label[key]}" for key in found if key not in expected]
            problems += [
                f"{label[key]} has shape {list(found[key])}, expected {list(expected[key])}"
                for key in expected.keys() & found.keys()
                if found[key] != expected[key]
            ]
            for key in expected.keys() & found.keys():
                given, kind = part.dtypes[key], built[key].dtype
                plain = (
                    kind.is_floating_point and kind.itemsize > 1
                )  # which a quantised layer's weight, for one, is not
                if given != kind and not (plain and given.is_floating_point and given.itemsize > 1):
                    problems.append(
                        f"{label[key]} is {given}, expected "
                        f"{'float32, bfloat16 or float16' if plain else kind}"
                    )
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(
                f"{self.path} does not hold the model its configuration describes: "
                f"{'; '.join(sorted(problems)[:3])}{more}. Download it again."
            )

    def tensors(
        self,
        part: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        module: nn.Module | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """The part's tensors one at a time, in the order they lie in the file, owning their memory.

        Args:
            dtype: of the result; None as in the file. What a quantised layer is kept in is never changed.
            module: whose weights they will be; if given, projections that are joined in it come joined.
        """
        found = self.parts[part]
        return loading.tensors(found.tensors, found.formats, dtype, device, module)

    def count(self, part: str, module: nn.Module) -> int:
        """How many tensors `tensors` gives for a module."""
        return loading.count(self.parts[part].tensors, module)

    def load(
        self,
        part: str,
        ops: Any = TorchOps,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        progress: Progress | None = None,
        joined: bool = True,
    ) -> nn.Module:
        """The part's module with its weights in `dtype` on `device`.

        joined: projections of one input are one layer, unless quantised; False keeps the file's (training).
        """
        module = self.build(part, ops, joined=joined).eval().requires_grad_(False)
        return loading.fill(
            module,
            self.tensors(part, dtype, device, module),
            self.count(part, module),
            f"loading {part}",
            progress,
        )
