"""Everything that differs between ComfyUI versions, and the services of ComfyUI that the nodes use.

Written for 0.3.60 to 0.38. Features are tested for, never versions.

A *ComfyUI subclass* is a class made at run time over one of ComfyUI's, because which one that is depends on
the version, the
device or the dtype: its layers, its quantised layer, its patcher. Each is made once for its base (`@cache`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.input_impl import VideoFromFile
from torch import Tensor, nn

from ..lance_core.config import CELL, VAEConfig
from ..lance_core.errors import RequestError
from ..lance_core.model.attention import causal_parts, fold_groups, unfold_groups
from ..lance_core.model.ops import are_few, few_rows
from ..lance_core.model.rope import GridScale

try:
    from comfy import quant_ops
except ImportError:  # 0.3.64 has none
    quant_ops = None

# of an empty LATENT; ComfyUI's spelling
LATENT_TAGS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
# Pixels a side that a cell of an empty LATENT stands for, by its channels, where ComfyUI does not tag it.
EMPTY_CELLS = {4: 8, 12: 8, 16: 8, 64: 32, 128: 32}
ORIGINAL = "_lance_original"  # attribute of a function of ours: what it stands before
MASK_ELEMENTS = 1 << 24  # of a causal mask at once
FLOAT_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def patcher_class(disable_dynamic: bool = False) -> Any:
    """The ModelPatcher that ComfyUI itself constructs; newer ones choose one at start, so ask late."""
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)


def own_weights(patcher: Any) -> Any:
    """What newer ComfyUIs' `clone(model_override=...)` takes, for a clone with this patcher's module; None on
    older ones, whose clones share their module always.
    """
    return patcher.get_clone_model_override() if hasattr(patcher, "get_clone_model_override") else None


@contextlib.contextmanager
def trainable(quantised: bool) -> Iterator[None]:
    """Where weights are made that may be trained: nodes run in inference mode, whose tensors cannot be.

    Where ComfyUI has quantised weights as tensors of their own kind, these are made as it makes them: in
    inference mode it cannot move others. It trains on a copy that it makes outside of that mode.
    """
    as_it_is = quantised and hasattr(quant_ops, "QuantizedTensor") and torch.is_inference_mode_enabled()
    with torch.inference_mode(as_it_is), torch.no_grad():
        yield


def stored_weight(patcher: Any, key: str) -> tuple[Tensor | None, Any]:
    """(a weight as it is stored, from the backup where a patched one is in its place; the layer's function
    that makes a plain tensor of it, None if it is one).
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    if key in patcher.backup:
        weight = patcher.backup[key].weight
    if key in patcher.hook_backup:
        weight = patcher.hook_backup[key][0]
    return weight, convert


def archive_dtypes(model: nn.Module) -> None:
    """Have newer ComfyUIs note a module's dtypes before it gets weights, as their loaders do."""
    if hasattr(mm, "archive_model_dtypes"):
        mm.archive_model_dtypes(model)


def weight_dtypes(choice: str, parameters: int) -> tuple[torch.dtype, torch.dtype]:
    """(dtype the weights are kept in, dtype the computation runs in) for a choice of the loader, as stock
    loaders decide.
    """
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3fn": torch.float8_e4m3fn}.get(choice)
    stored = wanted or mm.unet_dtype(
        model_params=parameters, supported_dtypes=FLOAT_DTYPES, weight_dtype=torch.bfloat16
    )
    return stored, mm.unet_manual_cast(stored, mm.get_torch_device(), FLOAT_DTYPES) or stored


def operations(stored: torch.dtype, compute: torch.dtype) -> Any:
    """ComfyUI's layer classes for weights kept in one dtype and used in another."""
    return _operations(
        comfy.ops.pick_operations(
            stored, None if stored == compute else compute, load_device=mm.get_torch_device()
        ),
        compute,
    )


@cache
def _operations(picked: Any, compute: torch.dtype) -> type:
    """ComfyUI subclasses of the layers that need one."""

    class Embedding(picked.Embedding):
        """Looks up in the compute dtype: some devices cannot index fp8 tables."""

        def forward(self, ids: Tensor, **kwargs: Any) -> Tensor:
            return super().forward(ids, out_dtype=compute, **kwargs)

    class Linear(picked.Linear):
        """Multiplies few rows as lance_core does, where the weight is neither cast nor patched."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if are_few(x) and not (self.comfy_cast_weights or self.weight_function or self.bias_function):
                return few_rows(x, self.weight, self.bias)
            return super().forward(x, *args, **kwargs)

    class RMSNorm(picked.RMSNorm):
        """Lends its weight to lance_core's kernels where it is neither cast nor fetched nor patched."""

        def ready_weight(self) -> Tensor | None:
            waits = self.comfy_cast_weights or self.weight_function or self.bias_function
            return None if waits else self.weight

    class Conv3d(picked.Conv3d):
        """Checks for the user's interrupt, as `attention` does: a picture is one single step of the VAE."""

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            if not torch.compiler.is_compiling():
                mm.throw_exception_if_processing_interrupted()
            return super().forward(*args, **kwargs)

    return type(
        picked.__name__,
        (picked,),
        {"Embedding": Embedding, "Linear": Linear, "RMSNorm": RMSNorm, "Conv3d": Conv3d},
    )


