"""What a checkpoint is, its sizes, and what it needs: the `info` command."""

from __future__ import annotations

import os
from typing import Any

from ..config import to_json
from ..inputs.tasks import TASKS
from .checkpoint import PARTS, Checkpoint

NAMES = {"und": "understanding expert", "gen": "generation expert", "vit": "vision tower", "vae": "VAE"}


def describe(
    path: str | os.PathLike, vit: str | os.PathLike | None = None, vae: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Everything known of a checkpoint without reading its weights, JSON-ready. Sizes in bytes.

    Raises:
        CheckpointError: it is not one, or damaged.
    """
    checkpoint = Checkpoint(path, vit, vae)
    config = checkpoint.config
    parts: dict[str, dict[str, Any]] = {}
    for name in PARTS:
        part = checkpoint.parts[name]
        if part.tensors:
            files = sorted({str(file.path) for file, _ in part.tensors.values()})
            formats = part.formats
            plain = {d for n, d in part.dtypes.items() if n.rpartition(".")[0] not in formats}
            dtypes = sorted(
                {f.name for f in formats.values()} | {str(d).removeprefix("torch.") for d in plain}
            )
            parts[name] = {"parameters": part.parameters, "bytes": part.nbytes, "tensors": len(part.tensors)}
            parts[name] |= {"files": files, "dtypes": dtypes}
    weight = {name: part["parameters"] for name, part in parts.items()}
    return {
        "path": str(checkpoint.path),
        "variant": config.variant,
        "tasks": [t.name for t in TASKS.values() if config.variant == "video" or not t.is_video],
        "parts": parts,
        "missing": [NAMES[name] for name in PARTS if name not in parts],
        "weights_bytes_bf16": {
            "generate": 2 * sum(weight.values()),
            "understand": 2 * (weight["und"] + weight.get("vit", 0)),
        },
        "tokens": len(checkpoint.tokenizer),
        "llm": to_json(config.llm),
        "vit": to_json(config.vit) if config.vit else None,
        "vae": to_json(config.vae) if config.vae else None,
    }


def report(described: dict[str, Any]) -> str:
    """The description for people."""
    llm = described["llm"]
    lines = [
        f"{described['path']}: Lance, {described['variant']} checkpoint",
        f"  tasks     {', '.join(described['tasks'])}",
        f"  decoder   {llm['num_layers']} layers, width {llm['hidden_size']}, {llm['num_heads']} heads, "
        f"{llm['num_kv_heads']} key/value heads",
    ]
    for name, part in described["parts"].items():
        kept = f"{_size(part['bytes'])} as {'/'.join(part['dtypes'])}"
        lines.append(
            f"  {name:<9} {NAMES[name]}: {_count(part['parameters'])} parameters, {kept}, in "
            f"{', '.join(part['files'])}"
        )
    lines += [
        f"  missing   {name}: pictures cannot be read or made without it" for name in described["missing"]
    ]
    need = described["weights_bytes_bf16"]
    lines.append(
        f"  needs     in bfloat16 {_size(need['generate'])} of weights to generate, "
        f"{_size(need['understand'])} to answer questions"
    )
    return "\n".join(lines)


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} billion" if n >= 1e8 else f"{n / 1e6:.2f} million"


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
