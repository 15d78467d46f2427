"""The vision tower against the golden embeddings and against a naive tower with n x n masks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lance_core.config import RELEASED_VIT, ViTConfig, vit_config
from lance_core.errors import CheckpointError, MediaError
from lance_core.inputs import preprocess as pre
from lance_core.inputs.media import load_image, read_clip
from lance_core.model.attention import attention
from lance_core.model.vit import VisionTower, window_classes

GOLDEN = Path(__file__).parent / "golden"
CASES = GOLDEN / "cases"
MANIFEST = json.loads((CASES / "manifest.json").read_text())
UNDERSTANDING = sorted(name for name, case in MANIFEST.items() if case["task"].startswith("x2t"))
SMALL = ViTConfig(3, 32, 48, 2, 24, patch_size=2, window_size=16, fullatt_block_indexes=(1,))


def tower_of(config: ViTConfig, seed: int = 0, **options) -> VisionTower:
    """Random weights large enough that every part shows in the output."""
    tower = VisionTower(config, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if "norm" in name or "ln_q" in name:
                weight.copy_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
            else:
                fan = weight[0].numel() if weight.dim() > 1 else 16
                weight.copy_(2 * torch.randn(weight.shape, generator=generator) / fan**0.5)
    return tower.eval()


def patches_of(config: ViTConfig, grids, seed: int = 1) -> torch.Tensor:
    n = sum(t * h * w for t, h, w in grids)
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def naive(tower: VisionTower, patches: torch.Tensor, grids) -> torch.Tensor:
    """The same function with loops and boolean masks over all patches, in merge-group order."""
    config, weights = tower.config, {k: v.double() for k, v in tower.state_dict().items()}
    merge, window = config.spatial_merge_size, config.window_size // config.patch_size
    where = []  # (grid, frame, row, col) of every patch
    for g, (t, h, w) in enumerate(grids):
        for frame in range(t):
            for group_row in range(h // merge):
                for group_col in range(w // merge):
                    where += [
                        (g, frame, group_row * merge + r, group_col * merge + c)
                        for r in range(merge)
                        for c in range(merge)
                    ]
    at = torch.tensor(where)
    frames = (at[:, None, :2] == at[None, :, :2]).all(-1)
    windows = frames & (at[:, None, 2:] // window == at[None, :, 2:] // window).all(-1)

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    head = config.hidden_size // config.num_heads
    frequencies = torch.tensor([1 / 10000.0 ** (4 * i / head) for i in range(head // 4)]).bfloat16()
    half = torch.cat(
        [at[:, 2:3].bfloat16() * frequencies, at[:, 3:4].bfloat16() * frequencies], 1
    ).double()  # as trained

    def rope(x):  # [n, heads, head] as complex numbers
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(half), half)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    x = patches.double() @ weights["patch_embed.proj.weight"].flatten(1).T
    for i in range(config.depth):
        y = norm(x, f"blocks.{i}.norm1")
        q, k, v = linear(y, f"blocks.{i}.attn.qkv").view(len(x), 3, config.num_heads, head).unbind(1)
        mask = frames if i in config.fullatt_block_indexes else windows
        scores = torch.einsum("qhd,khd->hqk", rope(q), rope(k)) / head**0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v).flatten(1)
        x = x + linear(mixed, f"blocks.{i}.attn.proj")
        y = norm(x, f"blocks.{i}.norm2")
        gated = F.silu(linear(y, f"blocks.{i}.mlp.gate_proj")) * linear(y, f"blocks.{i}.mlp.up_proj")
        x = x + linear(gated, f"blocks.{i}.mlp.down_proj")
    joined = norm(x, "merger.ln_q").reshape(-1, config.hidden_size * merge**2)
    return linear(F.gelu(linear(joined, "merger.mlp.0")), "merger.mlp.2")


def assert_near(got: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert got.shape == expected.shape
    worst = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert worst <= relative, f"off by {worst:.1e} of the largest value, {relative:.0e} allowed"


@pytest.fixture(scope="module")
def golden_tower() -> VisionTower:
    folder = GOLDEN / "checkpoint" / "Qwen2.5-VL-ViT"
    config = vit_config(json.loads((folder / "config.json").read_text()), "config.json")
    tower = VisionTower(config, device="meta")
    weights = {name: tensor.float() for name, tensor in load_file(folder / "vit.safetensors").items()}
    assert {n: p.shape for n, p in tower.named_parameters()} == {n: t.shape for n, t in weights.items()}
    tower.load_state_dict(weights, strict=True, assign=True)
    return tower.eval()


@pytest.mark.parametrize("case", UNDERSTANDING)
@torch.inference_mode()
def test_golden_embeddings(case, golden_tower):
    golden = load_file(CASES / f"{case}.safetensors")
    (name,) = [m for m in MANIFEST[case]["request"]["interleave_array"] if isinstance(m, str)]
    frames = read_clip(CASES / name)[0] if name.endswith(".mp4") else load_image(CASES / name)[None]
    patches, grid = pre.vit_patches(frames, MANIFEST[case]["resolution"], golden_tower.config)
    # Not the 5e-5 of everything else: with unrounded products of places and frequencies the tower would pass
    # that.
    assert_near(golden_tower(patches, [grid]), golden["vit_embeds"], 1e-5)


def test_golden_cases_are_there():
    assert len(UNDERSTANDING) == 4


@pytest.mark.parametrize(
    "grid", [(1, 2, 2), (1, 8, 8), (2, 10, 14), (3, 6, 18), (1, 16, 24), (2, 2, 26), (1, 22, 4)]
)
@torch.inference_mode()
def test_windows_equal_masks(grid):
    tower, patches = tower_of(SMALL), patches_of(SMALL, [grid])
    assert_near(tower(patches, [grid]), naive(tower, patches, [grid]), 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 1, "fullatt_block_indexes": ()},
        {"depth": 1, "fullatt_block_indexes": (0,)},
        {"depth": 4, "fullatt_block_indexes": (0, 3)},
        {"num_heads": 4},
        {"num_heads": 1, "hidden_size": 20},
        {"window_size": 8},
        {"window_size": 15},  # not a whole number of merged patches: rounded down
        {"window_size": 1000},
        {"temporal_patch_size": 1, "patch_size": 4},
        {"spatial_merge_size": 1, "window_size": 6},
        {"spatial_merge_size": 3, "window_size": 18},
        {"out_hidden_size": 7, "intermediate_size": 5},
    ],
    ids=str,
)
@torch.inference_mode()
def test_other_configurations(change):
    config = dataclasses.replace(SMALL, **change)
    side = (
        config.window_size
        // config.patch_size
        // config.spatial_merge_size
        * config.patch_size
        * config.spatial_merge_size
    )
    merge = config.spatial_merge_size
    grid = (2, 7 * merge, 5 * merge)
    tower, patches = tower_of(config), patches_of(config, [grid])
    # The naive tower cuts at multiples of its window, so it is handed the rounded one.
    got = tower(patches, [grid])
    tower.config = dataclasses.replace(config, window_size=side)
    assert_near(got, naive(tower, patches, [grid]), 1e-5)


@torch.inference_mode()
def test_several_grids_equal_one_by_one():
    grids = [(1, 10, 14), (3, 6, 4), (1, 10, 14), (2, 8, 8)]
    tower, patches = tower_of(SMALL), patches_of(SMALL, grids)
    together = tower(patches, grids)
    parts = patches.split([t * h * w for t, h, w in grids])
    alone = torch.cat([tower(part, [grid]) for part, grid in zip(parts, grids, strict=True)])
    assert_near(together, alone, 1e-6)
    assert_near(together, naive(tower, patches, grids), 1e-5)


@torch.inference_mode()
def test_frames_do_not_see_each_other():
    tower, grid = tower_of(SMALL), (3, 10, 6)
    patches = patches_of(SMALL, [grid])
    before = tower(patches, [grid]).view(3, -1, 24)
    patches[60:120] += 1  # the middle frame
    after = tower(patches, [grid]).view(3, -1, 24)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1], atol=1e-2)


@torch.inference_mode()
def test_bfloat16_follows_the_input():
    tower, grid = tower_of(SMALL), (2, 10, 14)
    patches = patches_of(SMALL, [grid])
    exact = tower(patches, [grid])
    rough = tower.bfloat16()(patches.bfloat16(), [grid])
    assert rough.dtype == torch.bfloat16 and exact.dtype == torch.float32
    assert_near(rough, exact, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_patches_as_a_matrix_product(dtype):
    embed = tower_of(SMALL).patch_embed.to(dtype)
    patches = patches_of(SMALL, [(1, 10, 14)]).to(dtype)
    kernel = embed.proj.weight
    plain = F.conv3d(patches.view(-1, *kernel.shape[1:]), kernel).flatten(1)
    assert_near(embed(patches), plain, 1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("piece", [1, 33, 280])
@torch.inference_mode()
def test_rotating_in_pieces_changes_nothing(piece, monkeypatch):
    tower, grid = tower_of(SMALL), (3, 10, 14)
    patches = patches_of(SMALL, [grid])
    whole = tower(patches, [grid])
    monkeypatch.setattr("lance_core.model.vit.VIT_ROPE_CHUNK", piece)
    assert torch.equal(tower(patches, [grid]), whole)


@torch.inference_mode()
def test_input_is_left_alone():
    tower, grid = tower_of(SMALL), (2, 10, 14)
    patches = patches_of(SMALL, [grid])
    before = patches.clone()
    tower(patches, [grid])
    assert torch.equal(patches, before)


@torch.inference_mode()
def test_attention_is_the_one_given_and_small():
    """The given function does all mixing, in batches of windows: never over all patches at once."""
    calls = []

    def spy(q, k, v, causal):
        calls.append(tuple(q.shape[:2]))
        assert not causal
        return attention(q, k, v, causal)

    tower = tower_of(SMALL, attention=spy)
    grid = (2, 10, 14)  # 5 x 7 groups: windows of 4x4, 4x3, 1x4 and 1x3 groups
    tower(patches_of(SMALL, [grid]), [grid])
    windowed = [(2, 64), (2, 48), (2, 16), (2, 12)]
    assert calls == [*windowed, (2, 140), *windowed]


def test_windows_cover_every_group_once():
    for rows, cols in [(1, 1), (4, 4), (5, 7), (9, 2), (8, 12)]:
        order, classes = window_classes(rows, cols, 4, 4)
        assert sorted(order) == list(range(rows * cols))
        assert classes[0].start == 0 and sum(c.count * c.tokens for c in classes) == rows * cols * 4
        assert len({c.tokens for c in classes}) == len(classes) <= 4


@torch.inference_mode()
def test_progress_counts_blocks_and_may_stop():
    tower, seen = tower_of(SMALL), []
    tower(
        patches_of(SMALL, [(1, 2, 2)]), [(1, 2, 2)], progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tower(patches_of(SMALL, [(1, 2, 2)]), [(1, 2, 2)], progress=stop)


def test_released_sizes():
    tower = VisionTower(RELEASED_VIT, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in tower.parameters()) == pytest.approx(
        1.34e9 / 2, rel=0.01
    )  # the file is 1.34 GB of 2-byte numbers
    assert [i for i, block in enumerate(tower.blocks) if block.full] == [7, 15, 23, 31]
    assert tower.patch_embed.proj.weight.shape == (1280, 3, 2, 14, 14)


@pytest.mark.parametrize(
    ("shape", "grids", "says"),
    [
        ((4, 24), [], "at least one grid"),
        ((4, 23), [(1, 2, 2)], r"\[4, 24\]"),
        ((5, 24), [(1, 2, 2)], r"\[4, 24\]"),
        ((6, 24), [(1, 2, 3)], "multiples of 2"),
        ((4, 24), [(2, 2)], r"\(t, h, w\)"),
        ((0, 24), [(0, 2, 2)], "positive"),
    ],
)
def test_misfits_are_refused(shape, grids, says):
    with pytest.raises(MediaError, match=says):
        tower_of(SMALL)(torch.zeros(shape), grids)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"num_heads": 16}, "multiple of 4"), ({"window_size": 3}, "smaller than a merged patch")],
)
def test_impossible_configurations(change, says):
    with pytest.raises(CheckpointError, match=says):
        VisionTower(dataclasses.replace(SMALL, **change), device="meta")
