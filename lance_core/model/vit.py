"""Qwen2.5-VL's vision tower: normalised patches in, one embedding per merged patch group out.

It knows nothing of sequences, prompts or pixels; inputs/preprocess.py makes its input. Tensor names are those
of vit.safetensors. Source of the architecture: the Qwen2.5-VL technical report (arXiv 2502.13923), section
2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Grid, ViTConfig
from ..errors import CheckpointError, MediaError
from .attention import Attention
from .attention import attention as torch_attention
from .ops import TorchOps
from .rope import rotate_into, trained_frequencies

RMS_EPS = 1e-6
ROPE_THETA = 10_000.0
# Patches rotated at once, and a frame at least: their float32 copies are larger than anything else.
VIT_ROPE_CHUNK = 8192


@dataclass(frozen=True)
class WindowClass:
    """Windows of one shape in a frame: `count` of them, `tokens` patches each, from patch `start` of the
    reordered frame.
    """

    start: int
    count: int
    tokens: int


@dataclass(frozen=True)
class PatchOrder:
    """One grid's patches in the order the blocks work on: frame by frame, inside a frame windows of equal
    size together.

    So every window class of every frame is a slice, and a whole frame is one too: neither kind of attention
    needs a mask. `order` [h * w / merge^2] lists a frame's merge groups in that order; `cos`, `sin` [1, h *
    w, head width] belong to it.
    """

    grid: Grid
    order: Tensor
    inverse: Tensor
    classes: tuple[WindowClass, ...]
    cos: Tensor
    sin: Tensor

    @property
    def frame(self) -> int:
        """Patches in a frame."""
        return self.grid[1] * self.grid[2]


def window_classes(rows: int, cols: int, side: int, unit: int) -> tuple[list[int], tuple[WindowClass, ...]]:
    """Cut a frame of rows x cols merge groups into windows of side x side groups, smaller at the right and
    the bottom.

    Args:
        unit: patches in a merge group.

    Returns: the groups (row-major numbers) window by window, windows of equal size adjacent; and those
    classes.
    """
    by_size: dict[int, list[list[int]]] = {}
    for top in range(0, rows, side):
        for left in range(0, cols, side):
            window = [
                r * cols + c
                for r in range(top, min(top + side, rows))
                for c in range(left, min(left + side, cols))
            ]
            by_size.setdefault(len(window), []).append(window)
    order: list[int] = []
    classes = []
    for size, windows in by_size.items():
        classes.append(WindowClass(len(order) * unit, len(windows), size * unit))
        order.extend(group for window in windows for group in window)
    return order, tuple(classes)


def rope_angles(rows: Tensor, cols: Tensor, head_dim: int) -> Tensor:
    """Angles, float32 [n, head_dim], of patches at integer (row, col): a quarter of the width each, then both
    again.

    Places, frequencies and their products are all rounded to bfloat16, as in the released model, whose ViT
    works on a bfloat16 buffer of frequencies; see `rope.trained_frequencies`.
    """
    frequencies = trained_frequencies(ROPE_THETA, head_dim // 2)
    places = torch.stack([rows, cols], dim=1).bfloat16().float()
    half = (places[..., None] * frequencies).flatten(1).bfloat16().float()
    return torch.cat([half, half], dim=1)


class SelfAttention(nn.Module):
    """Attention inside windows, or inside whole frames; never across frames."""

    def __init__(self, config: ViTConfig, ops: Any, attention: Attention, device: Any, dtype: Any) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.attention = attention
        self.qkv = ops.Linear(
            config.hidden_size, 3 * config.hidden_size, bias=True, device=device, dtype=dtype
        )
        self.proj = ops.Linear(config.hidden_size, config.hidden_size, bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor, layouts: Sequence[PatchOrder], full: bool) -> Tensor:
        """x: [n, hidden], the grids of `layouts` one after the other. Returns the same shape."""
        parts = self.qkv(x).split([g.grid[0] * g.frame for g in layouts])
        mixed = [self._mix(part, layout, full) for part, layout in zip(parts, layouts, strict=True)]
        return self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed))

    def _mix(self, qkv: Tensor, layout: PatchOrder, full: bool) -> Tensor:
        frames = qkv.view(layout.grid[0], layout.frame, 3, self.heads, -1)
        v = frames[:, :, 2]
        q, k = (self._rotated(frames[:, :, i], layout) for i in range(2))
        if full:
            return self.attention(q, k, v, False).flatten(2).flatten(0, 1)
        mixed = qkv.new_empty(layout.grid[0], layout.frame, qkv.shape[1] // 3)
        for group in layout.classes:
            span = slice(group.start, group.start + group.count * group.tokens)
            wq, wk, wv = (s[:, span].reshape(-1, group.tokens, *s.shape[2:]) for s in (q, k, v))
            mixed[:, span] = self.attention(wq, wk, wv, False).reshape(
                layout.grid[0], group.count * group.tokens, -1
            )
        return mixed.flatten(0, 1)

    @staticmethod
    def _rotated(x: Tensor, layout: PatchOrder) -> Tensor:
        """Heads [frames, n, heads, width] by the rope of their places."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        count = max(1, VIT_ROPE_CHUNK // layout.frame)
        for part, place in zip(x.split(count), out.split(count), strict=True):
            rotate_into(place, part, layout.cos, layout.sin)
        return out


