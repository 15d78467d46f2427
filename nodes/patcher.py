"""The patchers around our modules, and where a patch goes: to which expert, and to which rows of a joined
projection.

ComfyUI keeps LoRAs as patches of weights by name. A MODEL of Lance has two patchers, the generation expert's
and, brought along by it, the understanding expert's; and projections that share an input are one layer. So a
patch is routed twice. With the released sizes, a LoRA on the understanding expert's `q_proj` of layer 0:

    name in the LoRA's file    diffusion_model.understanding.layers.0.self_attn.q_proj.weight
    by `Places`                diffusion_model.understanding.layers.0.self_attn.qkv_proj.weight, rows 0 to
    2048 by `ExpertRouting`         the other patcher's layers.0.self_attn.qkv_proj.weight, rows 0 to 2048
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor, nn

from ..lance_core.model.joined import Rows
from . import comfy_compat, devices
from .quant import Patches, Quantised

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher as _Patcher
else:
    _Patcher = object  # which class stands behind is known only at run time

UND = "lance_und"  # the key under which the MODEL brings the understanding expert's patcher along
OWN_PREFIX = "diffusion_model."
UND_PREFIX = "diffusion_model.understanding."  # how LoRAs name the other expert's layers
NO_WEIGHT = torch.empty(0)  # stands for weights whose names a state dict lends to LoRAs


# -- classes
# --------------------------------------------------------------------------------------------------


@cache
def _patcher_subclass(behaviour: Any, base: Any) -> Any:
    """A ComfyUI subclass (see comfy_compat): ComfyUI's patcher class of this run with our behaviour in front
    of it.
    """
    return type(behaviour.__name__ + base.__name__, (behaviour, base), {})


class Behaviour(_Patcher):
    """What stands in front of ComfyUI's patcher class, and stays there in clones."""

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        n = super().clone(*args, **kwargs)
        # A dynamic patcher's clone for hooks and compilers is of ComfyUI's plain class.
        if not isinstance(n, Behaviour):
            n.__class__ = _patcher_subclass(type(self).__bases__[0], type(n))  # type: ignore[arg-type]
        return n


def _weight(name: str) -> str:
    """The weight beside a tensor of its layer."""
    return f"{name.rpartition('.')[0]}.weight"


class PatchesInForward(Behaviour):
    """Patcher behaviour: a LoRA on a quantised weight is left to the weight's layer, which adds it in each
    product (see `quant.Quantised`)."""

    def _layer(self, key: str) -> Quantised | None:
        name, _, leaf = key.rpartition(".")
        layer = comfy.utils.get_attr(self.model, name) if leaf == "weight" else None
        return layer if isinstance(layer, Quantised) else None

    def _layers(self) -> dict[str, Quantised]:
        return {
            f"{name}.weight": layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, Quantised)
        }

    def model_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the scales: newer ComfyUIs name them here and do not find them when they look for what a
        hook may patch.
        """
        layers, state = self._layers(), super().model_state_dict(*args, **kwargs)
        return {
            k: v for k, v in state.items() if k.endswith((".weight", ".bias")) or _weight(k) not in layers
        }

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer(key) if key in self.patches else None
        if layer is None or kwargs.get("return_weight"):
            return super().patch_weight_to_device(key, *args, **kwargs)
        layer.lora = Patches(key, self.patches)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for layer in self._layers().values():
                layer.lora = None

    def patch_hook_weight_to_device(self, *args: Any, **kwargs: Any) -> None:
        if self._layer(kwargs["key"] if "key" in kwargs else args[2]) is None:
            super().patch_hook_weight_to_device(*args, **kwargs)

    def patch_hooks(self, hooks: Any) -> None:
        super().patch_hooks(hooks)
        patches = self.get_combined_hook_patches(hooks)
        for key, layer in self._layers().items():
            layer.hook = Patches(key, patches) if key in patches else None

    def unpatch_hooks(self, *args: Any, **kwargs: Any) -> None:
        super().unpatch_hooks(*args, **kwargs)
        for layer in self._layers().values():
            layer.hook = None


# -- where a patch goes
# ---------------------------------------------------------------------------------------


class PatchKey(NamedTuple):
    """What ComfyUI names a patched weight by: its name, or a tuple of name, part of it, and a function on the
    part.
    """

    name: str
    offset: tuple[int, int, int] | None = None  # axis, start, length
    function: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, key: Any) -> PatchKey:
        """From either of ComfyUI's forms."""
        return cls(key) if isinstance(key, str) else cls(*key)

    def native(self) -> Any:
        """In the shortest of ComfyUI's forms."""
        if self.function is not None:
            return tuple(self)
        return self.name if self.offset is None else (self.name, self.offset)


