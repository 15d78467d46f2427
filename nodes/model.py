"""Lance as a native MODEL: a BaseModel over the generation expert in the Wan2.2 latent format, with the
understanding expert beside it as an additional model. Thin: the mathematics is lance_core's.
"""

from __future__ import annotations

import math
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.patcher_extension as px
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ..lance_core.checkpoint.quantize import Format, swap
from ..lance_core.config import LLMConfig
from ..lance_core.model.decoder import FEED_CHUNK
from ..lance_core.model.dual_expert import DualExpert, Generation
from ..lance_core.model.joined import joined_rows
from . import host, quant
from .conditioning import ContextShape, Rows, RowsCond, Store, prompt_of
from .vision import check_latent

UND = "lance_und"
UND_PREFIX = "diffusion_model.understanding."  # how LoRAs name the other expert's layers


class LanceConfig(comfy.supported_models_base.BASE):
    """What ComfyUI wants to know of a model family."""

    unet_extra_config = {}
    latent_format = comfy.latent_formats.Wan22
    sampling_settings = {"shift": 3.5}
    supported_inference_dtypes = host.FLOAT_DTYPES


class Denoiser(Generation):
    """The generation expert with the forward ComfyUI's samplers, caches and compilers expect."""

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
        velocity = lance.model.velocity(lance.per_row(x.shape[0]), x.permute(0, 2, 3, 4, 1), t)
        return velocity.permute(0, 4, 1, 2, 3)


