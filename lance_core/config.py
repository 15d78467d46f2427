"""What a checkpoint is: dataclasses read from its config files and checked against its weight shapes.

Nothing about a particular checkpoint is hard-coded; the released sizes stand in `RELEASED` only so that
benchmarks and `tiny` have something to start from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .checks import shown
from .errors import CheckpointError
from .stored_values import (
    MAX_LAYERS,
    MAX_SIDE,
    Shapes,
    matrix,
    number,
    numbered,
    positive,
    shape,
    vector,
)

LATENT_CHANNELS = 48
TIME_FREQUENCIES = 256  # width of the sinusoidal timestep embedding
OUTPUT_FPS = 12
MAX_FRAMES = 121
MAX_LATENT_SIDE = 64
CELL = 16  # pixels a side of one latent token
FRAMES_PER_LATENT = 4  # in every latent frame but the first, which holds one
IMAGE_TABLE_ROWS = MAX_LATENT_SIDE**2  # rows of `latent_pos_embed` in a checkpoint trained on single frames
MAX_HEADS = 4096
MAX_VAE_LEVELS, MAX_VAE_WIDTH = 8, 1 << 16

Grid = tuple[int, int, int]  # (frames, rows, columns) of latent cells


@dataclass(frozen=True)
class SamplingDefaults:
    """The released code's defaults. cfg_interval: guidance applies while low < t <= high."""

    steps: int = 30
    shift: float = 3.5
    cfg: float = 4.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0
    seed: int = 42


RELEASED_SAMPLING = SamplingDefaults()
RENORMS = ("global", "channel", "none")
STORED_DTYPES = ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "nvfp4")  # what `convert` writes


def latent_frames(frames: int) -> int:
    """Latent frames of so many frames: the first holds one, every other four (Wan2.2's VAE)."""
    return 1 + (frames - 1) // FRAMES_PER_LATENT


def pixel_frames(latents: int) -> int:
    """Frames that so many latent frames decode to: 4k + 1."""
    return FRAMES_PER_LATENT * (latents - 1) + 1


def latent_grid(width: int, height: int, frames: int = 1) -> Grid:
    """The latent cells of a picture or video: sides in pixels, rounded down to whole cells of 16."""
    return latent_frames(frames), height // CELL, width // CELL


def pixel_size(grid: Grid) -> tuple[int, int, int]:
    """(width, height, frames) that a grid of latent cells decodes to."""
    t, h, w = grid
    return w * CELL, h * CELL, pixel_frames(t)


@dataclass(frozen=True)
class LLMConfig:
    """The dual-expert decoder (Qwen2.5 layout, every layer twice)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_eps: float


@dataclass(frozen=True)
class ViTConfig:
    """Qwen2.5-VL's vision tower."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = ()
    tokens_per_second: float = 2


@dataclass(frozen=True)
class VAEConfig:
    """Wan2.2's VAE; widths per resolution level, finest first. `temporal[i]`: level i also halves (doubles)
    time.
    """

    encoder_widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    encoder_blocks: int
    decoder_blocks: int
    temporal: tuple[bool, ...]
    latent_channels: int = LATENT_CHANNELS
    patch: int = 2

    @property
    def spatial_ratio(self) -> int:
        """Pixels a side of one latent cell."""
        return self.patch * 2 ** (len(self.encoder_widths) - 1)

    @property
    def temporal_ratio(self) -> int:
        """Frames in one latent frame (the first latent frame holds one)."""
        return 2 ** sum(self.temporal)


