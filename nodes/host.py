"""Everything that differs between ComfyUI versions, and the host's services the nodes use: one adapter file.

Written for 0.3.60 to 0.38. Feature-tested, never version-tested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.input_impl import VideoFromFile
from torch import Tensor, nn

from ..lance_core.checkpoint.quantize import Format
from ..lance_core.model.attention import fold_groups, unfold_groups
from ..lance_core.model.ops import are_few, few_rows

try:
    from comfy import quant_ops
except ImportError:  # 0.3.64 has none
    quant_ops = None

FLOAT_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def patcher_class(disable_dynamic: bool = False) -> type:
    """The ModelPatcher this host constructs itself: newer ones choose a dynamic one at start, so ask late."""
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)


@cache
def _with(mixin: type, base: type) -> type:
    return type(mixin.__name__.lstrip("_") + base.__name__, (mixin, base), {})


class Behaviour:
    """What is put in front of the host's patcher class; it stays there in clones."""

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        n = super().clone(*args, **kwargs)
        if not isinstance(
            n, Behaviour
        ):  # a dynamic patcher's other self, of the host's plain class, for hooks and compilers
            n.__class__ = _with(type(self).__bases__[0], type(n))
        return n


def make_patcher(
    model: nn.Module,
    mixin: type | None = None,
    load_device: Any = None,
    offload_device: Any = None,
    disable_dynamic: bool = False,
) -> Any:
    """A patcher over a module that has no weights yet (see `fill`); by default on the devices for diffusion
    models.

    mixin: a Behaviour.
    """
    if hasattr(mm, "archive_model_dtypes"):
        mm.archive_model_dtypes(model)
    # A size of 1 keeps the patcher from measuring the module before it has weights; `fill` sets the real one.
    given = {
        "load_device": load_device or mm.get_torch_device(),
        "offload_device": offload_device or mm.unet_offload_device(),
        "size": 1,
    }
    base = patcher_class(disable_dynamic)
    if mixin is None:
        return base(model, **given)
    patcher = _with(mixin, base)(model, **given)
    # The dynamic class makes a plain one instead of itself for a CPU: then that is what to build on.
    return patcher if isinstance(patcher, mixin) else _with(mixin, type(patcher))(model, **given)


def reloadable(patchers: Iterable[Any], load: Callable[..., Any], *args: Any) -> None:
    """Tell newer hosts how to make the patchers once more: `load(*args, disable_dynamic=...)` gives all of
    them in order.

    They ask for it where weights must not be shared: several GPUs, conditioning hooks.
    """
    for index, patcher in enumerate(patchers):
        patcher.cached_patcher_init = (load, args, index)


def fill(patcher: Any, module: nn.Module, tensors: Iterable[tuple[str, Tensor]], total: int) -> None:
    """Stream weights, each in its final dtype and owning its memory, into a patcher's module without a second
    copy.
    """
    bar = comfy.utils.ProgressBar(total)
    state, size = {}, 0
    for name, tensor in tensors:
        mm.throw_exception_if_processing_interrupted()
        state[name] = tensor
        size += tensor.nbytes
        bar.update(1)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)
    patcher.size = size
    patcher.model.device = patcher.offload_device


