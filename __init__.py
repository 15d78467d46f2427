"""ComfyUI-Lance: ByteDance's Lance as native ComfyUI nodes. ComfyUI imports this file; `lance_core` works without it."""

WEB_DIRECTORY = "./web"

try:
    import comfy_api.latest  # noqa: F401
except ImportError as _error:
    if _error.name and _error.name.split(".")[0] == "comfy_api":
        _in_comfy = False  # imported by a test runner or a tool, not by ComfyUI
        try:
            import comfy  # noqa: F401

            raise ImportError("ComfyUI-Lance needs ComfyUI 0.3.60 or newer: update ComfyUI.") from None
        except ModuleNotFoundError:
            pass
    else:
        raise
else:
    try:
        from .nodes import LanceExtension
    except ModuleNotFoundError as _error:
        raise ImportError(
            f"ComfyUI-Lance lacks the Python package {_error.name!r}: run `pip install -r requirements.txt` in its folder with ComfyUI's Python."
        ) from None

    async def comfy_entrypoint() -> LanceExtension:
        """What ComfyUI calls for the nodes."""
        return LanceExtension()
