"""A small random checkpoint in the released layout, so that everything can be tried without 25 GB.

Its pictures are noise, and honestly so: only the real weights draw. All sizes differ from the released ones,
so code that hard-codes a size fails on it.
"""

from __future__ import annotations

import io
import json
import math
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import IMAGE_TABLE_ROWS, LLMConfig, VAEConfig, ViTConfig, to_json
from ..errors import CheckpointError, RequestError
from ..files import kind_of, staged
from ..inputs.tokenizer import byte_alphabet, tokenizer_json
from ..model.dual_expert import Generation, Understanding
from ..model.vit import VisionTower
from ..vae.wan import WanVAE
from .checkpoint import released_name
from .writing import Planned, write_safetensors

ADDED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
LLM = LLMConfig(64, 160, 3, 4, 2, 16, 288, 1e6, (2, 3, 3), 1e-6)
VIT = ViTConfig(3, 32, 68, 2, 64, fullatt_block_indexes=(1,))
VAE = VAEConfig((8, 16, 32, 32), (8, 16, 32, 32), 2, 2, (False, True, True))


def write(
    folder: str | Path,
    *,
    llm: LLMConfig = LLM,
    vit: ViTConfig = VIT,
    vae: VAEConfig = VAE,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write Lance_3B, Lance_3B_Video, Qwen2.5-VL-ViT and Wan2.2_VAE.pth under `folder`, as released. Returns
    the folder.

    The same seed gives the same files.

    Raises:
        RequestError: the folder holds a checkpoint already, or is no folder.
        CheckpointError: it cannot be written, or the disk is full; nothing of the checkpoint is left then.
    """
    root = Path(folder)
    names = ("Lance_3B", "Lance_3B_Video", "Qwen2.5-VL-ViT", "Wan2.2_VAE.pth")
    try:
        if root.exists() and not root.is_dir():
            raise RequestError(f"{root} is {kind_of(root.stat().st_mode)}, no folder; name a new folder")
        if any(os.path.lexists(root / name) for name in names):
            raise RequestError(
                f"{root} already holds a checkpoint, which is not overwritten; name a new folder"
            )
        new = not root.exists()
        (root.parent if new else root).mkdir(parents=True, exist_ok=True)
        with staged(root if new else root / "tiny") as staging:
            _write_files(staging, llm, vit, vae, seed, dtype)
            if new:
                os.rename(staging, root)
            else:
                for name in reversed(names):  # the model folders last
                    os.rename(staging / name, root / name)
    except OSError as error:
        raise CheckpointError(f"{root} cannot be written ({error}).") from None
    return root


def _write_files(
    root: Path, llm: LLMConfig, vit: ViTConfig, vae: VAEConfig, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vit_weights = _random(VisionTower(vit, device="meta"), generator, dtype)
    (root / "Qwen2.5-VL-ViT").mkdir()
    _write_json(root / "Qwen2.5-VL-ViT" / "config.json", to_json(vit) | {"model_type": "qwen2_5_vl"})
    _save(vit_weights, root / "Qwen2.5-VL-ViT" / "vit.safetensors")
    archive = io.BytesIO()  # torch itself ends the process in C++ where its file cannot be finished
    torch.save(_random(WanVAE(vae, device="meta"), generator, dtype), archive)
    (root / "Wan2.2_VAE.pth").write_bytes(archive.getbuffer())
    for name in ("Lance_3B", "Lance_3B_Video"):
        weights = {}
        for kind in (Understanding, Generation):
            part = kind(llm, device="meta", joined=False)
            for key, tensor in _random(part, generator, dtype).items():
                weights[released_name(key, isinstance(part, Generation))] = tensor
        if name == "Lance_3B":
            weights["latent_pos_embed.pos_embed"] = torch.zeros(
                IMAGE_TABLE_ROWS, llm.hidden_size, dtype=torch.float16
            )
        else:
            weights |= {f"vit_model.{key}": tensor for key, tensor in vit_weights.items()}
        (root / name).mkdir()
        _save(weights, root / name / "model.safetensors")
        _write_json(root / name / "llm_config.json", llm_json(llm, vit))
        _write_tokenizer(root / name)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    planned = [Planned(k, t.dtype, tuple(t.shape), partial(_same, t)) for k, t in tensors.items()]
    write_safetensors(path, planned, {})


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _random(module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights that keep activations near unit size: norms near 1, matrices 1/sqrt(fan in), small biases."""
    weights = {}
    for name, meta in module.state_dict().items():
        draw = torch.randn(meta.shape, generator=generator)
        if "norm" in name or "ln_q" in name or name.endswith("gamma"):
            weights[name] = (1 + 0.1 * draw).to(dtype)
        elif meta.dim() == 1:
            weights[name] = (0.05 * draw).to(dtype)
        else:
            weights[name] = (draw / math.sqrt(meta[0].numel())).to(dtype)
    return weights


def llm_json(llm: LLMConfig, vit: ViTConfig) -> dict:
    """What llm_config.json says of these sizes."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.intermediate_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "vocab_size": llm.vocab_size,
        "rms_norm_eps": llm.rms_eps,
        "rope_theta": llm.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(llm.mrope_section)},
        "tie_word_embeddings": True,
        "vision_config": to_json(vit),
    }


def _write_tokenizer(folder: Path) -> None:
    """A byte tokeniser in the checkpoint's file names: every byte a token, no merges, the special tokens by
    name.
    """
    vocab = {character: i for i, character in enumerate(byte_alphabet())}
    added = {name: len(vocab) + i for i, name in enumerate(ADDED)}
    definition = tokenizer_json(vocab, [], added)
    _write_json(folder / "tokenizer.json", definition)
    _write_json(folder / "vocab.json", vocab)
    _write_json(folder / "added_tokens.json", added)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
