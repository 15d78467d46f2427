"""Workflows in API form for the golden requests, built node by node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CASES = GOLDEN / "cases"
MANIFEST: dict[str, dict[str, Any]] = json.loads((CASES / "manifest.json").read_text())
GENERATION = [name for name, case in MANIFEST.items() if not case["task"].startswith("x2t")]
QUESTIONS = [name for name in MANIFEST if name not in GENERATION]

Graph = dict[str, dict[str, Any]]


def tensors(name: str) -> dict[str, Any]:
    """The golden case's recorded tensors."""
    from safetensors.torch import load_file

    return load_file(CASES / f"{name}.safetensors")


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One node; links are [id, output]."""
    return {"class_type": kind, "inputs": inputs}


def system_prompt(case: dict[str, Any]) -> str:
    """The instruction the case was rendered with."""
    return case["rendered"].split("<|im_start|>system\n")[1].split("<|im_end|>")[0]


def files(case: dict[str, Any]) -> list[str]:
    """The case's media, by the name they have in ComfyUI's input folder."""
    request = case["request"]
    return (
        []
        if isinstance(request, str)
        else [p.split("/")[1] for p in request["interleave_array"] if isinstance(p, str) and "inputs/" in p]
    )


def text(case: dict[str, Any]) -> Any:
    request = case["request"]
    if isinstance(request, str):
        return request
    return next(p for p in request["interleave_array"] if not (isinstance(p, str) and "inputs/" in p))


def media(graph: Graph, case: dict[str, Any], role: str) -> None:
    """Load Image / Load Video and Lance Vision Encode nodes; the last encode is "vision"."""
    for i, name in enumerate(files(case)):
        last = i == len(files(case)) - 1
        inputs: dict[str, Any] = {
            "lance": ["loader", 1],
            "vae": ["loader", 2],
            "role": role,
            "resolution": case["resolution"],
        }
        if name.endswith(".mp4"):
            graph[f"load{i}"] = node("LoadVideo", file=name)
            inputs["video"] = [f"load{i}", 0]
        else:
            graph[f"load{i}"] = node("LoadImage", image=name)
            inputs["image"] = [f"load{i}", 0]
            if name == "alpha.png":
                inputs["mask"] = [f"load{i}", 1]
        if i:
            inputs["earlier"] = [f"vision{i - 1}", 0]
        graph["vision" if last else f"vision{i}"] = node("LanceVisionEncode", **inputs)


def prompt(name: str, dtype: str = "default") -> Graph:
    """Everything of a golden generation case up to the sampler: loader, media, text, latent."""
    case = MANIFEST[name]
    task = case["task"]
    graph: Graph = {"loader": node("LanceLoader", checkpoint=case["checkpoint"], weight_dtype=dtype)}
    encode: dict[str, Any] = {"lance": ["loader", 1], "prompt": text(case), "negative_prompt": ""}
    encode |= {
        "target": "video" if task in ("t2v", "i2v", "video_edit", "idip_video") else "image",
        "system_prompt": system_prompt(case),
    }
    if task == "i2v":
        graph["load0"] = node("LoadImage", image=files(case)[0])
        graph["latent"] = node(
            "LanceImageToVideoLatent",
            vae=["loader", 2],
            start_image=["load0", 0],
            size=case["resolution"],
            width=16,
            height=16,
            frames=case["num_frames"],
            batch_size=1,
        )
    elif files(case):
        media(graph, case, "edit source" if task.endswith("edit") else "subject reference")
        encode["vision"] = ["vision", 0]
    if task in ("t2i", "t2v", "idip_image", "idip_video"):
        size = {"width": case["width"], "height": case["height"], "frames": case["num_frames"]}
        graph["latent"] = node("EmptyLanceLatent", size="custom", aspect="1:1", batch_size=1, **size)
    graph["text"] = node("LanceTextEncode", **encode)
    return graph


def latent_link(graph: Graph) -> list:
    return ["latent", 0] if "latent" in graph else ["vision", 1]


def sampled(name: str, dtype: str = "default", **changes: Any) -> Graph:
    """The whole graph with Lance Sampler as "sampler"."""
    case, graph = MANIFEST[name], prompt(name, dtype)
    inputs = {
        "model": ["loader", 0],
        "positive": ["text", 0],
        "negative": ["text", 1],
        "latent": latent_link(graph),
        "sampler": "euler",
        "denoise": 1.0,
        **settings(case),
    }
    graph["sampler"] = node("LanceSampler", **{**inputs, **changes})
    return graph


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """The case's seed, schedule and guidance, as Lance Sampler's inputs."""
    keys = {"seed", "steps", "shift", "cfg", "renorm", "renorm_min"}
    return {k: case[k] for k in keys} | {"cfg_end": case["interval"][0], "cfg_start": case["interval"][1]}


def custom(name: str) -> Graph:
    """The same through SamplerCustomAdvanced; its latent is "sampler"."""
    case, graph = MANIFEST[name], prompt(name)
    guidance = {k: v for k, v in settings(case).items() if k not in ("seed", "steps", "shift")}
    graph["noise"] = node("LanceNoise", seed=case["seed"], positive=["text", 0])
    graph["guider"] = node(
        "LanceGuider", model=["loader", 0], positive=["text", 0], negative=["text", 1], **guidance
    )
    graph["select"] = node("KSamplerSelect", sampler_name="euler")
    graph["sigmas"] = node("LanceScheduler", steps=case["steps"], shift=case["shift"], denoise=1.0)
    graph["sampler"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["select", 0],
        sigmas=["sigmas", 0],
        latent_image=latent_link(graph),
    )
    return graph


def question(name: str, **changes: Any) -> Graph:
    """A golden question; the answer is "answer"."""
    case = MANIFEST[name]
    graph: Graph = {"loader": node("LanceLoader", checkpoint=case["checkpoint"], weight_dtype="default")}
    media(graph, case, "question")
    system, asked = text(case)[0], text(case)[1]
    inputs = {"lance": ["loader", 1], "vision": ["vision", 0], "question": asked, "system_prompt": system}
    inputs |= {"max_new_tokens": case["max_length"], "temperature": 0.0, "top_p": 1.0, "seed": 0}
    graph["answer"] = node("LanceUnderstand", **{**inputs, **changes})
    return graph
