"""The ComfyUI half of the pack: the only place that imports ComfyUI. Thin; the model is lance_core's."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import checkpoints, example_clip, loras
from .nodes_dialogue import LanceEnhancePrompt, LanceScore
from .nodes_latent import EmptyLanceLatent, LanceImageToVideoLatent, LanceVAEDecode
from .nodes_longer import LanceExtendVideo, LanceKeyframes
from .nodes_model import LanceLoader, LanceTextEncode, LanceVisionEncode
from .nodes_sample import LanceGuider, LanceNoise, LanceSampler, LanceScheduler
from .nodes_save import LanceSaveCheckpoint
from .nodes_text import LanceUnderstand

NODES = [
    LanceLoader,
    LanceVisionEncode,
    LanceTextEncode,
    EmptyLanceLatent,
    LanceImageToVideoLatent,
    LanceSampler,
    LanceScheduler,
    LanceGuider,
    LanceNoise,
    LanceVAEDecode,
    LanceUnderstand,
    LanceSaveCheckpoint,
    LanceScore,
    LanceEnhancePrompt,
    LanceKeyframes,
    LanceExtendVideo,
]


class LanceExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


checkpoints.register_folder()
loras.install()
example_clip.offer()