@dataclass(frozen=True)
class LanceConfig:
    """A whole model. `variant` is "image" or "video"; the video checkpoint does every task."""

    llm: LLMConfig
    vit: ViTConfig | None
    vae: VAEConfig | None
    variant: str
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Temporal position step between two latent frames or two ViT frame pairs."""
        return self.vit.tokens_per_second if self.vit else 2


def llm_config(raw: Mapping[str, Any], shapes: Shapes, where: str) -> LLMConfig:
    """The decoder's configuration from llm_config.json, its sizes confirmed by (model-file) weight shapes.

    Raises:
        CheckpointError: a key is missing or disagrees with the weights.
    """
    heads = positive(raw, "num_attention_heads", where, MAX_HEADS)
    vocab, hidden = matrix(shapes, "language_model.model.embed_tokens.weight", where)
    head_dim = vector(shapes, "language_model.model.layers.0.self_attn.q_norm.weight", where)
    inter, _ = matrix(shapes, "language_model.model.layers.0.mlp.gate_proj.weight", where)
    layers = numbered(shapes, "language_model.model.layers.", where)
    scaling = raw.get("rope_scaling") or {}
    section = scaling.get("mrope_section") if isinstance(scaling, Mapping) else None
    if not (
        isinstance(section, list)
        and len(section) == 3
        and all(type(s) is int and 0 <= s <= MAX_SIDE for s in section)
    ):
        raise CheckpointError(
            f"{where}: rope_scaling.mrope_section is {shown(section)}, expected three non-negative integers "
            "[t, h, w]."
        )
    if sum(section) * 2 != head_dim:
        raise CheckpointError(
            f"{where}: mrope sections {section} cover {sum(section)} frequencies, heads of width {head_dim} "
            f"have {head_dim // 2}."
        )
    config = LLMConfig(
        hidden_size=hidden,
        intermediate_size=inter,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=positive(raw, "num_key_value_heads", where, MAX_HEADS),
        head_dim=head_dim,
        vocab_size=vocab,
        rope_theta=number(raw, "rope_theta", where, 1, 1e12),
        mrope_section=tuple(section),
        rms_eps=number(raw, "rms_norm_eps", where, 1e-20, 1),
    )
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{where}: {config.num_heads} query heads cannot share {config.num_kv_heads} key/value heads "
            "evenly."
        )
    stated = {"hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers}
    for key, found in stated.items():
        if key in raw and (isinstance(raw[key], bool) or raw[key] != found):
            raise CheckpointError(
                f"{where}: {key} is {shown(raw[key])} in the configuration, {found} in the weights: they are "
                "of two models."
            )
    return config


VIT_SIZES = {
    "depth": 1 << 24,  # compared with the blocks counted in the file before anything is built
    "hidden_size": MAX_SIDE,
    "intermediate_size": MAX_SIDE,
    "num_heads": MAX_HEADS,
    "out_hidden_size": MAX_SIDE,
}
VIT_OPTIONS = {
    "in_channels": 3,
    "patch_size": 256,
    "temporal_patch_size": 64,
    "spatial_merge_size": 64,
    "window_size": 1 << 16,
}
"""Keys of the vision tower's configuration, and how large their values may be."""


def vit_config(raw: Any, where: str) -> ViTConfig:
    """The vision tower's configuration from its config.json, or from `vision_config` of llm_config.json.

    Raises:
        CheckpointError: it is no object, or a key is missing or out of range.
    """
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{where}: the ViT's configuration is {shown(raw)}, expected a JSON object.")
    sizes = {key: positive(raw, key, where, most) for key, most in VIT_SIZES.items()}
    sizes |= {key: positive(raw, key, where, most) for key, most in VIT_OPTIONS.items() if key in raw}
    full = raw.get("fullatt_block_indexes", [])
    if not (isinstance(full, list) and all(type(i) is int and 0 <= i < sizes["depth"] for i in full)):
        raise CheckpointError(
            f"{where}: fullatt_block_indexes is {shown(full)}, expected a list of block numbers from 0 to "
            f"{sizes['depth'] - 1}."
        )
    width, heads = sizes["hidden_size"], sizes["num_heads"]
    if width % heads:
        raise CheckpointError(f"{where}: width {width} does not divide into {heads} heads.")
    if width // heads % 4:
        raise CheckpointError(
            f"{where}: heads are {width // heads} wide, expected a multiple of 4: half turns with the row, "
            "half with the column."
        )
    rate = number(raw, "tokens_per_second", where, 1e-3, 1e4) if "tokens_per_second" in raw else 2
    config = ViTConfig(**sizes, fullatt_block_indexes=tuple(full), tokens_per_second=rate)
    if config.in_channels != 3:
        raise CheckpointError(f"{where}: in_channels is {config.in_channels}, pictures have 3.")
    if config.window_size < config.patch_size * config.spatial_merge_size:
        raise CheckpointError(
            f"{where}: window_size is {config.window_size}, smaller than one merged patch "
            f"({config.patch_size} x {config.spatial_merge_size} pixels)."
        )
    return config


