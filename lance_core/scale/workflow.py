"""A ComfyUI workflow in API form, filled with a row: its prompt, its options, its pictures.

A value goes to every input of that name that the workflow has as a value (not as a link), whatever the node.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files import read_bytes
from .rows import Row

Workflow = dict[str, dict[str, Any]]

MAX_WORKFLOW = 64 << 20  # bytes
SHIPPED = Path(__file__).resolve().parents[2] / "workflows" / "api"
NAMES = {
    "t2i": "lance_text_to_image",
    "t2v": "lance_text_to_video",
    "i2v": "lance_image_to_video",
    "image_edit": "lance_image_edit",
    "video_edit": "lance_video_edit",
    "subject_image": "lance_subject_to_image",
    "subject_video": "lance_subject_to_video",
    "x2t_image": "lance_image_question",
    "x2t_video": "lance_video_question",
}
# Our option -> names that inputs of nodes have for it
INPUTS = {
    "prompt": ("prompt", "question"),
    "checkpoint": ("checkpoint",),
    "seed": ("seed", "noise_seed"),
    "num_frames": ("frames",),
    **{
        name: (name,)
        for name in (
            *("width", "height", "resolution", "steps", "shift", "cfg", "renorm", "renorm_min"),
            *("negative_prompt", "system_prompt", "batch_size", "max_new_tokens", "temperature", "top_p"),
        )
    },
}
LOADERS = {"LoadImage": "image", "LoadVideo": "file"}  # node -> its input


def read_workflow(path: str | Path | None, task: str) -> Workflow:
    """A workflow from a file in API form; without one, the pack's own for a task.

    Raises:
        RequestError: it cannot be read, or is no workflow in API form.
    """
    if path is None:
        path = SHIPPED / f"{NAMES[task]}.json"
        if not path.is_file():
            raise RequestError(f"the pack's workflow for {task} is not installed here; give one: --workflow")
    try:
        graph = json.loads(read_bytes(path, MAX_WORKFLOW))
    except (OSError, ValueError, RecursionError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"{str(path)[-200:]} cannot be read as JSON ({told[:150]})") from None
    nodes = graph.values() if isinstance(graph, dict) else []
    if not nodes or not all(isinstance(n, dict) and isinstance(n.get("inputs"), dict) for n in nodes):
        raise RequestError(
            f"{str(path)[-200:]} is no workflow in API form; save it in ComfyUI with Export (API)"
        )
    return graph


def filled(workflow: Workflow, row: Row, media: Sequence[str], prefix: str) -> Workflow:
    """The workflow with a row in it.

    Args:
        media: the row's pictures or clip, as the server names its input files.
        prefix: what the server's output files are called.

    Raises:
        RequestError: the workflow has no place for something that the row says.
    """
    graph = copy.deepcopy(workflow)
    values: dict[str, Any] = {"prompt": row.prompt, **row.options}
    if row.checkpoint is not None:
        values["checkpoint"] = Path(row.checkpoint).name
    if "cfg_interval" in values:
        low, high = values.pop("cfg_interval")
        _put(graph, ("cfg_start",), high, "cfg_interval")
        _put(graph, ("cfg_end",), low, "cfg_interval")
    for name, value in values.items():
        _put(graph, INPUTS[name], value, name)
    if "width" in values:
        _set(graph, ("size",), "custom")
    _set(graph, ("filename_prefix",), prefix)
    _load(graph, row, media)
    return graph


def seed_of(graph: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The seed that a workflow has."""
    for node in graph.values():
        for name in INPUTS["seed"]:
            if isinstance(node["inputs"].get(name), int):
                return node["inputs"][name]
    return None


def _put(graph: Workflow, names: Sequence[str], value: Any, option: str) -> None:
    if not _set(graph, names, value):
        raise RequestError(
            f"the workflow has no input for {option}: none of its nodes has {' or '.join(names)}"
        )


def _set(graph: Workflow, names: Sequence[str], value: Any) -> int:
    """Set inputs of these names, except those that are links; returns how many."""
    count = 0
    for node in graph.values():
        for name in names:
            if name in node["inputs"] and not isinstance(node["inputs"][name], list):
                node["inputs"][name] = value
                count += 1
    return count


def _load(graph: Workflow, row: Row, media: Sequence[str]) -> None:
    """Give the row's media to the nodes that load some, in their order."""
    if not media:
        return
    kind = "LoadVideo" if row.kind.takes == "video" else "LoadImage"
    nodes = [node for _, node in sorted(graph.items(), key=_order) if node.get("class_type") == kind]
    if len(nodes) != len(media):
        raise RequestError(
            f"the row has {len(media)} of {row.kind.takes} and the workflow {len(nodes)} {kind} nodes; give "
            "one with as many: --workflow"
        )
    for node, name in zip(nodes, media, strict=True):
        node["inputs"][LOADERS[kind]] = name


def _order(item: tuple[str, Any]) -> tuple[bool, int, str]:
    key = item[0]
    return (not key.isdecimal(), int(key) if key.isdecimal() else 0, key)
