"""Lance as a native MODEL: a BaseModel over the generation expert in the Wan2.2 latent format, with the
understanding expert beside it as an additional model. Thin: the mathematics is lance_core's.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.patcher_extension as px
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ..lance_core.checkpoint.quantize import Format, swap
from ..lance_core.config import LATENT_CHANNELS, RELEASED_SAMPLING, LLMConfig
from ..lance_core.model.dual_expert import DualExpert, Generation
from ..lance_core.model.joined import joined_rows
from ..lance_core.model.memory import DenoisingMemory
from ..lance_core.model.sequence import MARKERS
from . import comfy_compat, devices, patcher, quant
from .conditioning import prompt_of
from .contexts import CleanCond, CleanPart, ContextShape, Place, Rows, RowsCond, Store
from .last_call import LastCall
from .latents import check_latent
from .layer_patches import LayerPatches, PatchedLayers
from .patcher import NO_WEIGHT, UND, UND_PREFIX, ExpertRouting, Places
from .windows import Window


class LanceFamily(comfy.supported_models_base.BASE):
    """What ComfyUI wants to know of a model family."""

    unet_extra_config: dict[str, Any] = {}
    latent_format = comfy.latent_formats.Wan22
    sampling_settings = {"shift": RELEASED_SAMPLING.shift}
    supported_inference_dtypes = comfy_compat.FLOAT_DTYPES


class Denoiser(Generation):
    """The generation expert with the forward ComfyUI's samplers, caches and compilers expect."""

    in_channels = LATENT_CHANNELS  # where guidance nodes (RenormCFG) look for it

    def __init__(
        self,
        llm: LLMConfig,
        apart: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = None,
    ) -> None:
        super().__init__(llm, operations, device=device, dtype=dtype, apart=apart)
        self.dtype = dtype

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = transformer_options if transformer_options is not None else {}
        wrappers = px.get_all_wrappers(px.WrappersMP.DIFFUSION_MODEL, options)
        if wrappers:
            x = x.clone()  # EasyCache keeps and changes what it is given
        run = px.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return run.execute(x, timestep, context, options, **kwargs)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Any = None,
        transformer_options: dict | None = None,
        *,
        lance: Rows,
        **kwargs: Any,
    ) -> Tensor:
        """x: [b, 48, t, h, w]; timestep: [b] or, with clean frames, [b, t], in 0..1000. Returns the velocity,
        shaped like x.
        """
        t = timestep / 1000
        if t.ndim == 1:
            t = t[:, None].expand(-1, x.shape[2])
        options = transformer_options if transformer_options is not None else {}
        layers = len(self.layers)
        patches = LayerPatches.of(options, layers)
        velocity = lance.model.velocity(
            lance.per_row(x.shape[0]),
            x.permute(0, 2, 3, 4, 1),
            t,
            attention=partial(comfy_compat.attention, options=options),
            hooks=PatchedLayers(patches, options, x, t, layers) if patches.active else None,
        )
        return velocity.permute(0, 4, 1, 2, 3)


