"""The MODEL's patcher: two experts, each with its own patches, that everything of ComfyUI sees as one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from comfy.model_patcher import create_hook_patches_clone

from ..lance_core.errors import RequestError
from . import devices, merging, saving
from .patcher import PatchesInForward
from .places import NO_WEIGHT, UND, UND_PREFIX, PatchKey
from .quant import OwnQuantLinear


class ExpertRouting(PatchesInForward):
    """Patcher behaviour of the MODEL: patches named for the understanding expert go to its patcher, and what
    asks for the MODEL's weights gets both experts'.
    """

    def _others(self) -> list[Any]:
        """The understanding expert's patcher; none while `patcher.main_first` loads this one alone."""
        return self.additional_models.get(UND, [])

    # -- loading and cloning ---------------------------------------------------------------------------------

    def model_patches_models(self) -> list[Any]:
        """Also the other expert: who loads the MODEL without sampling wants both, to save or to train."""
        return [*super().model_patches_models(), *self._others()]

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """A clone with weights of its own gets an understanding expert with weights of its own, too."""
        n = super().clone(*args, **kwargs)
        if n.model is not self.model:
            names = ("disable_dynamic", "model_override", "force_deepcopy")
            given = dict(zip(names, args, strict=False)) | kwargs | {"model_override": n.model.companion}
            n.additional_models[UND] = [und.clone(**given) for und in self._others()]
        return n

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> Any:
        """A copy with weights of its own for another device, and the understanding expert's with it."""
        brought = self._others()
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

    # -- patches ---------------------------------------------------------------------------------------------

    def _placed(self, keys: Iterable[Any]) -> dict[Any, PatchKey]:
        """Each patch's key as it came -> its place in the MODEL."""
        return {key: self.model.places.place(PatchKey.of(key)) for key in keys}

    def _split(self, patches: Iterable[Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """The keys of patches of this expert and of the other, each in ComfyUI's form -> as it came."""
        mine, theirs = {}, {}
        for key, place in self._placed(patches).items():
            if place.name.startswith(UND_PREFIX):
                theirs[place._replace(name=place.name.removeprefix(UND_PREFIX)).native()] = key
            else:
                mine[place.native()] = key
        return mine, theirs

    def add_patches(self, patches: dict, *args: Any, **kwargs: Any) -> list:
        """
        Raises:
            RequestError: another model is to be merged in that is not Lance, or Lance of another size.
        """
        self._check_merge(patches)
        mine, theirs = self._split(patches)
        taken = [
            mine[k] for k in super().add_patches({k: patches[v] for k, v in mine.items()}, *args, **kwargs)
        ]
        if theirs:
            given = {k: patches[v] for k, v in theirs.items()}
            for other in self._others():
                taken += [theirs[k] for k in other.add_patches(given, *args, **kwargs)]
        return taken

    def _check_merge(self, patches: dict) -> None:
        for key, value in patches.items():
            shape = merging.shape_given(value)
            if shape is None:
                continue
            name, known = PatchKey.of(key).name, merging.shape_of(self.model, key)
            if known is None:
                raise RequestError(
                    f"The models cannot be merged: the first is Lance, and the second has a weight "
                    f"{name[:100]!r}, which Lance has not. Merge Lance with Lance."
                )
            if known != shape:
                raise RequestError(
                    f"The models cannot be merged: {name[:100]} is {list(known)} in the first and "
                    f"{list(shape)} in the second. They are of different sizes; take two of one size."
                )

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        """What training puts on a weight.

        Raises:
            RequestError: the weight is kept in a form that no LoRA of its shape fits.
        """
        layer = self._layer(name)
        if isinstance(layer, OwnQuantLinear) and layer.format.per_byte > 1:
            raise RequestError(
                f"{name} is kept as {layer.format.name}, two weights to a byte, which this ComfyUI cannot "
                "train a LoRA on: load a checkpoint in bf16, or one converted to fp8 or int8."
            )
        super().add_weight_wrapper(name, function)

    # -- hooks -----------------------------------------------------------------------------------------------

    def add_hook_patches(self, hook: Any, patches: dict, *args: Any, **kwargs: Any) -> list:
        mine, theirs = self._split(patches)
        done = super().add_hook_patches(hook, {k: patches[v] for k, v in mine.items()}, *args, **kwargs)
        taken = [mine[k] for k in done]
        for other in self._others() if theirs else []:
            if self.hook_patches_backup is not None and other.hook_patches_backup is None:
                other.hook_patches_backup = create_hook_patches_clone(other.hook_patches)
            given = {k: patches[v] for k, v in theirs.items()}
            taken += [theirs[k] for k in other.add_hook_patches(hook, given, *args, **kwargs)]
        return taken

    def patch_hooks(self, hooks: Any) -> None:
        super().patch_hooks(hooks)
        for other in self._others():
            if other.hook_patches or other.hook_backup:
                other.patch_hooks(hooks)

    def prepare_hook_patches_current_keyframe(
        self, t: Any, hook_group: Any, *args: Any, **kwargs: Any
    ) -> None:
        before = [(hook, hook.strength) for hook in hook_group.hooks]
        super().prepare_hook_patches_current_keyframe(t, hook_group, *args, **kwargs)
        changed = [hook for hook, strength in before if hook.strength != strength]
        for other in self._others():
            for group in [g for g in other.cached_hook_patches if any(map(g.contains, changed))]:
                other.cached_hook_patches.pop(group)

    def restore_hook_patches(self) -> None:
        super().restore_hook_patches()
        for other in self._others():
            other.restore_hook_patches()

    def clear_cached_hook_weights(self) -> None:
        super().clear_cached_hook_weights()
        for other in self._others():
            other.clear_cached_hook_weights()

    def set_hook_mode(self, hook_mode: Any) -> None:
        super().set_hook_mode(hook_mode)
        for other in self._others():
            other.set_hook_mode(hook_mode)

    # -- weights of both ------------------------------------------------------------------------------------

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """This expert's weights, without the names that `LanceModel.state_dict` lends to LoRAs; asked by a
        prefix, as LoRA extraction does, both experts'.

        Raises:
            RequestError: both are wanted and a quantised layer is patched, whose difference to another
                cannot be told from what is stored.
        """
        own = {k: v for k, v in super().model_state_dict(filter_prefix).items() if v is not NO_WEIGHT}
        if filter_prefix is None:
            return own
        for patcher in (self, *self._others()):
            bad = next((key for key in patcher.patches if patcher._layer(key) is not None), None)
            if bad is not None:
                raise RequestError(
                    f"A LoRA cannot be extracted from quantised weights ({bad} is one): load the "
                    "checkpoints in bf16, subtract, and extract it from the difference."
                )
        lent = {
            f"{UND_PREFIX}{k}": v for other in self._others() for k, v in other.model_state_dict().items()
        }
        return own | {k: v for k, v in lent.items() if k.startswith(filter_prefix)}

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if not key.startswith(UND_PREFIX):
            return super().patch_weight_to_device(key, *args, **kwargs)
        (other,) = self._others()
        return other.patch_weight_to_device(key.removeprefix(UND_PREFIX), *args, **kwargs)

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list]:
        """For merge nodes, which ask by a prefix: both experts' weights with their patches. Without one
        ComfyUI asks for itself, and wants the weights of this patcher alone, by their own names.
        """
        if filter_prefix is None:
            return super().get_key_patches()
        return merging.key_patches(self, filter_prefix)

    # -- saving ----------------------------------------------------------------------------------------------

    def partially_load(self, *args: Any, **kwargs: Any) -> Any:
        # Older ComfyUIs ask the model itself for what is to be saved, which then has to know whose it is.
        self.model.loaded_by = weakref.ref(self)
        return super().partially_load(*args, **kwargs)

    def state_dict_for_saving(
        self, clip_state_dict: Any = None, vae_state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """What ModelSave and CheckpointSave write."""
        return saving.state_dict(self, clip_state_dict, vae_state_dict)