class LanceModel(comfy.model_base.BaseModel):
    """The MODEL. `current_patcher` (set by the sampler) leads to the understanding expert."""

    def __init__(
        self, config: LanceConfig, llm: LLMConfig, understanding: torch.nn.Module, formats: dict[str, Format]
    ) -> None:
        super().__init__(
            config, comfy.model_base.ModelType.FLOW, device=torch.device("meta"), unet_model=Denoiser
        )
        swap(self.diffusion_model, formats, quant.make)
        self.llm = llm
        parts = joined_rows(understanding)
        self.understanding_names = [f"{UND_PREFIX}{name}" for name in (*understanding.state_dict(), *parts)]
        self.homes = {
            f"{UND_PREFIX}{name}": (UND_PREFIX + whole, rows) for name, (whole, rows, _) in parts.items()
        }
        own = joined_rows(self.diffusion_model)
        self.homes |= {
            f"diffusion_model.{name}": (f"diffusion_model.{whole}", rows)
            for name, (whole, rows, _) in own.items()
        }
        self.store = Store()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.manual_cast_dtype or self.get_dtype()

    @property
    def understanding(self) -> Any:
        """The understanding expert's patcher."""
        return self.current_patcher.get_additional_models_with_key(UND)[0]

    def experts(self, device: torch.device) -> DualExpert:
        """Both experts as lance_core runs them."""
        return DualExpert(
            self.llm,
            self.understanding.model,
            self.diffusion_model,
            attention=host.attention,
            dtype=self.compute_dtype,
            device=device,
        )

    # -- conditioning ----------------------------------------------------------------------------------------

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Called once a conditioning and sampling run, weights loaded: which context its rows run against."""
        noise, patcher = kwargs["noise"], self.current_patcher
        # What decides the weights a context is computed with; conditioning hooks change them from one
        # conditioning to the next.
        weights = (patcher.patches_uuid, self.understanding.patches_uuid, kwargs.get("hooks"))
        # The stock EasyCache of older hosts mistakes a guidance batch for one prediction.
        joinable = not host.has_wrapper(patcher, px.WrappersMP.DIFFUSION_MODEL, "easycache")
        experts, grid = self.experts(kwargs["device"]), tuple(noise.shape[2:])
        out = {"lance": RowsCond.of(experts, self.store, prompt_of(kwargs), grid, weights, joinable)}
        mask = kwargs.get("denoise_mask")
        if mask is not None:
            clean = clean_frames(mask)
            if bool(clean.any()):
                out["lance_clean"] = comfy.conds.CONDRegular(clean.to(noise.dtype))
                out["lance_latent"] = comfy.conds.CONDNoiseShape(kwargs["latent_image"])
        return out

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        return {"lance": ContextShape(prompt_of(kwargs).request)}

    def process_timestep(
        self, timestep: Tensor, x: Tensor | None = None, lance_clean: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Frames that are kept clean are at timestep 0: [b] -> [b, t] where there are any."""
        return timestep if lance_clean is None else timestep[:, None] * (1 - lance_clean.to(timestep))

    def _apply_model(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs["lance"].fill(tuple(x.shape[2:]))  # here, outside of what may be compiled or cached
        clean, latent = kwargs.get("lance_clean"), kwargs.pop("lance_latent", None)
        kwargs.pop("c_crossattn", None)
        if clean is None:
            return super()._apply_model(x, t, *args, **kwargs)
        shown = torch.where(clean[:, None, :, None, None] > 0, latent.to(x), x)
        # Guidance takes the velocity to be (x - denoised) / sigma, and its norm is over all frames, clean
        # ones included.
        return super()._apply_model(shown, t, *args, **kwargs) + (x - shown)

    def process_latent_in(self, latent: Tensor) -> Tensor:
        check_latent(latent)
        return super().process_latent_in(latent)

    # -- memory ----------------------------------------------------------------------------------------------

    def memory_required(
        self, input_shape: list[int], cond_shapes: dict[str, Any] | None = None, **kwargs: Any
    ) -> float:
        """Bytes one forward of input_shape [b, 48, t, h, w] needs beyond the weights: keys, values and
        activations.

        Activations are widest either around attention (residual, projections, and for at most FEED_CHUNK tokens of
        each row at once q rotated in float32) or in the feed-forward (residual, its input and output, and for
        at most FEED_CHUNK tokens at once its two wide tensors). Reading the context may be longer than a step. Per
        layer and token of every request's
        context and target: one key and value.
        """
        llm, size = self.llm, self.compute_dtype.itemsize
        rows, tokens = input_shape[0], math.prod(input_shape[2:]) + 2
        # Positive and negative of one encode share a context.
        contexts = {id(getattr(s, "request", s)): int(s[-1]) for s in (cond_shapes or {}).get("lance", [])}
        kv = (
            2
            * llm.num_kv_heads
            * llm.head_dim
            * size
            * llm.num_layers
            * sum(c + tokens for c in contexts.values())
        )
        heads = (llm.num_heads + 2 * llm.num_kv_heads) * llm.head_dim
        queries = llm.num_heads * llm.head_dim
        # The joined projections live on beside the rotated ones; the host's attention wants the queries and
        # gives the result in copies.
        attending = (2 * (llm.hidden_size + heads + queries) + queries) * size
        rotating = 8 * queries

        def activations(rows: int, tokens: int) -> int:
            feeding = (
                rows * tokens * 4 * llm.hidden_size * size
                + min(rows * tokens, FEED_CHUNK) * 2 * llm.intermediate_size * size
            )
            return max(rows * (tokens * attending + min(tokens, FEED_CHUNK) * rotating), feeding)

        widest = max(activations(rows, tokens), activations(1, max(contexts.values(), default=0)))
        return float(kv + widest + tokens * llm.hidden_size * size)

    # -- names LoRAs know ------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """This expert's weights; and, without any, the other's names and those of joined projections, so that
        LoRAs on them are recognised (`_Routing` sends each where it belongs)."""
        state = super().state_dict(*args, **kwargs)
        if not args and not kwargs:
            for name in (*self.understanding_names, *self.homes):
                state.setdefault(name, _NO_WEIGHT)
        return state

    def home(self, key: Any) -> Any:
        """A patch's key, a name or (name, (axis, start, length), ...), with a projection that has been joined
        as rows of the joined one.
        """
        name, offset, *rest = (key, None) if isinstance(key, str) else key
        if name not in self.homes:
            return key
        whole, rows = self.homes[name]
        if offset is None:
            offset = (0, rows.start, rows.stop - rows.start)
        elif offset[0] == 0:
            offset = (0, rows.start + offset[1], offset[2])
        else:
            raise ValueError(
                f"a patch of columns of {name} cannot be applied; it can be of the whole weight or of rows"
            )
        return (whole, offset, *rest)


_NO_WEIGHT = torch.empty(0)


def clean_frames(mask: Tensor) -> Tensor:
    """Denoise mask [b, c, t, h, w] -> bool [b, t]: frames nothing of which is to be denoised."""
    return mask.amax(dim=(1, 3, 4)) == 0


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


class _Routing(quant.PatchesInForward):
    """Patcher behaviour: patches named for the other expert go to its patcher; both are pinned to the same
    weights' id.
    """

    def add_patches(self, patches: dict, *args: Any, **kwargs: Any) -> list:
        homes = {self.model.home(key): key for key in patches}
        mine = {k: patches[key] for k, key in homes.items() if not _name(k).startswith(UND_PREFIX)}
        theirs = {_rename(k): patches[key] for k, key in homes.items() if _name(k).startswith(UND_PREFIX)}
        done = set(super().add_patches(mine, *args, **kwargs))
        taken = (
            set(self.get_additional_models_with_key(UND)[0].add_patches(theirs, *args, **kwargs))
            if theirs
            else ()
        )
        return [key for k, key in homes.items() if k in done or _rename(k) in taken]

    def add_hook_patches(self, hook: Any, patches: dict, *args: Any, **kwargs: Any) -> list:
        homes = {self.model.home(key): key for key in patches}
        done = super().add_hook_patches(hook, {k: patches[key] for k, key in homes.items()}, *args, **kwargs)
        return [homes[k] for k in done]

    def model_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """This expert's weights only, without the names `LanceModel.state_dict` lends to LoRAs."""
        return {k: v for k, v in super().model_state_dict(*args, **kwargs).items() if v is not _NO_WEIGHT}


def _name(key: Any) -> str:
    return key if isinstance(key, str) else key[0]


def _rename(key: Any) -> Any:
    return (
        key.removeprefix(UND_PREFIX) if isinstance(key, str) else (key[0].removeprefix(UND_PREFIX), *key[1:])
    )


def build(
    llm: LLMConfig,
    stored: torch.dtype,
    compute: torch.dtype,
    understanding: Any,
    disable_dynamic: bool = False,
    formats: dict[str, Format] | None = None,
) -> Any:
    """A MODEL patcher without weights; give it some with `host.fill`.

    understanding: the patcher of the understanding expert. formats: layers that are kept quantised.
    """
    config = LanceConfig({"llm": llm, "apart": tuple(formats or ())})
    config.set_inference_dtype(stored, None if stored == compute else compute)
    config.custom_operations = host.operations(stored, compute)
    model = LanceModel(config, llm, understanding.model, formats or {})
    model.device = mm.unet_offload_device()
    patcher = host.make_patcher(model, _Routing, disable_dynamic=disable_dynamic)
    patcher.set_additional_models(UND, [understanding])
    patcher.add_wrapper_with_key(px.WrappersMP.OUTER_SAMPLE, "lance_restore", restore_clean)
    patcher.add_wrapper_with_key(px.WrappersMP.PREPARE_SAMPLING, "lance_placement", host.main_first)
    return patcher
