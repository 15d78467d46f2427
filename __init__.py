"""ComfyUI-Lance: ByteDance's Lance as native ComfyUI nodes. ComfyUI imports this file; `lance_core` works
without it.
"""

import sys

WEB_DIRECTORY = "./web"

if "folder_paths" in sys.modules:  # inside ComfyUI, and not a test runner or a tool that imports folders
    try:
        from .nodes import LanceExtension
    except ModuleNotFoundError as _error:
        if (_error.name or "").split(".")[0] in ("comfy", "comfy_api"):
            _why = f"it needs ComfyUI 0.3.60 or newer, this one has no {_error.name}: update ComfyUI"
        else:
            _why = (
                f"the Python package {_error.name!r} is missing: run `pip install -r requirements.txt` "
                "in its folder with ComfyUI's Python"
            )
        raise ImportError(f"ComfyUI-Lance was not loaded: {_why}.") from None

    async def comfy_entrypoint() -> LanceExtension:
        """What ComfyUI calls for the nodes."""
        return LanceExtension()