class MLP(nn.Module):
    """SwiGLU with biases."""

    def __init__(self, config: ViTConfig, ops: Any, device: Any, dtype: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = ops.Linear(width, inner, bias=True, device=device, dtype=dtype)
        self.up_proj = ops.Linear(width, inner, bias=True, device=device, dtype=dtype)
        self.down_proj = ops.Linear(inner, width, bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


class Block(nn.Module):
    """One layer, in place: attention inside windows (inside whole frames if `full`), then feed-forward."""

    def __init__(
        self, config: ViTConfig, full: bool, ops: Any, attention: Attention, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.full = full
        self.norm1 = ops.RMSNorm(config.hidden_size, eps=RMS_EPS, device=device, dtype=dtype)
        self.norm2 = ops.RMSNorm(config.hidden_size, eps=RMS_EPS, device=device, dtype=dtype)
        self.attn = SelfAttention(config, ops, attention, device, dtype)
        self.mlp = MLP(config, ops, device, dtype)

    def forward(self, x: Tensor, layouts: Sequence[PatchOrder]) -> Tensor:
        x.add_(self.attn(self.norm1(x), layouts, self.full))
        return x.add_(self.mlp(self.norm2(x)))


@cache
def _whole_kernel(conv: Any) -> Any:
    """A convolution class of `ops` for inputs exactly as large as its kernel: it runs as a matrix product.

    Convolutions are slow over many small inputs, and cuDNN refuses more than 65,535, which a clip reaches. As
    a subclass of `ops`' own class, it leaves casting, patching and streaming of the weight to ComfyUI.
    """

    class WholeKernel(conv):
        def _conv_forward(
            self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
        ) -> Tensor:
            return F.linear(x, weight.flatten(1), bias)

    return WholeKernel


class PatchEmbed(nn.Module):
    """A patch's pixels to one vector."""

    def __init__(self, config: ViTConfig, ops: Any, device: Any, dtype: Any) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = _whole_kernel(ops.Conv3d)(
            config.in_channels,
            config.hidden_size,
            kernel_size=kernel,
            stride=kernel,
            bias=False,
            device=device,
            dtype=dtype,
        )

    def forward(self, patches: Tensor) -> Tensor:
        """[n, channels * frames * rows * cols] to [n, hidden]."""
        return self.proj(patches)


class Merger(nn.Module):
    """The patches of a merge group, normed and joined, to one embedding of the language model's width."""

    def __init__(self, config: ViTConfig, ops: Any, device: Any, dtype: Any) -> None:
        super().__init__()
        joined = config.hidden_size * config.spatial_merge_size**2
        self.joined = joined
        self.ln_q = ops.RMSNorm(config.hidden_size, eps=RMS_EPS, device=device, dtype=dtype)
        self.mlp = nn.Sequential(
            ops.Linear(joined, joined, bias=True, device=device, dtype=dtype),
            nn.GELU(),
            ops.Linear(joined, config.out_hidden_size, bias=True, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).reshape(-1, self.joined))


class VisionTower(nn.Module):
    """The whole tower.

    Args:
        config: sizes; nothing else decides the architecture.
        ops: layer classes (see ops.py).
        attention: `attention.attention`, or ComfyUI's, wrapped to the same signature.
    """

    def __init__(
        self,
        config: ViTConfig,
        ops: Any = TorchOps,
        device: Any = None,
        dtype: Any = None,
        attention: Attention = torch_attention,
    ) -> None:
        super().__init__()
        head_dim = config.hidden_size // config.num_heads
        if config.hidden_size % config.num_heads or head_dim % 4:
            raise CheckpointError(
                f"a ViT of width {config.hidden_size} with {config.num_heads} heads; rope over rows and "
                "columns needs heads whose "
                "width is a multiple of 4. Check vision config.json."
            )
        if config.window_size < config.patch_size * config.spatial_merge_size:
            raise CheckpointError(
                f"a ViT window of {config.window_size} pixels is smaller than a merged patch, "
                f"{config.patch_size * config.spatial_merge_size} pixels. Check vision config.json."
            )
        self.config = config
        self.head_dim = head_dim
        self.patch_embed = PatchEmbed(config, ops, device, dtype)
        full = set(config.fullatt_block_indexes)
        self.blocks = nn.ModuleList(
            Block(config, i in full, ops, attention, device, dtype) for i in range(config.depth)
        )
        self.merger = Merger(config, ops, device, dtype)

    def forward(
        self,
        patches: Tensor,
        grids: Sequence[Sequence[int]],
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Embed images and videos.

        Args:
            patches: [n, channels * temporal_patch * patch * patch], merge group by merge group; all grids one
                after the other.
            grids: (t, h, w) of each image or video, in patches.
            progress: called with (blocks done, blocks in all); may raise to stop.

        Returns: [n / merge^2, out_hidden_size] in `patches`' dtype, in the order of the merge groups.

        Raises:
            MediaError: patches and grids do not fit each other or this tower.
        """
        sizes = self._check(patches, grids)
        known: dict[Grid, PatchOrder] = {}  # references of one size share a layout
        for grid in sizes:
            if grid not in known:
                known[grid] = self.layout(grid, patches.device)
        layouts = [known[grid] for grid in sizes]
        x = self._reorder(
            self.patch_embed(patches), layouts, self.config.spatial_merge_size**2, inverse=False
        )
        for done, block in enumerate(self.blocks, start=1):
            x = block(x, layouts)
            if progress is not None:
                progress(done, len(self.blocks))
        return self._reorder(self.merger(x), layouts, 1, inverse=True)

    def layout(self, grid: Grid, device: torch.device | str = "cpu") -> PatchOrder:
        """The order of a grid's patches inside the blocks, and their rope."""
        _, h, w = grid
        merge = self.config.spatial_merge_size
        side = self.config.window_size // merge // self.config.patch_size
        groups, classes = window_classes(h // merge, w // merge, side, merge**2)
        order = torch.tensor(groups)
        inside = torch.arange(merge**2)
        rows = (order // (w // merge) * merge)[:, None] + inside // merge
        cols = (order % (w // merge) * merge)[:, None] + inside % merge
        angles = rope_angles(rows.flatten(), cols.flatten(), self.head_dim)[None]
        return PatchOrder(
            grid,
            order.to(device),
            order.argsort().to(device),
            classes,
            angles.cos().to(device=device),
            angles.sin().to(device=device),
        )

    def _reorder(self, x: Tensor, layouts: Sequence[PatchOrder], unit: int, inverse: bool) -> Tensor:
        """Permute the merge groups (`unit` rows of x each) inside every frame, or put them back."""
        groups = [g.grid[0] * len(g.order) for g in layouts]
        parts = x.view(-1, unit, x.shape[-1]).split(groups)
        moved = [
            part.view(g.grid[0], len(g.order), unit, -1)
            .index_select(1, g.inverse if inverse else g.order)
            .flatten(0, 2)
            for part, g in zip(parts, layouts, strict=True)
        ]
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    def _check(self, patches: Tensor, grids: Sequence[Sequence[int]]) -> list[Grid]:
        config = self.config
        merge = config.spatial_merge_size
        sizes: list[Grid] = []
        for grid in grids:
            given = tuple(int(side) for side in grid)
            if len(given) != 3 or min(given) < 1 or given[1] % merge or given[2] % merge:
                raise MediaError(
                    f"got a ViT grid of {given}, expected (t, h, w), positive, h and w multiples of {merge}."
                )
            t, h, w = given
            sizes.append((t, h, w))
        total = sum(t * h * w for t, h, w in sizes)
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        if not total or tuple(patches.shape) != (total, width):
            raise MediaError(
                f"ViT patches of shape {list(patches.shape)} came with grids {sizes}; expected [{total}, "
                f"{width}], at least one grid. "
                "Make both with preprocess.vit_patches."
            )
        return sizes
