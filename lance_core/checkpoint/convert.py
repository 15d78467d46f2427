"""A checkpoint -> one self-contained safetensors file, smaller if wanted: the `convert` command.

The file holds both experts, the ViT and (unless left out) the VAE under the released names, and configuration
and tokeniser in its metadata. Written tensor by tensor, so a 28 GB checkpoint needs one tensor's memory; put
in place whole; the same input gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LanceConfig, to_json
from ..errors import CheckpointError, RequestError
from ..inputs.tokenizer import Tokenizer
from .checkpoint import Checkpoint, Progress, released_name
from .quantize import FORMATS, Format, marker, quantisable, stored_names
from .tensor_files import WeightFile
from .writing import Planned, write_safetensors

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = (*PLAIN, *FORMATS)
VERSION = "1"


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    dtype: str = "bf16",
    *,
    understanding: str | None = None,
    generation: str | None = None,
    include_vae: bool = True,
    vit: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `source` as one file. Returns sizes in bytes, by part.

    Args:
        dtype: fp32, bf16, fp16, fp8, int8, int4 or nvfp4, for both experts; what must stay precise
            (embeddings, norms, heads, latents in and out, time MLP, first and last layer, ViT, VAE) is bf16
            in the last four.
        understanding, generation: another one for that expert.
        include_vae: whether the VAE goes in, too; without, it is looked for beside the file.

    Raises:
        RequestError: an unknown dtype, or a target that would overwrite its source.
        CheckpointError: the source is damaged, or the disk too small.
    """
    source, target = Path(source), Path(target)
    for wanted in (dtype, understanding, generation):
        if wanted is not None and wanted not in DTYPES:
            raise RequestError(f"dtype {wanted!r} is unknown; expected one of {', '.join(DTYPES)}")
    rest = dtype if dtype in PLAIN else "bf16"
    choice = {"und": understanding or dtype, "gen": generation or dtype, "vit": rest, "vae": rest}
    if target.suffix.lower() != ".safetensors":
        raise RequestError(f"{target}: the result is a safetensors file; give it that ending")
    if not target.parent.is_dir():
        raise RequestError(f"{target}: the folder {target.parent} does not exist; make it first")
    if target.exists() and target.resolve() in {source.resolve(), *(p.resolve() for p in source.glob("*"))}:
        raise RequestError(f"{target} is part of what is to be converted; choose another name")

    checkpoint = Checkpoint(source, vit, vae)
    planned: list[Planned] = []
    sizes: dict[str, int] = {}
    for name in ("und", "gen", "vit", "vae"):
        if (name == "vae" and not include_vae) or not checkpoint.parts[name].tensors:
            continue
        entries = _plan_part(checkpoint, name, choice[name])
        sizes[name] = sum(e.nbytes for e in entries)
        planned += entries
    if "fp8" in choice.values():
        planned.append(fp8_mark())
    total = write_safetensors(
        target,
        planned,
        file_metadata(checkpoint, choice),
        lambda done, all_: progress and progress("converting", done, all_),
    )
    return {
        "source": str(source),
        "file": str(target),
        "bytes": total,
        "source_bytes": sum(part.nbytes for part in checkpoint.parts.values()),
        "parts": sizes,
        "dtypes": {name: choice[name] for name in sizes},
    }


