"""A small random checkpoint in the released layout, so that everything can be tried without 25 GB.

Its pictures are noise, and honestly so: only the real weights draw. All sizes differ from the released ones,
so code that hard-codes a size fails on it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import IMAGE_TABLE_ROWS, LLMConfig, VAEConfig, ViTConfig, to_json
from ..errors import RequestError
from ..model.dual_expert import Generation, Understanding
from ..model.vit import VisionTower
from ..vae.wan import WanVAE
from .checkpoint import released_name

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
        RequestError: the folder holds a checkpoint already.
    """
    root = Path(folder)
    if any((root / name).exists() for name in ("Lance_3B", "Lance_3B_Video", "Wan2.2_VAE.pth")):
        raise RequestError(f"{root} already holds a checkpoint, which is not overwritten; name a new folder")
    generator = torch.Generator().manual_seed(seed)
    vit_weights = _random(VisionTower(vit, device="meta"), generator, dtype)
    (root / "Qwen2.5-VL-ViT").mkdir(parents=True)
    _write_json(root / "Qwen2.5-VL-ViT" / "config.json", to_json(vit) | {"model_type": "qwen2_5_vl"})
    save_file(vit_weights, root / "Qwen2.5-VL-ViT" / "vit.safetensors")
    torch.save(_random(WanVAE(vae, device="meta"), generator, dtype), root / "Wan2.2_VAE.pth")
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
        save_file(weights, root / name / "model.safetensors")
        _write_json(root / name / "llm_config.json", llm_json(llm, vit))
        _write_tokenizer(root / name)
    return root


def _random(module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights that keep activations near unit size: norms near 1, matrices at 1/sqrt(fan in), small biases."""
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


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in GPT-2's byte-level BPE: printable ones for themselves,
    others from U+0100.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def _write_tokenizer(folder: Path) -> None:
    """A byte tokeniser in the checkpoint's file names: every byte a token, no merges, the special tokens by
    name.
    """
    vocab = {character: i for i, character in enumerate(_byte_alphabet())}
    added = {name: len(vocab) + i for i, name in enumerate(ADDED)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    _write_json(folder / "tokenizer.json", definition)
    _write_json(folder / "vocab.json", vocab)
    _write_json(folder / "added_tokens.json", added)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
