"""Lance in pure PyTorch: images and videos understood, generated and edited by one model.

    import lance_core
    lance = lance_core.load("models/lance/Lance_3B", device="cuda")
    lance.generate("t2i", "a red fox in the snow").frames

A library: it never prints, exits, or touches global random state, and knows nothing of ComfyUI.
"""

from .errors import CheckpointError, LanceError, MediaError, NumericsError, RequestError
from .pipeline import Answer, Generated, Lance, load

__version__ = "0.1.0"

__all__ = ["Answer", "CheckpointError", "Generated", "Lance", "LanceError", "MediaError", "NumericsError", "RequestError", "load"]