class LanceModel(comfy.model_base.BaseModel):
    """The MODEL. `current_patcher` (set by the sampler) leads to the understanding expert."""

    def __init__(
        self, config: LanceFamily, llm: LLMConfig, understanding: torch.nn.Module, formats: dict[str, Format]
    ) -> None:
        super().__init__(
            config, comfy.model_base.ModelType.FLOW, device=torch.device("meta"), unet_model=Denoiser
        )
        swap(self.diffusion_model, formats, quant.make)
        self.llm = llm
        joined = joined_rows(understanding)
        self.understanding_names = [f"{UND_PREFIX}{name}" for name in (*understanding.state_dict(), *joined)]
        self.places = Places(joined_rows(self.diffusion_model), joined)
        self.store = Store()
        self.last_call, self.warned = LastCall(), False

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.manual_cast_dtype or self.get_dtype()

    @property
    def understanding(self) -> Any:
        """The understanding expert's patcher."""
        return self.current_patcher.get_additional_models_with_key(UND)[0]

    def experts(self, device: torch.device, options: dict[str, Any]) -> DualExpert:
        """Both experts as lance_core runs them, for a call's `transformer_options`."""
        return DualExpert(
            self.llm,
            self.understanding.model,
            comfy_compat.uncompiled(self.diffusion_model),  # type: ignore[arg-type]
            attention=partial(comfy_compat.attention, options=options),
            dtype=self.compute_dtype,
            device=device,
        )

    # -- conditioning ----------------------------------------------------------------------------------------

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Called once a conditioning and sampling run, weights loaded."""
        # The stock EasyCache of older hosts mistakes a guidance batch for one prediction.
        easy = comfy_compat.has_wrapper(self.current_patcher, px.WrappersMP.DIFFUSION_MODEL, "easycache")
        out: dict[str, Any] = {"lance": RowsCond.of(self.store, prompt_of(kwargs), joinable=not easy)}
        mask = kwargs.get("denoise_mask")
        if mask is not None:
            clean = clean_frames(mask)
            if bool(clean.any()):
                out["lance_clean"] = CleanCond([CleanPart(clean, kwargs["latent_image"])])
        return out

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        return {"lance": ContextShape(prompt_of(kwargs).encoded)}

    def process_timestep(
        self, timestep: Tensor, x: Tensor | None = None, lance_clean: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Frames that are kept clean are at timestep 0: [b] -> [b, t] where there are any."""
        return timestep if lance_clean is None else timestep[:, None] * (1 - lance_clean.to(timestep))

    def resize_cond_for_context_window(
        self, key: str, value: Any, *args: Any, retain_index_list: Any = (), **kwargs: Any
    ) -> Any:
        """Newer ComfyUIs ask how a condition is cut for a window; `_apply_model` cuts for all of them."""
        if isinstance(value, CleanCond) and 0 in retain_index_list:
            return value.retaining()
        return value if isinstance(value, CleanCond | RowsCond) else None

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = transformer_options if transformer_options is not None else {}
        window = Window.of(options)
        place = Place((x.shape[2], x.shape[3], x.shape[4]), window, comfy_compat.grid_scale(options))
        weights = self._weights()
        patches = LayerPatches.of(options, self.llm.num_layers)
        call = self.last_call.of(options, x, t, place, (weights, patches.effect))
        if patches.unused:
            self._warn(patches)
            known = self.last_call.known(call)
            if known is not None:
                return known
        # Contexts are computed here, outside of what may be compiled or cached.
        kwargs["lance"] = kwargs["lance"].rows(self.experts(x.device, options), self, place, weights)
        out = self._denoised(x, t, window, control=control, transformer_options=options, **kwargs)
        self.last_call.keep(call, out)
        return out

    def _denoised(
        self, x: Tensor, t: Tensor, window: Window | None, lance_clean: CleanCond | None = None, **kwargs: Any
    ) -> Tensor:
        if lance_clean is None:
            return super()._apply_model(x, t, **kwargs)
        clean, latent = lance_clean.at(x, window)
        shown = torch.where(clean[:, None, :, None, None], latent, x)
        # Guidance takes the velocity to be (x - denoised) / sigma, and its norm is over all frames, clean
        # ones included.
        return super()._apply_model(shown, t, lance_clean=clean.to(x.dtype), **kwargs) + (x - shown)

    def _warn(self, patches: LayerPatches) -> None:
        """Once a sampling run."""
        if not self.warned:
            self.warned = True
            logging.warning(
                "Lance has no layers for what a node has put on the model, so it does nothing: "
                f"{patches.unused_text()}. Such nodes are made for UNets or for models of other layers."
            )

    def forget_calls(self) -> None:
        """Sampling is over."""
        self.last_call, self.warned = LastCall(), False

    def _weights(self) -> Any:
        """Changes when the weights' patches do; conditioning hooks change them from call to call."""
        main = self.current_patcher
        return main.patches_uuid, self.understanding.patches_uuid, comfy_compat.hook_strengths(main)

    def process_latent_in(self, latent: Tensor) -> Tensor:
        check_latent(latent)
        return super().process_latent_in(latent)

    # -- memory ----------------------------------------------------------------------------------------------

    def memory_required(
        self, input_shape: list[int], cond_shapes: dict[str, Any] | None = None, **kwargs: Any
    ) -> float:
        """Bytes one forward of input_shape [b, 48, t, h, w] needs beyond the weights: keys, values and
        activations.
        """
        tokens = math.prod(input_shape[2:]) + MARKERS
        # Positive and negative of one encode share a context.
        contexts = {id(getattr(s, "encoded", s)): int(s[-1]) for s in (cond_shapes or {}).get("lance", [])}
        memory = DenoisingMemory.of(self.llm, self.compute_dtype.itemsize)
        return float(memory.step(input_shape[0], tokens, contexts.values()))

    # -- names LoRAs know ------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """This expert's weights; and, asked without arguments as LoRA loaders do, the names of the other's
        and of projections that are joined, so that LoRAs on them are recognised (`patcher.ExpertRouting`
        sends each where it belongs).
        """
        state = super().state_dict(*args, **kwargs)
        if not args and not kwargs:
            for name in (*self.understanding_names, *self.places):
                state.setdefault(name, NO_WEIGHT)
        return state


def clean_frames(mask: Tensor) -> Tensor:
    """Denoise mask [b, c, t, h, w] -> bool [b, t]: frames nothing of which is to be denoised."""
    return mask.amax(dim=(1, 3, 4)) == 0


def forget_calls(patcher: Any, *args: Any) -> None:
    """ON_CLEANUP callback: sampling is over, and its tensors are let go."""
    patcher.model.forget_calls()


def restore_clean(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Any = None,
    *args: Any,
    **kwargs: Any,
):
    """OUTER_SAMPLE wrapper: what the mask keeps comes out bit for bit, whichever sampler ran."""
    out = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    if denoise_mask is None:
        return out
    mask = comfy.utils.reshape_mask(denoise_mask, noise.shape)  # as the sampler does it
    return torch.where(mask.to(out.device) == 0, latent_image.to(out), out)


def build(
    llm: LLMConfig,
    stored: torch.dtype,
    compute: torch.dtype,
    understanding: Any,
    disable_dynamic: bool = False,
    formats: dict[str, Format] | None = None,
) -> Any:
    """A MODEL patcher without weights; give it some with `patcher.fill`.

    understanding: the patcher of the understanding expert. formats: layers that are kept quantised.
    """
    config = LanceFamily({"llm": llm, "apart": tuple(formats or ())})
    config.set_inference_dtype(stored, None if stored == compute else compute)
    config.custom_operations = comfy_compat.operations(stored, compute)
    model = LanceModel(config, llm, understanding.model, formats or {})
    model.device = mm.unet_offload_device()
    main = patcher.make_patcher(model, ExpertRouting, disable_dynamic=disable_dynamic)
    main.set_additional_models(UND, [understanding])
    main.add_wrapper_with_key(px.WrappersMP.OUTER_SAMPLE, "lance_restore", restore_clean)
    main.add_callback_with_key(px.CallbacksMP.ON_CLEANUP, "lance_calls", forget_calls)
    main.add_wrapper_with_key(px.WrappersMP.PREPARE_SAMPLING, "lance_devices", devices.follow(UND))
    main.add_wrapper_with_key(px.WrappersMP.PREPARE_SAMPLING, "lance_placement", patcher.main_first)
    return main
