"""Fixtures of the tests that run inside ComfyUI's own Python. Started by ../test_inproc.py, which says where
things are.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "scripts")]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The --base-directory: models/, input/, output/ and so on lie below it."""
    import comfyui as comfyui_script

    golden = HERE.parents[1] / "golden"
    laid = comfyui_script.lay_out(tmp_path_factory.mktemp("comfyui"), models={"lance": golden / "checkpoint"})
    for source in (golden / "cases" / "inputs").iterdir():
        shutil.copy(source, laid / "input")
    return laid


@pytest.fixture(scope="session")
def comfy(base: Path):
    """ComfyUI with the pack loaded (inprocess.InProcessComfy)."""
    import comfyui as comfyui_script
    from inprocess import InProcessComfy

    return InProcessComfy(Path(os.environ["LANCE_INPROC_COMFYUI"]), comfyui_script.arguments(base))