class Places:
    """Where projections are that files and LoRAs know apart: rows of joined ones, by their names in the
    MODEL.
    """

    def __init__(self, own: Mapping[str, Rows], understanding: Mapping[str, Rows]) -> None:
        self._rows = {
            f"{prefix}{name}": (f"{prefix}{place.name}", place.rows)
            for prefix, rows in ((OWN_PREFIX, own), (UND_PREFIX, understanding))
            for name, place in rows.items()
        }

    def __iter__(self) -> Any:
        """The names of the projections."""
        return iter(self._rows)

    def place(self, key: PatchKey) -> PatchKey:
        """The same patch by the joined projection's name and rows.

        Raises:
            ValueError: it is of columns, which ComfyUI cannot name together with rows.
        """
        if key.name not in self._rows:
            return key
        whole, rows = self._rows[key.name]
        if key.offset is None:
            return key._replace(name=whole, offset=(0, rows.start, rows.stop - rows.start))
        axis, start, length = key.offset
        if axis != 0:
            raise ValueError(
                f"a patch of columns of {key.name} cannot be applied; it can be of the whole weight or of "
                "rows"
            )
        return key._replace(name=whole, offset=(0, rows.start + start, length))


class ExpertRouting(PatchesInForward):
    """Patcher behaviour of the MODEL: patches named for the understanding expert go to its patcher."""

    def _placed(self, keys: Iterable[Any]) -> dict[Any, PatchKey]:
        """Each patch's key as it came -> its place in the MODEL."""
        return {key: self.model.places.place(PatchKey.of(key)) for key in keys}

    def add_patches(self, patches: dict, *args: Any, **kwargs: Any) -> list:
        other = self.get_additional_models_with_key(UND)[0]
        mine, theirs = {}, {}
        for key, place in self._placed(patches).items():
            if place.name.startswith(UND_PREFIX):
                theirs[place._replace(name=place.name.removeprefix(UND_PREFIX)).native()] = key
            else:
                mine[place.native()] = key
        taken = [
            mine[k] for k in super().add_patches({k: patches[v] for k, v in mine.items()}, *args, **kwargs)
        ]
        if theirs:
            given = {k: patches[v] for k, v in theirs.items()}
            taken += [theirs[k] for k in other.add_patches(given, *args, **kwargs)]
        return taken

    def add_hook_patches(self, hook: Any, patches: dict, *args: Any, **kwargs: Any) -> list:
        placed = {place.native(): key for key, place in self._placed(patches).items()}
        done = super().add_hook_patches(hook, {k: patches[v] for k, v in placed.items()}, *args, **kwargs)
        return [placed[k] for k in done]

    def model_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """This expert's weights, without the names that `LanceModel.state_dict` lends to LoRAs."""
        return {k: v for k, v in super().model_state_dict(*args, **kwargs).items() if v is not NO_WEIGHT}

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> Any:
        """A copy with weights of its own for another device, and the understanding expert's with it."""
        brought = self.additional_models.get(UND, [])
        with devices.loaded_once([self, *brought]):
            n = super().deepclone_multigpu(*args, **kwargs)
        n.cached_patcher_init = self.cached_patcher_init
        for copy, original in zip(n.additional_models.get(UND, []), brought, strict=True):
            copy.cached_patcher_init = original.cached_patcher_init
        return n

    def match_multigpu_clones(self) -> None:
        super().match_multigpu_clones()
        for copy in self.get_additional_models_with_key("multigpu"):
            devices.match(self, copy, UND)


