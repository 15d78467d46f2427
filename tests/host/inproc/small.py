"""Graphs small enough to run by the dozen, stock nodes around ours; and a way to the pack's modules."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from graphs import Graph, node

if TYPE_CHECKING:
    import torch

CHECKPOINT, VIDEO_CHECKPOINT = "Lance_3B", "Lance_3B_Video"
MODEL = ["loader", 0]


def module(comfy, name: str):
    """A module of the pack as ComfyUI has loaded it, e.g. "lance_core.model.kv_cache"."""
    return importlib.import_module(
        comfy.nodes["LanceSampler"].__module__.removesuffix("nodes.nodes_sample") + name
    )


def t2i(
    prompt: str = "a red fox",
    negative: str = "",
    dtype: str = "default",
    width: int = 64,
    height: int = 64,
    batch: int = 1,
) -> Graph:
    """Loader, text and latent of an image; sample it with `lance` or `ksampler`."""
    return {
        "loader": node("LanceLoader", checkpoint=CHECKPOINT, weight_dtype=dtype),
        "text": text(prompt, negative),
        "latent": node(
            "EmptyLanceLatent",
            size="custom",
            aspect="1:1",
            width=width,
            height=height,
            frames=1,
            batch_size=batch,
        ),
    }


def text(prompt: str, negative: str = "", target: str = "image", **inputs: Any) -> dict[str, Any]:
    return node(
        "LanceTextEncode",
        lance=["loader", 1],
        prompt=prompt,
        negative_prompt=negative,
        target=target,
        **inputs,
    )


def i2v(batch: int = 1, frames: int = 9) -> Graph:
    return {
        "loader": node("LanceLoader", checkpoint=VIDEO_CHECKPOINT, weight_dtype="default"),
        "text": text("the shapes drift apart", target="video"),
        "photo": node("LoadImage", image="photo.png"),
        "latent": node(
            "LanceImageToVideoLatent",
            vae=["loader", 2],
            start_image=["photo", 0],
            size="custom",
            width=96,
            height=64,
            frames=frames,
            batch_size=batch,
        ),
    }


def edit(prompt: str = "paint it blue", picture: str = "photo.png") -> Graph:
    return {
        "loader": node("LanceLoader", checkpoint=CHECKPOINT, weight_dtype="default"),
        "photo": node("LoadImage", image=picture),
        "vision": node(
            "LanceVisionEncode",
            lance=["loader", 1],
            vae=["loader", 2],
            role="edit source",
            resolution="image_256res",
            image=["photo", 0],
        ),
        "text": text(prompt, vision=["vision", 0]),
    }


def question(asked: str = "What is it?", tokens: int = 6) -> Graph:
    return {
        "loader": node("LanceLoader", checkpoint=CHECKPOINT, weight_dtype="default"),
        "photo": node("LoadImage", image="photo.png"),
        "vision": node(
            "LanceVisionEncode",
            lance=["loader", 1],
            role="question",
            resolution="image_256res",
            image=["photo", 0],
        ),
        "answer": node(
            "LanceUnderstand",
            lance=["loader", 1],
            vision=["vision", 0],
            question=asked,
            system_prompt="",
            max_new_tokens=tokens,
            temperature=0.0,
            top_p=1.0,
            seed=0,
        ),
    }


def lance(graph: Graph, **changes: Any) -> Graph:
    """`graph` with Lance Sampler as "sampler"; 3 steps, guided all the way."""
    inputs = {
        "model": MODEL,
        "positive": ["text", 0],
        "negative": ["text", 1],
        "sampler": "euler",
        "denoise": 1.0,
    }
    inputs |= {
        "latent": ["latent", 0] if "latent" in graph else ["vision", 1],
        "seed": 7,
        "steps": 3,
        "shift": 3.5,
    }
    inputs |= {"cfg": 4.0, "cfg_start": 1.0, "cfg_end": 0.0, "renorm": "global", "renorm_min": 0.0}
    return {**graph, "sampler": node("LanceSampler", **{**inputs, **changes})}


def ksampler(graph: Graph, **changes: Any) -> Graph:
    """`graph` with stock KSampler as "sampler"."""
    inputs = {
        "model": MODEL,
        "positive": ["text", 0],
        "negative": ["text", 1],
        "latent_image": ["latent", 0],
        "seed": 7,
        "steps": 3,
    }
    inputs |= {"cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {**graph, "sampler": node("KSampler", **{**inputs, **changes})}


def advanced(
    graph: Graph, guider: dict[str, Any], sampler: str = "euler", noise: str = "LanceNoise", steps: int = 3
) -> Graph:
    """`graph` with SamplerCustomAdvanced as "sampler"."""
    return {
        **graph,
        "guider": guider,
        "noise": node(noise, **({"seed": 7} if noise == "LanceNoise" else {"noise_seed": 7})),
        "select": node("KSamplerSelect", sampler_name=sampler),
        "sigmas": node("LanceScheduler", steps=steps, shift=3.5, denoise=1.0),
        "sampler": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["select", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
    }


def samples(comfy, graph: Graph, name: str = "sampler") -> torch.Tensor:
    """The latent a node of the graph makes."""
    return comfy.value(graph, name)["samples"]


def away(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over largest value."""
    assert found.shape == wanted.shape, f"{tuple(found.shape)} instead of {tuple(wanted.shape)}"
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


@contextlib.contextmanager
def partial_loading(monkeypatch, share: float):
    """ComfyUI's load as with little memory; yields how many modules were left behind at each load."""
    import comfy.model_patcher

    load, left = comfy.model_patcher.ModelPatcher.load, []

    def partly(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        load(self, device_to, max(1, self.model_size() * share), force_patch_weights, False)
        left.append(sum(hasattr(m, "prev_comfy_cast_weights") for m in self.model.modules()))

    with monkeypatch.context() as patched:
        patched.setattr(comfy.model_patcher.ModelPatcher, "load", partly)
        yield left