def told(config: LanceConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a single file has to say of itself to be loaded alone, see `finding.stored_config`."""
    said = {"llm_config": config.raw, "tokenizer": tokenizer.definition, "variant": config.variant}
    return said | ({"vit_config": to_json(config.vit)} if config.vit else {})


def stored_metadata(said: dict[str, Any]) -> dict[str, str]:
    """`told` as a file's metadata."""
    text = json.dumps(said, ensure_ascii=False, sort_keys=True)
    return {"format": "pt", "lance_version": VERSION, "lance": text}


def plan_quantised(
    layer: str, shape: tuple[int, int], format: Format, make: Callable[[str], Callable[[], Tensor]]
) -> list[Planned]:
    """The tensors of a quantised layer, whose name as in a file is `layer` with a dot at its end.

    make: gives what makes each, by its name in `format.layout`.
    """
    layout = format.layout(*shape)
    names = stored_names(format, layout)
    planned = [Planned(layer + names[leaf], kind, size, make(leaf)) for leaf, (kind, size) in layout.items()]
    mark = marker(format)
    return planned if mark is None else [*planned, constant(layer + "comfy_quant", mark)]


def fp8_mark() -> Planned:
    """What says of a file that its fp8 layers are scaled: two elements, for weight-only."""
    return constant("scaled_fp8", torch.zeros(2).to(torch.float8_e4m3fn))


def file_metadata(checkpoint: Checkpoint, dtypes: dict[str, str]) -> dict[str, str]:
    """What a single file says of itself: configuration, tokeniser, and the dtype of each part."""
    return stored_metadata(told(checkpoint.config, checkpoint.tokenizer) | {"dtype": dtypes})


def _plan_part(checkpoint: Checkpoint, part: str, wanted: str) -> list[Planned]:
    """What one part becomes; nothing is read yet."""
    held = checkpoint.parts[part]
    if held.formats:
        raise RequestError(
            f"{checkpoint.path} is quantised already "
            f"({', '.join({f.name for f in held.formats.values()})}); convert the original."
        )
    format = FORMATS.get(wanted)
    plain = PLAIN.get(wanted, torch.bfloat16)
    planned = []
    for name, (file, key) in held.tensors.items():
        shape = file.shapes[key]
        stored = stored_name(part, name)
        if format is not None and quantisable(name, checkpoint.config.llm.num_layers) and format.fits(*shape):
            encoded = _Encoded(format, file, key)
            planned += plan_quantised(
                stored.removesuffix("weight"), (shape[0], shape[1]), format, encoded.take
            )
        else:
            planned.append(Planned(stored, plain, shape, _Cast(file, key, plain)))
    return planned


class _Cast:
    """A tensor of a file in another dtype, read when called."""

    def __init__(self, file: WeightFile, key: str, dtype: torch.dtype) -> None:
        self.file, self.key, self.dtype = file, key, dtype

    def __call__(self) -> Tensor:
        return self.file.read(self.key, self.dtype)


class _Encoded:
    """A weight's quantised tensors. They lie apart in the file (wide types first), so the weight is read for
    each.
    """

    def __init__(self, format: Format, file: WeightFile, key: str) -> None:
        self.format, self.file, self.key = format, file, key

    def take(self, leaf: str) -> Callable[[], Tensor]:
        return partial(self._make, leaf)

    def _make(self, leaf: str) -> Tensor:
        weight = self.file.read(self.key, torch.float32)
        if not bool(torch.isfinite(weight.abs().amax())):
            raise CheckpointError(
                f"{self.file.path}: {self.key} has NaN or infinity in it, which no scale fits; download it "
                "again."
            )
        beside = self.format.scales(weight)
        return beside[leaf] if leaf in beside else self.format.levels(weight, beside)


def constant(name: str, tensor: Tensor) -> Planned:
    """A tensor that is there already."""
    return Planned(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def stored_name(part: str, name: str) -> str:
    """A tensor's name in its part's module -> in a single file."""
    prefix = {"vit": "vit_model.", "vae": "vae."}.get(part)
    return prefix + name if prefix else released_name(name, part == "gen")


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['file']}: {result['bytes'] / 1e9:.2f} GB, from {result['source_bytes'] / 1e9:.2f} GB"]
    lines += [
        f"  {name}  {result['dtypes'][name]:5} {size / 1e9:.2f} GB" for name, size in result["parts"].items()
    ]
    lines += [
        f"  {name}  not in it; looked for beside the file when needed"
        for name in ("vit", "vae")
        if name not in result["parts"]
    ]
    return "\n".join(lines)
