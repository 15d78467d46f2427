"""The golden cases by name, and each one's request as `generate` and `understand` take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lance_core.inputs import tasks

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "cases" / "manifest.json").read_text(encoding="utf-8"))
ANSWERED = [name for name, case in MANIFEST.items() if case["task"].startswith("x2t")]
DRAWN = [name for name in MANIFEST if name not in ANSWERED]
RELEASED_NAMES = {"idip_image": "subject_image", "idip_video": "subject_video"}


def request_of(case: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """A manifest entry -> (task, text, media and options as `generate` or `understand` take them)."""
    task = tasks.TASKS[RELEASED_NAMES.get(case["task"], case["task"])]
    items = case["request"]["interleave_array"] if isinstance(case["request"], dict) else [case["request"]]
    files = [
        str(GOLDEN / "cases" / item) for item in items if isinstance(item, str) and item.startswith("inputs/")
    ]
    text = next(item for item in items if not (isinstance(item, str) and item.startswith("inputs/")))
    options: dict[str, Any] = {"resolution": case["resolution"]}
    if task.takes:
        options[task.takes] = files if task.takes == "references" else files[0]
    if task.output == "text":
        return task.name, text[1], options | {"system_prompt": text[0]}
    if task.name == "subject_video":  # recorded with the image task's instruction
        options["system_prompt"] = case["rendered"].split("system\n")[1].split("<|im_end|>")[0]
    options |= {
        "cfg_interval": case["interval"],
        "num_frames": case["num_frames"] if task.output == "video" else None,
    }
    options |= {
        key: case[key] for key in ("width", "height", "steps", "shift", "cfg", "renorm", "renorm_min", "seed")
    }
    return task.name, text, options
