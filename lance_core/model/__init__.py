"""The decoder with its two experts, the vision tower, and the sampler: all of the model's arithmetic but the
VAE's.
"""

from .compiling import compile_layers
from .decoder import ExpertLayer, run_layers
from .dual_expert import DualExpert, Generation, Plan, Prepared, Row, Understanding
from .sampler import Guidance, euler, schedule, seeded_noise
from .sequence import Branch, Kind, Role, Segment, Sequence, TargetSegment, TextSegment, VisualSegment
from .vit import VisionTower

__all__ = [
    "Branch",
    "DualExpert",
    "ExpertLayer",
    "Generation",
    "Guidance",
    "Kind",
    "Plan",
    "Prepared",
    "Role",
    "Row",
    "Segment",
    "Sequence",
    "TargetSegment",
    "TextSegment",
    "Understanding",
    "VisionTower",
    "VisualSegment",
    "compile_layers",
    "euler",
    "run_layers",
    "schedule",
    "seeded_noise",
]
