"""LoRA files under all the names that trainers give them -> the names ComfyUI's loader knows for Lance.

A key of a LoRA file is a module's name and what is stored for it:

    base_model.model.language_model.model.layers.3.mlp_moe_gen.up_proj   .lora_A.default.weight
    lora_unet_layers_3_mlp_up_proj                                       .lora_down.weight

Modules are known by our names (`layers.3.mlp.up_proj` of the generation expert, `understanding.layers.…` of
the other) and by the released ones, with dots or, after `lora_unet_` and the like, underscores. What is
stored keeps the name ComfyUI has for it. Plain data in and out: nothing here needs a model, or ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..lance_core.checkpoint.checkpoint import released_name
from ..lance_core.errors import RequestError

LENT = "diffusion_model."  # how ComfyUI begins the names of a model's modules
UND = "understanding."
# What trainers put in front of names; any of them, again and again.
PREFIXES = (
    "base_model.model.",
    "base_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "model.diffusion_model.",
)
FLAT_PREFIXES = (
    "lora_unet_",
    "lora_transformer_",
    "lora_prior_unet_",
    "lycoris_",
    "diffusion_model_",
    "transformer_",
)
RELEASED = ("language_model.", "language_model.model.")  # how much of a released name some files leave out
# What is stored for a module, with the names it has in ComfyUI. `NAME` is that of an adapter in PEFT's files.
STORED = re.compile(
    r"\.(?P<peft>lora_[AB]|lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?$"
    r"|(?P<plain>\.(?:lora_(?:up|down|mid)\.weight|lora\.(?:up|down)\.weight|lora_linear_layer\.(?:up|down)\.weight"
    r"|alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|reshape_weight|hada_w[12]_[ab]|hada_t[12]"
    r"|lokr_w[12](?:_[ab])?|lokr_t2|oft_blocks|rescale|[ab][12]\.weight)|_lora\.(?:up|down)\.weight)$"
)
MAGNITUDE = ".lora_magnitude_vector"
OUTPUT_SIDE = (
    ".lora_up.weight",
    ".lora_B.weight",
    ".lora.up.weight",
    "_lora.up.weight",
    ".lora_linear_layer.up.weight",
)
BY_ROWS = (*OUTPUT_SIDE, ".diff", ".diff_b", ".set_weight", MAGNITUDE, ".dora_scale")
WHOLE = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora.down.weight",
    "_lora.down.weight",
    ".lora_linear_layer.down.weight",
)
ON_EACH = (*WHOLE, ".alpha")
FITS = (
    "Lance's LoRAs name its layers as the released file does (language_model.model.layers.0.self_attn."
    "q_proj_moe_gen) or as this pack does (layers.0.self_attn.q_proj, understanding.layers.0.…)"
)


@dataclass(frozen=True)
class Renamed:
    """A LoRA file's tensors under ComfyUI's names, those of no layer of ours as they were.

    matched: how many are of a layer of ours. magnitudes: of PEFT's DoRAs, by the module's name with `LENT`.
    """

    tensors: dict[str, Tensor]
    matched: int
    magnitudes: dict[str, Tensor]


class Names:
    """The modules of one MODEL, and all the names they go by.

    modules: our names, without `LENT`; joined layers and the projections in them both. apart: joined layers
    that this model has not, because its projections are quantised -> these with their rows.
    """

    def __init__(
        self, modules: Iterable[str], apart: Mapping[str, Sequence[tuple[str, slice]]] | None = None
    ) -> None:
        self.apart = dict(apart or {})
        self.modules = {*modules, *self.apart}
        self._ours = {name.replace(".", "_"): name for name in self.modules}
        self._released: dict[str, str] = {}
        for name in self.modules:
            released = _released(name)
            for left_out in ("", *RELEASED):
                if released.startswith(left_out):
                    self._released.setdefault(released.removeprefix(left_out), name)
        self._released |= {name.replace(".", "_"): ours for name, ours in self._released.items()}

    def module(self, name: str, released: bool) -> str | None:
        """Which of our modules a file means by a name; None if none.

        released: the file uses released names, in which `layers.0…` without `_moe_gen` is the understanding
        expert's; in ours it is the generation expert's.
        """
        name = _without(name, PREFIXES)
        flat = _without(name, FLAT_PREFIXES)
        if flat != name or "." not in name:
            ways = ((self._released, flat), (self._ours, flat))
        else:
            ways = ((self._released, name), ({n: n for n in (name,) if n in self.modules}, name))
        for known, key in ways if released else reversed(ways):
            if key in known:
                return known[key]
        return None

    def rename(self, lora: Mapping[str, Tensor]) -> Renamed:
        """A LoRA file for ComfyUI's loader.

        Raises:
            RequestError: it holds two LoRAs for one layer, or one for a joined layer that cannot be divided
                among quantised projections.
        """
        released = any("_moe_gen" in key for key in lora)
        tensors, magnitudes, matched = {}, {}, 0
        adapters: dict[str, str] = {}
        for key, tensor in lora.items():
            split = _split(key)
            module = self.module(split.module, released) if split else None
            if split is None or module is None:
                tensors[key] = tensor
                continue
            earlier = adapters.setdefault(f"{module}{split.stored}", key)
            if earlier != key:
                raise RequestError(
                    f"The LoRA file holds two LoRAs for {module}: {earlier[:90]} and {key[:90]}. Take the "
                    "one you want out of it with the program that made it."
                )
            matched += 1
            for name, part in self._divided(module, split.stored, tensor):
                if split.stored == MAGNITUDE:
                    magnitudes[f"{LENT}{name}"] = part.reshape(-1, 1)
                else:
                    tensors[f"{LENT}{name}{split.stored}"] = part
        return Renamed(tensors, matched, magnitudes)

    def _divided(self, module: str, stored: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """What is stored for a module, by the modules it goes to: one, or the parts of one that is not joined
        here.
        """
        if module not in self.apart:
            return [(module, tensor)]
        if stored in ON_EACH:
            return [(part, tensor) for part, _ in self.apart[module]]
        parts = self.apart[module]
        if stored in BY_ROWS and len(tensor) == parts[-1][1].stop:
            return [(part, tensor[rows]) for part, rows in parts]
        raise RequestError(
            f"The LoRA has {module}{stored}, of a layer whose parts are quantised one by one in this "
            "checkpoint and which cannot be divided: load the checkpoint in bf16 for this LoRA."
        )


@dataclass(frozen=True)
class _Key:
    """A key of a LoRA file, taken apart."""

    module: str
    stored: str


def _split(key: str) -> _Key | None:
    found = STORED.search(key)
    if found is None:
        return None
    module = key[: found.start()]
    if found["plain"]:
        return _Key(module, found["plain"])
    if found["peft"] == "lora_magnitude_vector":
        return _Key(module, MAGNITUDE)
    return _Key(module, f".{found['peft']}.weight")


def _without(name: str, prefixes: Sequence[str]) -> str:
    while True:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)


def _released(name: str) -> str:
    """Our name of a module -> the released one."""
    generation = not name.startswith(UND)
    stored = released_name(f"{name.removeprefix(UND)}.weight", generation)
    return stored.removesuffix(".weight")


def refusal(lora: Mapping[str, Tensor]) -> RequestError:
    """What to say of a file of which nothing is for Lance."""
    modules = dict.fromkeys(split.module for key in lora if (split := _split(key)))
    if not modules:
        shown = ", ".join(key[:60] for key in [*lora][:3]) or "nothing"
        return RequestError(
            f"The file is no LoRA that can be read: it holds {shown}. Choose a LoRA that was made for Lance."
        )
    shown = ", ".join(name[:60] for name in [*modules][:3])
    more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    return RequestError(
        f"Nothing in the LoRA fits Lance: it is for {shown}{more}, layers of another model. {FITS}."
    )