def vae_config(shapes: Shapes, where: str) -> VAEConfig:
    """The VAE's configuration, all of it read off its weight shapes.

    Raises:
        CheckpointError: the tensors are not those of a Wan2.2 VAE.
    """

    def levels(side: str, inner: str) -> int:
        return len({k.split(".")[2] for k in shapes if k.startswith(f"{side}.{inner}.")})

    def blocks(side: str, inner: str) -> int:
        return len(
            {
                k.split(".")[4]
                for k in shapes
                if k.startswith(f"{side}.{inner}.0.{inner}.") and ".residual." in k
            }
        )

    down, up = levels("encoder", "downsamples"), levels("decoder", "upsamples")
    if down < 2 or down != up:
        raise CheckpointError(
            f"{where} is not a Wan2.2 VAE: {down} encoder and {up} decoder levels found, expected the same, "
            "at least 2."
        )
    if down > MAX_VAE_LEVELS:
        raise CheckpointError(f"{where} is not a Wan2.2 VAE: {down} levels found, expected 4.")
    enc_blocks, dec_blocks = blocks("encoder", "downsamples"), blocks("decoder", "upsamples")
    if not 1 <= enc_blocks <= MAX_LAYERS or not 1 <= dec_blocks <= MAX_LAYERS:
        raise CheckpointError(
            f"{where} is not a Wan2.2 VAE: {enc_blocks} and {dec_blocks} residual blocks in its first "
            "levels, expected 2 and 3."
        )
    enc = tuple(
        shape(shapes, f"encoder.downsamples.{i}.downsamples.0.residual.2.weight", where, 5)[0]
        for i in range(down)
    )
    dec = tuple(
        shape(shapes, f"decoder.upsamples.{i}.upsamples.0.residual.2.weight", where, 5)[0]
        for i in reversed(range(up))
    )
    temporal = tuple(
        f"encoder.downsamples.{i}.downsamples.{enc_blocks}.time_conv.weight" in shapes
        for i in range(down - 1)
    )
    channels = shape(shapes, "conv2.weight", where, 5)[0]
    inputs = shape(shapes, "encoder.conv1.weight", where, 5)[1]
    patch = math.isqrt(inputs // 3)
    if max(*enc, *dec) > MAX_VAE_WIDTH or patch > MAX_VAE_WIDTH or inputs != 3 * patch * patch:
        raise CheckpointError(
            f"{where} is not a Wan2.2 VAE: it reads {inputs} channels, its widths are {list(enc)} and "
            f"{list(dec)}."
        )
    if channels != LATENT_CHANNELS:
        raise CheckpointError(
            f"{where}: a VAE of {channels} latent channels; Lance uses Wan2.2's, which has {LATENT_CHANNELS}."
        )
    return VAEConfig(enc, dec, enc_blocks, dec_blocks - 1, temporal, channels, patch)


def variant_of(shapes: Shapes, name: str) -> str:
    """ "image" or "video": the video checkpoint carries its ViT inside and a position table of more than one
    frame.

    Some exports drop both; then the name of the folder or file decides.
    """
    if any(k.startswith("vit_model.") for k in shapes):
        return "video"
    table = shapes.get("latent_pos_embed.pos_embed")
    if table:
        return "video" if table[0] > IMAGE_TABLE_ROWS else "image"
    return "video" if "video" in name.lower() else "image"


def to_json(config: LLMConfig | ViTConfig | VAEConfig) -> dict[str, Any]:
    """A dataclass as JSON-ready values (for `info` and file metadata)."""
    return asdict(config)


RELEASED_LLM = LLMConfig(2048, 11008, 36, 16, 2, 128, 151936, 1e6, (16, 24, 24), 1e-6)
RELEASED_VIT = ViTConfig(32, 1280, 3420, 16, 2048, fullatt_block_indexes=(7, 15, 23, 31))
RELEASED_VAE = VAEConfig((160, 320, 640, 640), (256, 512, 1024, 1024), 2, 2, (False, True, True))
