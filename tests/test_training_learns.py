"""It learns: pictures of one colour pattern, a fixed fact, and both at once, on a small model.

The small model's VAE is random and shows no colours, so samples are compared as latents.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training_run import lines, pattern

import lance_core
from lance_core import training
from lance_core.checkpoint import tiny
from lance_core.components import Components
from lance_core.inputs.media import load_image
from lance_core.training import learner, lora, run

OPTIONS = {"rank": 16, "lr": 1e-2, "dtype": "float32", "resolution": "image_256res", "schedule": "cosine"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model, its latent's way in and out one another's inverse, as training would have made them."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    path = tiny.write(folder) / "Lance_3B" / "model.safetensors"
    weights = load_file(path)
    drawn = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(drawn)[0].contiguous()
    weights["vae2llm.weight"], weights["llm2vae.weight"] = basis * 8, (basis.T * 0.75**0.5).contiguous()
    weights["llm2vae.bias"] = torch.zeros(48)
    save_file(weights, path)
    return path.parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return pattern(tmp_path_factory.mktemp("set"), 12)


def first_and_last(output) -> tuple[float, float]:
    told = lines(output, "validation.jsonl")
    return told[0]["loss"], told[-1]["loss"]


def sampled(model, output=None) -> torch.Tensor:
    """A latent [16, 16, 48] of the pattern's caption, with a LoRA or without."""
    lance = lance_core.load(model, dtype=torch.float32)
    if output is not None:
        settings = run.settings_of({"rank": 16})
        trained = learner.Learner(lance.checkpoint, settings, torch.float32, torch.device("cpu"))
        lora.fill(trained.adapters, load_file(output), "the file")
        lance.components.use("gen", trained.experts.gen)
        lance.components.use("und", trained.experts.und)
    options = {"resolution": "image_256res", "steps": 20, "cfg": 1.0}
    return lance.generate("t2i", "a red and blue pattern 3", **options).latent[0]


def test_a_pattern(model, pictures, tmp_path):
    output = tmp_path / "a.safetensors"
    training.train(pictures, model, output, **OPTIONS, steps=200, save_every=200, validation=3)
    before, after = first_and_last(output)
    assert after <= 0.5 * before
    components = Components(lance_core.load(model).checkpoint, torch.device("cpu"), torch.float32)
    files = sorted(pictures.glob("*.png"))
    with torch.inference_mode():
        latents = torch.stack([components.encode_vae(load_image(f)[None], "image_256res")[0] for f in files])
    far, near = (
        float((latent - latents).square().mean((1, 2, 3)).min().sqrt())
        for latent in (sampled(model), sampled(model, output))
    )
    assert near < far, "a sample is nearer to one of the pictures than without the LoRA"


FACT = {"image": "p00.png", "question": "who made this?", "answer": "Ada"}


@pytest.mark.parametrize("experts", ["understanding", "both"])
def test_a_fact(experts, model, pictures, tmp_path):
    """Alone, or beside the pattern: the answer is written word for word."""
    rows = [FACT]
    if experts == "both":
        rows += [{"image": f"p{i:02}.png", "caption": f"a red and blue pattern {i}"} for i in range(4)]
    place = pattern(tmp_path, 4) / "set.jsonl"
    place.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "a.safetensors"
    options = OPTIONS | {"experts": experts, "steps": 120, "save_every": 120, "batch": len(rows)}
    options |= {"sample_prompts": (FACT["question"],), "validation": 0, "lr": 5e-3}
    training.train(place, model, output, **options)
    before, after = first_and_last(output)
    assert after <= 0.7 * before
    trained = learner.Learner(
        (lance := lance_core.load(model, dtype=torch.float32)).checkpoint,
        run.settings_of({"rank": 16, "experts": experts}),
        torch.float32,
        torch.device("cpu"),
    )
    lora.fill(trained.adapters, load_file(output), "the file")
    lance.components.use("und", trained.experts.und)
    asked = {"image": tmp_path / "p00.png", "resolution": "image_256res", "max_new_tokens": 8}
    assert lance.understand(FACT["question"], **asked).text == "Ada"
