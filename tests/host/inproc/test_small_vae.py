"""The small VAE for Wan2.2's latents (TAEHV), for previews and in place of the VAE. Random weights here."""

from __future__ import annotations

import shutil

import pytest
import torch
from graphs import node
from safetensors.torch import save_file
from small import edit, i2v, lance, samples, t2i


@pytest.fixture(autouse=True, scope="module")
def small_vae(comfy, base):
    """models/vae_approx/lighttaew2_2.safetensors"""
    taehv = pytest.importorskip("comfy.taesd.taehv", reason="this ComfyUI has no small VAE for Wan2.2")
    folder = base / "models" / "vae_approx"
    existed = folder.exists()
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {k: v.shape for k, v in taehv.TAEHV(latent_channels=48).state_dict().items()}
    weights = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    weights = {k: v / max(1, v[0].numel()) ** 0.5 for k, v in weights.items()}
    save_file({k: v.half() for k, v in weights.items()}, folder / "lighttaew2_2.safetensors")
    yield
    (folder / "lighttaew2_2.safetensors").unlink()
    if not existed:
        shutil.rmtree(folder)


SMALL = node("VAELoader", vae_name="lighttaew2_2.safetensors")


@pytest.mark.parametrize("graph", [t2i, i2v])
def test_it_decodes_what_lance_made(comfy, graph):
    graph = {**lance(graph(), steps=1), "small": SMALL}
    graph["theirs"] = node("VAEDecode", samples=["sampler", 0], vae=["small", 0])
    graph["ours"] = node("LanceVAEDecode", samples=["sampler", 0], vae=["small", 0])
    made, theirs, ours = comfy.run(graph, [("sampler", 0), ("theirs", 0), ("ours", 0)]).values
    t, h, w = made["samples"].shape[2:]
    assert theirs.shape == (4 * t - 3, 16 * h, 16 * w, 3)
    assert torch.equal(theirs, ours) and bool(torch.isfinite(theirs).all())


def test_it_encodes_what_is_to_be_edited(comfy):
    graph = {**edit(), "small": SMALL}
    wanted = samples(comfy, lance(edit(), steps=1))
    graph["vision"]["inputs"]["vae"] = ["small", 0]
    found = samples(comfy, lance(graph, steps=1))
    assert found.shape == wanted.shape and not torch.equal(found, wanted)


@pytest.mark.parametrize("graph", [t2i, i2v])
def test_previews(comfy, monkeypatch, graph):
    import latent_preview

    model, latent = comfy.run(lance(graph(), steps=1), [("loader", 0), ("sampler", 0)]).values
    # A run sets it anew.
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.TAESD)
    with torch.inference_mode():
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        picture = previewer.decode_latent_to_preview(model.model.process_latent_in(latent["samples"]))
    assert type(previewer).__name__ == "TAEHVPreviewerImpl"
    h, w = latent["samples"].shape[-2:]
    assert picture.size == (16 * w, 16 * h)