def planned(linear: Any) -> tuple[torch.dtype, bool]:
    """(dtype, whether it has a bias) of a linear layer without weights; on newer ComfyUIs it has no
    parameters yet.
    """
    dtype = linear.weight.dtype if linear.weight is not None else linear.weight_comfy_model_dtype
    return dtype, linear.bias is not None or getattr(linear, "comfy_need_lazy_init_bias", False)


def knows_quantised() -> bool:
    """Whether ComfyUI has tensors that know their scales, which 0.3.64 has not."""
    return hasattr(quant_ops, "get_layout_class") and hasattr(quant_ops.QuantizedTensor, "dequantize")


def is_quantised(weight: Any) -> bool:
    """Whether a weight is one of them."""
    return hasattr(quant_ops, "QuantizedTensor") and isinstance(weight, quant_ops.QuantizedTensor)


# -- VAE
# ------------------------------------------------------------------------------------------------------


def set_up_vae(
    vae: Any, config: VAEConfig, encode_bytes: Callable[..., int], decode_bytes: Callable[..., int]
) -> None:
    """Give a comfy.sd.VAE all that its own constructor would, which insists on the widths of the VAEs it
    knows.

    encode_bytes, decode_bytes: (shape, dtype) -> bytes of one pass. Attributes that only newer versions read
    are set for
    all: the older ones do not look at them.
    """
    time, space = config.temporal_ratio, config.spatial_ratio
    vae.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    vae.device = mm.vae_device()
    vae.vae_dtype = mm.vae_dtype(vae.device, vae.working_dtypes)
    vae.output_device = mm.intermediate_device()
    vae.latent_channels, vae.latent_dim, vae.output_channels = config.latent_channels, 3, 3
    vae.upscale_ratio = (lambda t: max(0, t * time - (time - 1)), space, space)
    vae.downscale_ratio = (lambda t: max(0, (t + time - 1) // time), space, space)
    vae.upscale_index_formula = vae.downscale_index_formula = (time, space, space)
    vae.process_input = lambda image: image * 2.0 - 1.0
    # In place: newer ComfyUIs ignore what is returned.
    vae.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
    vae.memory_used_encode, vae.memory_used_decode = encode_bytes, decode_bytes
    vae.disable_offload = vae.not_video = False
    vae.crop_input = True
    vae.extra_1d_channel = vae.pad_channel_value = vae.audio_sample_rate = None
    vae.handles_tiling, vae.format_encoded = False, None


# -- attention and services
# -----------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, options: dict[str, Any] | None = None
) -> Tensor:
    """`lance_core.model.attention.attention` by ComfyUI's attention, so that the user's choice of backend
    holds: for all models, or by a node for one, which is in the model's `transformer_options`.

    Query heads that share a key head are laid one after the other along the queries, so keys are never
    expanded and any backend will do. The user's interrupt is checked here, once a layer.
    """
    if not torch.compiler.is_compiling():
        mm.throw_exception_if_processing_interrupted()
    n, heads, groups, keys = q.shape[1], q.shape[2], k.shape[2], k.shape[1]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if not causal or n == 1:
        return _grouped(q, k, v, groups, options=options)
    # Long prompts go through a stretch of queries at a time, against the keys they see: a whole mask would
    # have a row for every query of every head that shares a key head, and gigabytes at 20,000 tokens.
    stretch = max(1, MASK_ELEMENTS // (heads // groups * keys))
    parts = []
    for chosen, seen in causal_parts(n, keys, stretch):
        some = q[:, chosen]
        # Added, not boolean: not every backend of ComfyUI knows the latter.
        mask = torch.full((some.shape[1], seen), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
        mask = mask.triu(seen - some.shape[1] + 1).repeat(heads // groups, 1)
        parts.append(_grouped(some, k[:, :, :seen], v[:, :, :seen], groups, mask))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: int,
    mask: Tensor | None = None,
    options: dict[str, Any] | None = None,
) -> Tensor:
    """ComfyUI's attention of q [b, n, heads, width] over k, v [b, groups, keys, width].

    options: not with a mask, which backends that nodes choose ignore or refuse.
    """
    chosen = {} if options is None else {"transformer_options": options}
    out = optimized_attention(
        fold_groups(q, groups), k, v, groups, mask=mask, skip_reshape=True, skip_output_reshape=True, **chosen
    )
    return unfold_groups(out, q.shape[2])


def stand_before(module: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
    """Put a function in front of one of ComfyUI's, `wrap(original)`; in place of that of an earlier import of
    this pack, if there is one.
    """
    there = getattr(module, name)
    original = getattr(there, ORIGINAL, there)
    ours = wrap(original)
    setattr(ours, ORIGINAL, original)
    setattr(module, name, ours)


def with_extra(given: Any, extra: dict[str, Any]) -> Any:
    """A V3 schema's input with more in its description; older constructors do not take it for every kind."""
    given.extra_dict = {**(given.extra_dict or {}), **extra}
    return given


def fix_empty_latent(patcher: Any, latent: dict[str, Any]) -> Tensor:
    """The samples of a LATENT, an empty one of another model given the channels and size of ours.

    Newer ComfyUIs tag an empty latent with the pixels a cell of it stands for; where their function takes the
    tags, the size in pixels stays what was asked for. Older ones go by the channels here.

    Raises:
        RequestError: an empty latent without a tag, of a number of channels that does not tell its size.
    """
    fix, samples = comfy.sample.fix_empty_latent_channels, latent["samples"]
    taken = inspect.signature(fix).parameters
    if LATENT_TAGS[0] not in taken and not samples.is_nested and not bool(samples.any()):
        samples = _resized_empty(samples, patcher.get_model_object("latent_format").latent_channels)
    return fix(patcher, samples, **{tag: latent.get(tag) for tag in LATENT_TAGS if tag in taken})


def _resized_empty(samples: Tensor, channels: int) -> Tensor:
    """An empty latent of other channels with our cells' number of rows and columns."""
    if samples.ndim not in (4, 5) or samples.shape[1] == channels:
        return samples
    cell = EMPTY_CELLS.get(samples.shape[1])
    if cell is None:
        raise RequestError(
            f"The empty latent has {samples.shape[1]} channels and Lance's have {channels}, so the size it "
            "stands for cannot be told: use Empty Lance Latent."
        )
    rows, columns = (max(1, round(n * cell / CELL)) for n in samples.shape[-2:])
    return samples.new_zeros(*samples.shape[:-2], rows, columns)


def progress(total: int | None = None) -> Callable[[int, int], None]:
    """A (done, total) callback that moves the running node's progress bar and obeys interrupts."""
    bar = comfy.utils.ProgressBar(total or 1)

    def update(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return update


def show_text(text: str, node_id: str | None) -> None:
    """Write text onto a node while it runs. Some frontends render it as HTML, so what could open a tag is
    replaced.
    """
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text.replace("<", "\u2039").replace("&", "\uff06"), node_id)


def video_file(video: Any) -> Any | None:
    """The file a VIDEO is, a path or a binary file; None where it is something else or part of a file."""
    if not isinstance(video, VideoFromFile):
        return None
    if hasattr(video, "get_active_trim_window"):
        whole = video.get_active_trim_window() == (0, 0)
    else:
        whole = not hasattr(video, "as_trimmed")  # some versions trim without telling where
    return video.get_stream_source() if whole else None


def has_wrapper(patcher: Any, kind: str, key: str) -> bool:
    """Whether some node has put a wrapper of this kind and key on the model."""
    return bool(patcher is not None and patcher.get_wrappers(kind, key))


def hook_strengths(patcher: Any) -> tuple:
    """The conditioning hooks that patch a model's weights just now, each with its strength, which keyframes
    change from step to step.
    """
    group = getattr(patcher, "current_hooks", None)
    return () if group is None else tuple((hook, hook.strength) for hook in group.hooks)


def grid_scale(options: Mapping[str, Any]) -> GridScale | None:
    """What the node ScaleROPE has put into `transformer_options`; None where nothing is scaled."""
    given = options.get("rope_options") or {}
    scale, shift = (
        tuple(float(given.get(f"{name}_{axis}", default)) for axis in "tyx")
        for name, default in (("scale", 1.0), ("shift", 0.0))
    )
    found = GridScale(scale, shift)  # type: ignore[arg-type]
    return None if found == GridScale() else found


def uncompiled(module: nn.Module) -> nn.Module:
    """What torch.compile has wrapped; ComfyUI puts the wrapper in the module's place for the call."""
    return getattr(module, "_orig_mod", module)


def is_dynamic(patcher: Any) -> bool:
    """Whether a patcher streams its weights by newer ComfyUIs' dynamic VRAM."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def window_indices(window: Any) -> tuple[tuple[int, ...], bool]:
    """The cells of a context window, and whether the first of them only leads in: newer ComfyUIs let a window
    begin with one frame more, whose result they drop.
    """
    anchor = getattr(window, "causal_anchor_index", None)
    anchored = anchor is not None and anchor >= 0
    lead = (int(anchor),) if anchor is not None and anchored else ()
    return (*lead, *map(int, window.index_list)), anchored
