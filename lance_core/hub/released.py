"""Which files the released checkpoints are made of, and what they must be."""

from __future__ import annotations

import re

from ..errors import LanceError

REPO = "bytedance-research/Lance"
MIRROR_HINT = "a mirror is HF_ENDPOINT=https://hf-mirror.com"
# of 2026-05-28; LANCE_REVISION in the environment goes before it
REVISION = "7395315758865e6f56ab87ad06a88c7ac172f056"
# of large files at REVISION, as several public lists have them; the ViT's is in one only and left to the hub
SHA256 = {
    "Lance_3B/model.safetensors": "a2cfed3992486699aa550c1ea9b3519bd19dde475a0992daf2249f2486b268a3",
    "Lance_3B_Video/model.safetensors": "7f0550e1d1511b29a4740a67c1e18e176302a4ecb3177c8a5850ff5fe6447c25",
    "Wan2.2_VAE.pth": "20eb789667fa5e60e7516bf509512f6cb61f01b0aa0695eadaea930c13892b36",
}
_SHARED = {
    "Qwen2.5-VL-ViT/config.json": 1_000,
    "Qwen2.5-VL-ViT/vit.safetensors": 1_340_000_000,
    "Wan2.2_VAE.pth": 2_818_839_170,
}
_TEXTS = {
    "llm_config.json": 2_000,
    "tokenizer.json": 7_000_000,
    "vocab.json": 2_800_000,
    "merges.txt": 1_700_000,
}
RELEASED: dict[str, dict[str, int]] = {
    name: {f"{name}/model.safetensors": size}
    | {f"{name}/{text}": small for text, small in _TEXTS.items()}
    | _SHARED
    for name, size in {"Lance_3B": 12_370_600_000, "Lance_3B_Video": 14_211_300_000}.items()
}
"""Checkpoint -> the files it needs, by their path in repository and folder alike, and roughly their bytes."""


class DownloadError(LanceError):
    """A download that cannot go on; what is on disk stays, and the next try resumes from it.

    `reason` is one of "install", "name", "offline", "network", "refused", "absent", "mismatch", "disk".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def label(name: str) -> str:
    """How a checkpoint that is not on disk is listed: "Lance_3B (download, 17 GB)". `name_of` is the way
    back.
    """
    return f"{name} (download, {sum(RELEASED[name].values()) / 1e9:.0f} GB)"


def name_of(text: str) -> str | None:
    """The checkpoint a `label` stands for, whatever size it says; None if the text is no label."""
    name, mark, _ = text.partition(" (download")
    return name if mark and name in RELEASED else None


def ours(path: str) -> bool:
    """Whether a path of the repository may be fetched: what RELEASED lists, and small texts beside the
    models.
    """
    beside = re.fullmatch(r"([\w.-]+)/\w[\w.-]*\.(json|txt)", path)
    return any(path in files for files in RELEASED.values()) or bool(beside and beside[1] in RELEASED)
