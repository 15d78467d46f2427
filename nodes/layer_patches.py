"""What nodes put on a model's layers, in ComfyUI's `transformer_options`: which of it our layers have a place
for, and how it is called there.

    patches_replace["dit"][("double_block", i)]   around layer i, as on Wan's
    patches["double_block"]                       after every layer, as on Wan's
    patches["attn1_output_patch"]                 between attention and what follows, as on Flux's
    optimized_attention_override                  in place of the attention function

Everything else is made for UNets or for layers that Lance does not have, and is not called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..lance_core.model.layer_hooks import Layer

BLOCK = "double_block"
OVERRIDE = "optimized_attention_override"
ATTENDED = "attn1_output_patch"
# Merge tokens before attention and part them after it: the second half fails without the first.
HALVES = ("attn1_patch", "attn2_patch")


@dataclass(frozen=True)
class LayerPatches:
    """The patches of one model call.

    around: by layer. after, attended: in the order they were put on. unused: the functions that nothing
    calls, each with the name of its place.
    """

    around: Mapping[int, Callable[..., Any]]
    after: tuple[Callable[..., Any], ...]
    attended: tuple[Callable[..., Any], ...]
    override: Any
    unused: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, options: Mapping[str, Any], layers: int) -> LayerPatches:
        """From `transformer_options`, for a model of so many layers."""
        patches, replace = options.get("patches") or {}, options.get("patches_replace") or {}
        blocks = replace.get("dit") or {}
        around = {k[1]: f for k, f in blocks.items() if k[0] == BLOCK and 0 <= k[1] < layers}
        halves = any(patches.get(name) for name in HALVES)
        attended = () if halves else tuple(patches.get(ATTENDED) or ())
        used = {BLOCK: True, ATTENDED: not halves}
        unused = [
            (name, f) for name, functions in patches.items() if not used.get(name) for f in functions or ()
        ]
        unused += [
            (f"{kind} {' '.join(map(str, where))}", f)
            for kind, places in replace.items()
            for where, f in (places or {}).items()
            # SkipLayerGuidance names blocks of a second kind beside the first; Wan has none either.
            if kind != "dit" or (where[0] == BLOCK and where[1] not in around) or not around
        ]
        after = tuple(patches.get(BLOCK) or ())
        return cls(around, after, attended, options.get(OVERRIDE), tuple(unused))

    @property
    def active(self) -> bool:
        """Whether anything is called in the layers."""
        return bool(self.around or self.after or self.attended or self.override)

    @property
    def effect(self) -> Any:
        """Equal for calls on which the patches have the same effect."""
        return self.around, self.after, self.attended, self.override

    def unused_text(self) -> str:
        """What nothing calls, by place and the file of the node: "attn1 middle 0 (nodes_pag)"."""
        # ComfyUI names the modules of nodes by their paths.
        files = [re.split(r"[./\\]", str(getattr(f, "__module__", "?")))[-1] for _, f in self.unused]
        named = [f"{place} ({file})" for (place, _), file in zip(self.unused, files, strict=True)]
        return ", ".join(dict.fromkeys(named))


class PatchedLayers:
    """`LayerHooks` of a model call that call its patches.

    x: the latent [b, 48, t, h, w]; time: [b, t] in 0..1. options: `transformer_options`, in which patches and
    attention backends look up the layer they are in.
    """

    def __init__(
        self, patches: LayerPatches, options: dict[str, Any], x: Tensor, time: Tensor, layers: int
    ) -> None:
        self.patches, self.options, self.x, self.time = patches, options, x, time
        options["total_blocks"], options["block_type"] = layers, "double"

    def around(self, index: int, und: Tensor, gen: Tensor, run: Layer) -> tuple[Tensor, Tensor]:
        self.options["block_index"] = index
        patches = self.patches
        if not (patches.around or patches.after):
            return run(und, gen)
        replace = patches.around.get(index)
        if replace is None:
            und, gen = _kept(run, und, gen)
        else:
            und, gen = self._replaced(replace, und, gen, run)
        for patch in patches.after:
            given = {"img": gen, "x": self.x, "vec": self.time, "block_index": index, "img_offset": 0}
            gen = patch({**given, "transformer_options": self.options})["img"]
        return und, gen

    def _replaced(
        self, replace: Callable[..., Any], und: Tensor, gen: Tensor, run: Layer
    ) -> tuple[Tensor, Tensor]:
        last = und

        def original(args: dict[str, Any]) -> dict[str, Any]:
            nonlocal last
            last, img = _kept(run, args["txt"], args["img"])
            return {"img": img, "txt": last}

        given = {"img": gen, "txt": und, "vec": self.time, "pe": None, "transformer_options": self.options}
        out = replace(given, {"original_block": original})
        return out.get("txt", last), out["img"]

    def attended(self, index: int, out: Tensor, split: int) -> Tensor:
        if not self.patches.attended:
            return out
        heads, width = out.shape[2:]
        # Who asks for `img_slice` leaves the markers alone.
        about = {"img_slice": [split, out.shape[1]], "n_heads": heads, "dim_head": width}
        options = {**self.options, **about, "block_index": index}
        flat = out.flatten(2)
        for patch in self.patches.attended:
            flat = patch(flat, options)
        return flat.unflatten(2, (heads, width))


def _kept(run: Layer, und: Tensor, gen: Tensor) -> tuple[Tensor, Tensor]:
    """A layer that leaves what it is given as it is, for patches that compare or keep it."""
    return run(und.clone(), gen.clone())