# -- making them
# ----------------------------------------------------------------------------------------------


def make_patcher(
    model: nn.Module,
    behaviour: type | None = None,
    load_device: Any = None,
    offload_device: Any = None,
    disable_dynamic: bool = False,
) -> Any:
    """A patcher over a module that has no weights yet (see `fill`); by default on the devices for diffusion
    models.
    """
    comfy_compat.archive_dtypes(model)
    # A size of 1 keeps the patcher from measuring the module before it has weights; `fill` sets the real one.
    given = {
        "load_device": load_device or mm.get_torch_device(),
        "offload_device": offload_device or mm.unet_offload_device(),
        "size": 1,
    }
    base = comfy_compat.patcher_class(disable_dynamic)
    if behaviour is None:
        return base(model, **given)
    patcher = _patcher_subclass(behaviour, base)(model, **given)
    if isinstance(patcher, behaviour):
        return patcher
    # The dynamic class makes a plain one instead of itself for a CPU: then that is what to build on.
    plain: Any = type(patcher)
    return _patcher_subclass(behaviour, plain)(model, **given)


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


def reloadable(patchers: Iterable[Any], load: Callable[..., Any], *args: Any) -> None:
    """Tell newer ComfyUIs how to make the patchers once more: `load(*args, disable_dynamic=...)` gives all in
    order.

    They ask for it where weights must not be shared: several GPUs, conditioning hooks.
    """
    for index, patcher in enumerate(patchers):
        patcher.cached_patcher_init = (load, args, index)


def main_first(executor: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """PREPARE_SAMPLING wrapper: a model gets its memory before those that it brings along
    (`set_additional_models`).

    ComfyUI gives memory in no order (0.3.64) or to the others first (0.29), and leaves what is loaded where
    it is.
    Dynamic patchers are left alone: their main model is loaded last, and the last has the first claim to
    memory.
    """
    brought = model.additional_models
    if brought and not comfy_compat.is_dynamic(model) and model.loaded_size() < model.model_size():
        try:
            model.additional_models = {}
            executor(model, *args, **kwargs)
        finally:
            model.additional_models = brought
    return executor(model, *args, **kwargs)


# -- what is at fault
# -----------------------------------------------------------------------------------------


def blame(main: Any) -> str:
    """Why a MODEL may have given NaN or infinity: the LoRA or weight that has them, or else what usually
    does.
    """
    for patcher in (main, *main.get_additional_models_with_key(UND)):
        for key, patches in patcher.patches.items():
            if any(not _finite(part) for patch in patches for part in _tensors(patch)):
                name = PatchKey.of(key).name
                return f"a LoRA on {name} has NaN or infinity in it. Take it out, or get its file again."
    for patcher in (main, *main.get_additional_models_with_key(UND)):
        # A patched weight would be blamed for its LoRA; those were looked at.
        bad = next(
            (n for n, w in patcher.model.named_parameters() if n not in patcher.patches and not _finite(w)),
            None,
        )
        if bad is not None:
            return f"the weight {bad} is not finite itself, so the checkpoint is damaged. Download it again."
    if main.model.compute_dtype is torch.float16:
        return "fp16 overflowed, probably. Choose bf16 as weight_dtype in Lance Loader."
    if main.patches:
        return "a LoRA on the model is too strong, probably. Lower its strength, or take it out."
    return "the latent it started from may have been damaged. Look at the node it comes from."


def _tensors(patch: Any) -> Iterable[Tensor]:
    """The tensors of a patch as ComfyUI keeps it, in tuples, lists and adapters."""
    if isinstance(patch, Tensor):
        yield patch
    elif isinstance(patch, tuple | list):
        for part in patch:
            yield from _tensors(part)
    elif hasattr(patch, "weights"):
        yield from _tensors(patch.weights)


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all())
