"""Files to modules and back: opening, loading, quantising and converting checkpoints."""

from ..model.joined import named_weights
from .checkpoint import Checkpoint, Part, part_of, released_name

__all__ = ["Checkpoint", "Part", "named_weights", "part_of", "released_name"]
