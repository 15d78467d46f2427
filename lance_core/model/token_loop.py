"""One text token after another behind a question; the rope tables are made once for all of them.

The plain loop attends to the tokens so far, and grows. The fixed loop always attends to the whole room with
the free slots masked, and keeps its state on the device: every step has the same shapes and addresses, so
that a GPU can record it as a graph and replay it without Python.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rope
from .decoder import run_layers
from .dual_expert import DualExpert
from .kv_cache import AppendToken, Context

WARM_UPS = 3  # before recording, so that libraries and compilers have chosen their kernels


class TokenLoop:
    """Calls take the last token and give float32 logits [vocabulary] for the next, which the following call
    overwrites.

    Args:
        model: its understanding expert writes.
        context, position: from `DualExpert.read`; the context's free room is the number of calls there can
            be.
        fixed: steps of one shape, recorded as a graph on CUDA. They give what plain ones give, up to
            rounding.
    """

    def __init__(self, model: DualExpert, context: Context, position: int, fixed: bool = False) -> None:
        self.model, self.context, self.fixed = model, context, fixed
        self.room = context.prefix.free
        self.done, device = 0, model.device
        at = torch.arange(position, position + max(self.room, 1)).expand(3, -1)
        self.cos, self.sin = (t[:, None] for t in rope.tables(at, model.config, device))  # [room, 1, width]
        if fixed:
            self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
            self.step = torch.zeros(1, dtype=torch.long, device=device)
            self.attend = AppendToken(context, device, model.dtype)
            self.recorded = self._record() if device.type == "cuda" and self.room else None

    def __call__(self, token: int) -> Tensor:
        """Append a token.

        Raises:
            ValueError: the room is used up.
        """
        if self.done >= self.room:
            raise ValueError(
                f"{self.room} tokens fit behind this context, and one more was asked for; read it with more "
                "room"
            )
        if not self.fixed:
            logits = self._plain(token)
        else:
            self.token.fill_(token)
            if self.recorded is None:
                logits = self._fixed()
            else:
                graph, logits = self.recorded
                graph.replay()
            self.context.prefix.filled += 1
        self.done += 1
        return logits

    def _plain(self, token: int) -> Tensor:
        model, i = self.model, self.done
        with self.context.extend(self.context.prefix, 1, True, model.attention) as attend:
            hidden, _ = run_layers(
                model.und.layers,
                None,
                model.embed([token]),
                None,
                self.cos[i : i + 1],
                self.sin[i : i + 1],
                attend,
            )
        return model.logits(hidden)

    def _fixed(self) -> Tensor:
        """Append `token` and count on, all of it on the device."""
        model = self.model
        self.attend.show()
        cos, sin = (table.index_select(0, self.step) for table in (self.cos, self.sin))
        und = model.und.embed_tokens(self.token).to(model.dtype)
        hidden, _ = run_layers(model.und.layers, None, und, None, cos, sin, self.attend)
        logits = model.logits(hidden)
        self.attend.slot += 1
        self.step += 1
        return logits

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A step as a CUDA graph and where it leaves its logits (docs.pytorch.org, "CUDA Graphs"). The state
        is as before.
        """
        state = (self.attend.slot, self.step, self.attend.bias)
        before = [t.clone() for t in state]

        def restore() -> None:
            for now, was in zip(state, before, strict=True):
                now.copy_(was)

        with torch.cuda.device(self.model.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._fixed()
                    restore()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._fixed()
            restore()
        return graph, logits
