"""Where a patch goes: to which expert, and to which rows of a joined projection.

ComfyUI keeps LoRAs as patches of weights by name. A MODEL of Lance has two patchers, the generation expert's
and, brought along by it, the understanding expert's; and projections that share an input are one layer. So a
patch is routed twice. With the released sizes, a LoRA on the understanding expert's `q_proj` of layer 0:

    name in the LoRA's file    diffusion_model.understanding.layers.0.self_attn.q_proj.weight
    by `Places`                diffusion_model.understanding.layers.0.self_attn.qkv_proj.weight, rows 0 to
    2048 by `ExpertRouting`         the other patcher's layers.0.self_attn.qkv_proj.weight, rows 0 to 2048
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lance_core.model.joined import Rows

UND = "lance_und"  # the key under which the MODEL brings the understanding expert's patcher along
OWN_PREFIX = "diffusion_model."
UND_PREFIX = "diffusion_model.understanding."  # how LoRAs name the other expert's layers
NO_WEIGHT = torch.empty(0)  # stands for weights whose names a state dict lends to LoRAs


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
        self._parts: dict[str, list[tuple[str, slice]]] = {}
        for part, (whole, rows) in self._rows.items():
            self._parts.setdefault(whole, []).append((part, rows))

    def __iter__(self) -> Iterator[str]:
        """The names of the projections."""
        return iter(self._rows)

    def parts(self, name: str) -> list[tuple[str, slice | None]]:
        """What a file calls the weight `name` of the MODEL: the projections that are joined in it with their
        rows, or itself.
        """
        return [*self._parts.get(name, [])] or [(name, None)]

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
