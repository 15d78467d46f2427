"""Files to modules and back: opening, loading, quantising and converting checkpoints."""

from .checkpoint import Checkpoint, Part, named_weights, part_of, released_name

__all__ = ["Checkpoint", "Part", "named_weights", "part_of", "released_name"]
