"""A clip for the video workflows to start with. ComfyUI ships a picture for Load Image and nothing for Load
Video, whose files must be in its input folder.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import folder_paths

CLIP = Path(__file__).absolute().parents[1] / "workflows" / "lance_example.mp4"


def offer() -> None:
    """Put the clip into ComfyUI's input folder, unless something of its name is there."""
    there = Path(folder_paths.get_input_directory()) / CLIP.name
    if there.exists():
        return
    partial = there.with_name(f".{CLIP.name}.part")
    try:
        shutil.copyfile(CLIP, partial)
        partial.replace(there)
    except OSError as error:  # a folder that cannot be written: the workflows then ask for a clip
        logging.warning(f"Lance's example clip was not put into {there.parent}: {error}")
