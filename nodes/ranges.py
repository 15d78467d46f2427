"""The widgets that say which part of a clip a question sees."""

from __future__ import annotations

from comfy_api.latest import io

from ..lance_core.inputs.seen import MAX_SEEN_FRAMES


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
