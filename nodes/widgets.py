"""Widgets that several nodes have: a seed, a temperature, which part of a clip a question sees."""

from __future__ import annotations

from comfy_api.latest import io

from ..lance_core.inputs.seen import MAX_SEEN_FRAMES

MAX_SEED = 0xFFFFFFFFFFFFFFFF


def seed_input(default: int, tooltip: str) -> io.Int.Input:
    """A seed with ComfyUI's "control after generate"."""
    return io.Int.Input(
        "seed", default=default, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip
    )


def temperature_input(default: float, tooltip: str) -> io.Float.Input:
    """How freely words are drawn."""
    return io.Float.Input("temperature", default=default, min=0.0, max=5.0, step=0.05, tooltip=tooltip)


def range_inputs() -> list:
    """Which part of a clip a question sees."""
    seconds = {"default": 0.0, "min": 0.0, "max": 100_000.0, "step": 0.1, "optional": True}
    return [
        io.Float.Input(
            "clip_fps",
            default=0.0,
            min=0.0,
            max=60.0,
            step=0.5,
            optional=True,
            tooltip="Question: frames a second of a clip that are seen. 0: 12, up to 6 seconds' worth "
            "over all of it, as in training.",
        ),
        io.Float.Input("clip_start", **seconds, tooltip="Question: where in a clip to begin, in seconds."),
        io.Float.Input(
            "clip_length", **seconds, tooltip="Question: how much of it, in seconds. 0: the rest."
        ),
        io.Int.Input(
            "clip_frames",
            default=0,
            min=0,
            max=MAX_SEEN_FRAMES,
            optional=True,
            tooltip="Question: how many frames are seen, instead of clip_fps; lowered to 4k+1. 0: by rate.",
        ),
    ]
