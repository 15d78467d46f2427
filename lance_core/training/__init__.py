"""Training: LoRAs and whole checkpoints, on the losses of the released fine-tuning code.

`train` is the whole of it, from a folder of pictures to a LoRA file; `loss` is one batch's loss on explicit
samples, noise and times. docs/training.md describes both.
"""

from .objective import Loss, drawn_time, loss
from .passes import Experts
from .run import train
from .sample import Sample, answer_sample, generation_sample, system_prompt

__all__ = [
    "Experts",
    "Loss",
    "Sample",
    "answer_sample",
    "drawn_time",
    "generation_sample",
    "loss",
    "system_prompt",
    "train",
]
