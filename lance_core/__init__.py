"""Lance in pure PyTorch: images and videos understood, generated and edited by one model.

    import lance_core
    lance = lance_core.load("models/lance/Lance_3B", device="cuda")
    lance.generate("t2i", "a red fox in the snow").frames

A library: it never prints, exits, or touches global random state, and knows nothing of ComfyUI. What needs
torch is imported when it is first used, so that `python -m lance_core --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, LanceError, MediaError, NumericsError, RequestError

if TYPE_CHECKING:
    from .hub.download import DownloadError
    from .inputs import media
    from .pipeline import Answer, Generated, Lance, Windows, load

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CheckpointError",
    "DownloadError",
    "Generated",
    "Lance",
    "LanceError",
    "MediaError",
    "NumericsError",
    "RequestError",
    "Windows",
    "load",
    "media",
]

_LAZY = {name: ".pipeline" for name in ("Answer", "Generated", "Lance", "Windows", "load")} | {
    "media": ".inputs.media",
    "DownloadError": ".hub.download",
}


def __getattr__(name: str) -> Any:
    """What is imported on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name], __name__)
    value = module if name == "media" else getattr(module, name)
    globals()[name] = value
    return value