def main_first(executor: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """PREPARE_SAMPLING wrapper: a model has its memory before those that it brings along
    (`set_additional_models`) have theirs.

    Hosts give memory in no order (0.3.64) or to the others first (0.29), and leave what is loaded where it
    is. Dynamic patchers are
    left alone: hosts load the main one last, and the last has the first claim to memory.
    """
    brought = model.additional_models
    dynamic = hasattr(model, "is_dynamic") and model.is_dynamic()
    if brought and not dynamic and model.loaded_size() < model.model_size():
        try:
            model.additional_models = {}
            executor(model, *args, **kwargs)
        finally:
            model.additional_models = brought
    return executor(model, *args, **kwargs)


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
    """The host's layer classes for weights kept in one dtype and used in another."""
    return _operations(
        comfy.ops.pick_operations(
            stored, None if stored == compute else compute, load_device=mm.get_torch_device()
        ),
        compute,
    )


@cache
def _operations(picked: type, compute: torch.dtype) -> type:
    class Embedding(picked.Embedding):
        """Told what to look up in: the host's own looks up in whatever dtype is kept, which not every device
        can in fp8.
        """

        def forward(self, ids: Tensor, **kwargs: Any) -> Tensor:
            return super().forward(ids, out_dtype=compute, **kwargs)

    class Linear(picked.Linear):
        """lance_core's way with few rows, where nothing is cast or patched on the way."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if are_few(x) and not (self.comfy_cast_weights or self.weight_function or self.bias_function):
                return few_rows(x, self.weight, self.bias)
            return super().forward(x, *args, **kwargs)

    class Conv3d(picked.Conv3d):
        """Looks at the user's interrupt, as `attention` does: a picture is one single step of the VAE."""

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            if not torch.compiler.is_compiling():
                mm.throw_exception_if_processing_interrupted()
            return super().forward(*args, **kwargs)

    return type(picked.__name__, (picked,), {"Embedding": Embedding, "Linear": Linear, "Conv3d": Conv3d})


def planned(linear: nn.Module) -> tuple[torch.dtype, bool]:
    """(dtype, whether with a bias) of a linear layer without weights; on newer hosts it has not even
    parameters for them.
    """
    dtype = linear.weight.dtype if linear.weight is not None else linear.weight_comfy_model_dtype
    return dtype, linear.bias is not None or getattr(linear, "comfy_need_lazy_init_bias", False)


def quantised_linear(dtype: torch.dtype) -> type | None:
    """The host's linear layer for quantised weights, which it undoes to a dtype; None where it has none, as
    0.3.64 has.
    """
    known = hasattr(quant_ops, "get_layout_class") and hasattr(quant_ops.QuantizedTensor, "dequantize")
    return comfy.ops.mixed_precision_ops(compute_dtype=dtype).Linear if known else None


def quantised_tensor(
    format: Format, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """A weight [N, K] of a format that is not the host's, in the host's kind of tensor, which is told how to
    undo it.
    """
    names = [name for name in format.layout(*shape) if name != "weight"]
    name, layout = _layout(format, tuple(names))
    scale, *others = (parts[name] for name in names)
    params = layout.Params(scale, dtype, shape, *others)
    return quant_ops.QuantizedTensor(parts["weight"], name, params)


@cache
def _layout(format: Format, names: tuple[str, ...]) -> tuple[str, type]:
    """The host's description of a format, whose side tensors have these names, and the name it has there."""
    from comfy_kitchen.tensor import BaseLayoutParams

    fields = ("scale", *names[1:])  # the host's name for the first

    class Layout(quant_ops.QuantizedLayout):
        Params = dataclasses.make_dataclass(
            "Params",
            [(name, Tensor) for name in fields[1:]],
            bases=(BaseLayoutParams,),
            frozen=True,
            namespace={"_tensor_fields": lambda self: list(fields)},
        )

        @classmethod
        def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
            beside = {name: getattr(params, field) for name, field in zip(names, fields, strict=True)}
            return format.decode({"weight": qdata, **beside}, params.orig_dtype)

        @classmethod
        def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
            beside = {
                name.removeprefix("weight"): getattr(params, field)
                for name, field in zip(names, fields, strict=True)
            }
            return {"": qdata, **beside}

    name = f"Lance{format.name}"
    quant_ops.register_layout_class(name, Layout)
    return name, Layout


def undone(weight: Tensor) -> Tensor:
    """A weight for a product: quantised ones decoded in full precision."""
    return weight.dequantize() if quant_ops and isinstance(weight, quant_ops.QuantizedTensor) else weight


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """`lance_core.ops.attention` by the host's own attention, so that the user's choice of backend holds.

    Query heads that share a key head are laid one after the other along the queries, so keys are never
    expanded and any backend will do. The user's interrupt is looked at here, once a layer.
    """
    if not torch.compiler.is_compiling():
        mm.throw_exception_if_processing_interrupted()
    n, heads, groups, keys = q.shape[1], q.shape[2], k.shape[2], k.shape[1]
    mask = None
    if causal and n > 1:
        # Added, not boolean: not every backend of the host knows the latter.
        mask = torch.full((n, keys), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(
            keys - n + 1
        )
        mask = mask.repeat(heads // groups, 1)
    q, k, v = fold_groups(q, groups), k.transpose(1, 2), v.transpose(1, 2)
    return unfold_groups(
        optimized_attention(q, k, v, groups, mask=mask, skip_reshape=True, skip_output_reshape=True), heads
    )


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
    """The file a VIDEO is: a path or a binary file; None where it is something else, or only part of a file."""
    if not isinstance(video, VideoFromFile):
        return None
    if hasattr(video, "get_active_trim_window"):
        whole = video.get_active_trim_window() == (0, 0)
    else:
        whole = not hasattr(video, "as_trimmed")  # some hosts trim without telling where
    return video.get_stream_source() if whole else None


def has_wrapper(patcher: Any, kind: str, key: str) -> bool:
    """Whether some node has put a wrapper of this kind and key on the model."""
    return bool(patcher is not None and patcher.get_wrappers(kind, key))
