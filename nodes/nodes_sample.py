"""Nodes that sample: all in one, or as SIGMAS, GUIDER and NOISE for SamplerCustomAdvanced."""

from __future__ import annotations

import comfy.samplers
import latent_preview
from comfy_api.latest import io

from ..lance_core.model.sampler import RENORMS, Guidance
from . import sampling
from .sockets import CATEGORY, checked
from .widgets import seed_input

SAME = "The same seed and settings give the same result."


def _schedule_inputs() -> list:
    return [
        io.Int.Input(
            "steps",
            default=30,
            min=1,
            max=1000,
            tooltip="Denoising steps. 30 as released; dpmpp_2m comes near with 12.",
        ),
        io.Float.Input(
            "shift",
            default=3.5,
            min=0.01,
            max=100.0,
            step=0.1,
            tooltip="How much of the schedule is spent on noise. 3.5 as released.",
        ),
    ]


def _guidance_inputs() -> list:
    return [
        io.Float.Input(
            "cfg",
            default=4.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance scale. 4 as released; 1 turns it off and halves the time.",
        ),
        io.Float.Input(
            "cfg_start",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Guidance applies from this time (1 is pure noise) …",
        ),
        io.Float.Input(
            "cfg_end",
            default=0.4,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="… down to this one, itself left out. 1 to 0.4 as released.",
        ),
        io.Combo.Input(
            "renorm",
            options=list(RENORMS),
            default="global",
            tooltip="Scales the guided velocity back to the size it had, over the whole (global) or per "
            "token (channel). global as released.",
        ),
        io.Float.Input(
            "renorm_min",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="It is never scaled below this. 0 as released.",
        ),
    ]


def _vision_input() -> io.Float.Input:
    return io.Float.Input(
        "cfg_vision",
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.1,
        optional=True,
        tooltip="Guidance on what is shown, for edits and subjects: above 1 keeps closer to it. 1 "
        "turns it off; "
        "else each guided step takes half as long again.",
    )


def _denoise() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="Below 1 starts from the latent's own picture, changing it only in part.",
    )


def _guidance(
    cfg: float, cfg_start: float, cfg_end: float, renorm: str, renorm_min: float, cfg_vision: float = 1.0
) -> Guidance:
    return Guidance(cfg, (cfg_end, cfg_start), renorm, renorm_min, cfg_vision)


class LanceSampler(io.ComfyNode):
    """Everything the released sampler does, with ComfyUI's samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceSampler",
            display_name="Lance Sampler",
            category=CATEGORY,
            description="Makes the picture or video. With euler and the defaults, the same numbers as the "
            "released code.",
            inputs=[
                io.Model.Input("model", tooltip="From Lance Loader, LoRAs and patches applied."),
                io.Conditioning.Input("positive", tooltip="From Lance Text Encode."),
                io.Conditioning.Input("negative", tooltip="From Lance Text Encode."),
                io.Latent.Input(
                    "latent",
                    tooltip="The size: Empty Lance Latent, Lance Image To Video Latent, or Lance Vision "
                    "Encode for edits.",
                ),
                seed_input(42, SAME),
                *_schedule_inputs(),
                *_guidance_inputs(),
                io.Combo.Input(
                    "sampler",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="euler is the released one.",
                ),
                _denoise(),
                _vision_input(),
            ],
            outputs=[io.Latent.Output("samples", display_name="samples", tooltip="For Lance VAE Decode.")],
        )

    @classmethod
    def validate_inputs(cls, cfg_start: float = 1.0, cfg_end: float = 0.0) -> bool | str:
        if cfg_start is not None and cfg_end is not None and cfg_end > cfg_start:
            return f"cfg_end {cfg_end} is above cfg_start {cfg_start}: time runs from 1 down to 0."
        return True

    @classmethod
    @checked
    def execute(
        cls,
        model,
        positive,
        negative,
        latent,
        seed,
        steps,
        shift,
        cfg,
        cfg_start,
        cfg_end,
        renorm,
        renorm_min,
        sampler,
        denoise,
        cfg_vision=1.0,
    ) -> io.NodeOutput:
        guidance = _guidance(cfg, cfg_start, cfg_end, renorm, renorm_min, cfg_vision)
        guider = sampling.IntervalGuider(model, guidance)
        guider.set_conds(positive, negative)
        noise = sampling.SeededNoise(seed, sampling.reference_tokens(positive))
        times = sampling.sigmas(steps, shift, denoise)
        callback = latent_preview.prepare_callback(model, len(times) - 1)
        return io.NodeOutput(sampling.sample(guider, noise, sampler, times, latent, callback))


class LanceScheduler(io.ComfyNode):
    """SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceScheduler",
            display_name="Lance Scheduler",
            category=CATEGORY,
            description="Lance's exact time schedule, for SamplerCustomAdvanced.",
            inputs=[*_schedule_inputs(), _denoise()],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas")],
        )

    @classmethod
    @checked
    def execute(cls, steps: int, shift: float, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(sampling.sigmas(steps, shift, denoise))


class LanceGuider(io.ComfyNode):
    """GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceGuider",
            display_name="Lance Guider",
            category=CATEGORY,
            description="Lance's guidance (interval and renormalisation), for SamplerCustomAdvanced.",
            inputs=[
                io.Model.Input("model", tooltip="From Lance Loader, LoRAs and patches applied."),
                io.Conditioning.Input("positive", tooltip="From Lance Text Encode."),
                io.Conditioning.Input("negative", tooltip="From Lance Text Encode."),
                *_guidance_inputs(),
                _vision_input(),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider")],
        )

    @classmethod
    @checked
    def execute(
        cls, model, positive, negative, cfg, cfg_start, cfg_end, renorm, renorm_min, cfg_vision=1.0
    ) -> io.NodeOutput:
        guidance = _guidance(cfg, cfg_start, cfg_end, renorm, renorm_min, cfg_vision)
        guider = sampling.IntervalGuider(model, guidance)
        guider.set_conds(positive, negative)
        return io.NodeOutput(guider)


class LanceNoise(io.ComfyNode):
    """NOISE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LanceNoise",
            display_name="Lance Noise",
            category=CATEGORY,
            description="Lance's own noise, for SamplerCustomAdvanced: the same seed then gives the same "
            "result as Lance Sampler.",
            inputs=[
                seed_input(42, SAME),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Needed to match edits and subjects: their references take noise, too.",
                ),
            ],
            outputs=[io.Noise.Output("noise", display_name="noise")],
        )

    @classmethod
    @checked
    def execute(cls, seed: int, positive=None) -> io.NodeOutput:
        return io.NodeOutput(sampling.SeededNoise(seed, sampling.reference_tokens(positive)))
