"""The layers everything is built from. Together with attention.py it is the one place where ComfyUI, a weight
format or a faster kernel comes in.

A module takes `ops`, an object with the layer classes below, and never names torch.nn layers itself.
ComfyUI's `comfy.ops.manual_cast` has the same classes, so that ComfyUI can cast, offload and patch the
weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Rows of the markers of a guided step and fewer. Measured with MKL: 3.2 times as fast for 2 rows, 1.6 for 4,
# and from 6 on no more.
FEW_ROWS = 4 if torch.backends.mkl.is_available() else 0


class _NoInit:
    """Skips torch's initialisation: weights always come from a file."""

    def reset_parameters(self) -> None:
        return None


class TorchOps:
    """Plain torch layers: the default `ops`."""

    class Linear(_NoInit, nn.Linear):
        """x W^T + b."""

        def forward(self, x: Tensor) -> Tensor:
            return few_rows(x, self.weight, self.bias) if are_few(x) else super().forward(x)

    class Embedding(_NoInit, nn.Embedding):
        pass

    class Conv2d(_NoInit, nn.Conv2d):
        pass

    class Conv3d(_NoInit, nn.Conv3d):
        pass

    class RMSNorm(_NoInit, nn.RMSNorm):
        """Root-mean-square norm over the last axis, reduced in float32 whatever the weights' dtype."""


def are_few(x: Tensor) -> bool:
    """Whether `few_rows` is faster: for a few rows of float32 on a CPU, which MKL multiplies row by row."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and 1 < x.numel() // x.shape[-1] <= FEW_ROWS
    )


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x [..., in], as weight [out, in] times x's rows as columns."""
    rows = (weight @ x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    return (rows if bias is None else rows + bias).view(*x.shape[:-1], -1)
