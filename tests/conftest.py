"""Shared fixtures: golden cases with all that a run of each went through, loaded checkpoints, a writer of
random ones.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_cases import ANSWERED, DRAWN, GOLDEN, MANIFEST, request_of
from safetensors.torch import load_file, save_file

import lance_core
from lance_core.bench import device, suite
from lance_core.config import VAEConfig, vit_config
from lance_core.inputs import prompts
from lance_core.model.dual_expert import DualExpert
from lance_core.model.kv_cache import Context
from lance_core.model.sequence import Branch, Role
from lance_core.model.vit import VisionTower
from lance_core.vae.wan import WanVAE

# Kernels on Triton's interpreter: run by test_kernels.py in a process of its own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


# -- golden cases --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def units() -> dict[str, Any]:
    return json.loads((GOLDEN / "cases" / "units.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def opened():
    """opened(name, dtype) -> a golden checkpoint, loaded once a session."""
    known: dict[tuple[str, torch.dtype], lance_core.Lance] = {}

    def open_(name: str, dtype: torch.dtype = torch.float32) -> lance_core.Lance:
        if (name, dtype) not in known:
            known[name, dtype] = lance_core.load(GOLDEN / "checkpoint" / name, dtype=dtype)
        return known[name, dtype]

    return open_


@pytest.fixture(scope="session")
def image_lance(opened) -> lance_core.Lance:
    return opened("Lance_3B")


@pytest.fixture(scope="session")
def video_lance(opened) -> lance_core.Lance:
    return opened("Lance_3B_Video")


def record(lance: lance_core.Lance, *args: Any, **options: Any) -> SimpleNamespace:
    """Run `generate` and note what it went through.

    result; sequence, plan and prepared as denoised; passes (branch or None, tokens, causal, tokens before)
    over the context; velocities (rows' branches, x, t, velocity) of every call; start, the noise with a fixed
    first frame in it, and that first_frame.
    """
    run = SimpleNamespace(passes=[], velocities=[])
    extend, velocity = Context.extend, DualExpert.velocity

    def on_extend(self, region, tokens, causal, attention):
        branch = next((b for b, rest in self.rests.items() if rest is region), None)
        before = self.prefix.filled + (0 if branch is None else region.filled)
        run.passes.append((branch, tokens, causal, before))
        return extend(self, region, tokens, causal, attention)

    def on_velocity(self, rows, x, t):
        out = velocity(self, rows, x, t)
        run.prepared = rows[0].prepared
        run.velocities.append(([row.branch for row in rows], x.clone(), t.clone(), out))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "extend", on_extend)
        patch.setattr(DualExpert, "velocity", on_velocity)
        run.result = lance.generate(*args, **options)
    run.plan = run.prepared.plan
    run.sequence = run.plan.sequence
    rows, x, t, _ = run.velocities[0]
    run.start = x[: rows.count(Branch.CONDITIONAL)]
    run.first_frame = run.start[0, :1] if t[0, 0] == 0 else None
    return run


@pytest.fixture(scope="session")
def recorded():
    """`record`, for tests that draw something else than a golden case."""
    return record


@pytest.fixture(scope="session", params=DRAWN)
def drawn(request, opened) -> SimpleNamespace:
    """A golden generation case, run end to end from its media files: `record`'s notes with name, case, lance
    and tensors.
    """
    case = MANIFEST[request.param]
    lance = opened(case["checkpoint"])
    task, text, options = request_of(case)
    run = record(lance, task, text, **options)
    run.name, run.case, run.lance = request.param, case, lance
    run.tensors = load_file(GOLDEN / "cases" / f"{request.param}.safetensors")
    return run


@pytest.fixture(scope="session", params=ANSWERED)
def answered(request, opened) -> SimpleNamespace:
    """A golden understanding case: its answer end to end, and sequence and logits from the level below."""
    case = MANIFEST[request.param]
    lance = opened(case["checkpoint"])
    _, text, options = request_of(case)
    run = SimpleNamespace(name=request.param, case=case, lance=lance, logits=[])
    run.tensors = load_file(GOLDEN / "cases" / f"{request.param}.safetensors")
    run.answer = lance.understand(text, max_new_tokens=case["max_length"], **options)

    def choose(logits: torch.Tensor) -> int:
        run.logits.append(logits)
        return int(logits.argmax())

    source = options.get("video") or options.get("image")
    clip = (
        lance_core.media.read_clip(source)[0]
        if "video" in options
        else lance_core.media.load_image(source)[None]
    )
    with torch.inference_mode():
        seen = lance.components.vit_segment(clip, options["resolution"], Role.QUESTION)
        run.sequence = prompts.question(lance.checkpoint.tokenizer, options["system_prompt"], [seen], text)
        run.below = lance.answer(run.sequence, case["max_length"], choose)
    return run


# -- random checkpoints --------------------------------------------------------------------------------------


def expert_shapes(c: dict[str, Any], suffix: str) -> dict[str, tuple[int, ...]]:
    """One expert's layer tensors by name, {n} for the layer, as MODEL.md lists them."""
    hidden, inner, q, kv = c["hidden"], c["inner"], c["heads"] * c["width"], c["kv"] * c["width"]
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes = {f"self_attn.{k}{suffix}.weight": v for k, v in attention.items()}
    shapes |= {f"self_attn.{k}{suffix}.bias": v[:1] for k, v in attention.items() if k != "o_proj"}
    shapes |= {f"self_attn.{k}_norm{suffix}.weight": (c["width"],) for k in "qk"}
    shapes |= {f"mlp{suffix}.{k}.weight": v for k, v in mlp.items()}
    shapes |= {f"{k}{suffix}.weight": (hidden,) for k in ("input_layernorm", "post_attention_layernorm")}
    return {f"language_model.model.layers.{{n}}.{k}": v for k, v in shapes.items()}


def model_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, rows = c["hidden"], c["rows"]
    shapes = {
        "language_model.model.embed_tokens.weight": (rows, hidden),
        "language_model.lm_head.weight": (rows, hidden),
    }
    for n in range(c["layers"]):
        for suffix in ("", "_moe_gen"):
            shapes |= {k.format(n=n): v for k, v in expert_shapes(c, suffix).items()}
    shapes |= {f"language_model.model.norm{s}.weight": (hidden,) for s in ("", "_moe_gen")}
    shapes |= {"time_embedder.mlp.0.weight": (hidden, 256), "time_embedder.mlp.2.weight": (hidden, hidden)}
    shapes |= {
        "vae2llm.weight": (hidden, 48),
        "llm2vae.weight": (48, hidden),
        "llm2vae.bias": (48,),
        "vae2llm.bias": (hidden,),
    }
    return shapes | {f"time_embedder.mlp.{i}.bias": (hidden,) for i in (0, 2)}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Weights large enough that every one of them shows in the result."""
    generator = torch.Generator().manual_seed(seed)

    def one(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        x = torch.randn(shape, generator=generator)
        if "norm" in name or "gamma" in name or "ln_q" in name:
            return 1 + 0.3 * x
        if len(shape) == 1:
            return 0.2 * x
        return x / 2 if "embed_tokens" in name else x / x[0].numel() ** 0.5

    return {name: one(name, tuple(shape)) for name, shape in shapes.items()}


DEFAULTS = {
    "hidden": 32,
    "inner": 40,
    "layers": 2,
    "heads": 4,
    "kv": 2,
    "width": 8,
    "mrope": (1, 1, 2),
    "rows": 400,
    "theta": 1e6,
}
VIT = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}
VAE = VAEConfig((8, 8, 8, 8), (8, 8, 8, 8), 2, 2, (False, True, True))


def write(
    root: Path, name: str = "Lance_3B_Video", *, seed: int = 0, vit=(), vae: VAEConfig = VAE, **sizes: Any
) -> Path:
    """A random checkpoint in the released layout under `root`; returns its model folder. `sizes` as in
    DEFAULTS.
    """
    c = DEFAULTS | sizes
    vision = VIT | {"out_hidden_size": c["hidden"]} | dict(vit)
    folder, tower = root / name, root / "Qwen2.5-VL-ViT"
    folder.mkdir(parents=True)
    tower.mkdir(exist_ok=True)
    for file in TOKENIZER_FILES:
        shutil.copy(GOLDEN / "checkpoint" / "Lance_3B" / file, folder)
    config = {
        "hidden_size": c["hidden"],
        "intermediate_size": c["inner"],
        "num_hidden_layers": c["layers"],
        "num_attention_heads": c["heads"],
        "num_key_value_heads": c["kv"],
        "rms_norm_eps": 1e-6,
        "rope_theta": c["theta"],
        "vocab_size": c["rows"],
        "rope_scaling": {"type": "mrope", "mrope_section": list(c["mrope"])},
        "vision_config": vision,
    }
    (folder / "llm_config.json").write_text(json.dumps(config))
    (tower / "config.json").write_text(json.dumps(vision))
    save_file(random_tensors(model_shapes(c), seed), folder / "model.safetensors")
    shapes = {
        k: v.shape for k, v in VisionTower(vit_config(vision, "test"), device="meta").state_dict().items()
    }
    save_file(random_tensors(shapes, seed + 1), tower / "vit.safetensors")
    shapes = {k: v.shape for k, v in WanVAE(vae, device="meta").state_dict().items()}
    torch.save(random_tensors(shapes, seed + 2), root / "Wan2.2_VAE.pth")
    return folder


@pytest.fixture(scope="session")
def write_checkpoint():
    """`write`: makes a random checkpoint of any size in a folder."""
    return write


@pytest.fixture
def checkpoint_copy(tmp_path) -> Path:
    """A golden checkpoint folder that a test may damage, its ViT and VAE beside it."""
    root = tmp_path / "copy"
    root.mkdir()
    for name in ("Lance_3B", "Qwen2.5-VL-ViT"):
        shutil.copytree(GOLDEN / "checkpoint" / name, root / name)
    shutil.copy(GOLDEN / "checkpoint" / "Wan2.2_VAE.pth", root)
    return root / "Lance_3B"


@pytest.fixture
def small_rates(monkeypatch):
    """The benchmark's rates, measured on what takes no time."""
    monkeypatch.setitem(device.MATMUL_SIDE, "cpu", 64)
    monkeypatch.setitem(device.COPY_BYTES, "cpu", 1 << 16)


@pytest.fixture
def smaller(monkeypatch):
    """The benchmark's small suite at sizes that take no time."""
    rows = suite._rows((32, 32), (32, 32), (32, 48, 5), (32, 32), (32, 32, 5))
    monkeypatch.setitem(suite.SUITES, "small", suite.Suite(rows, (32, 32), (1, 2, 3, 5), 2))


@pytest.fixture
def edit_tensors():
    """edit_tensors(path, function): rewrite a weight file with its tensors changed in place by `function`."""

    def edit(path: Path, change) -> None:
        torch_file = path.suffix == ".pth"
        tensors = torch.load(path, weights_only=True) if torch_file else load_file(path)
        change(tensors)
        if torch_file:
            torch.save(tensors, path)
        else:
            save_file(tensors, path)

    return edit
