"""The plain path's small steps as one kernel each, where Triton is: on CUDA, without autograd.

`usable` decides; whoever calls has the plain steps beside it. ComfyUI's torch brings Triton on Linux; it is
never required. A kernel that does not compile (no C compiler, no Python headers, an old card) switches all of
them off for the process, with one warning. `LANCE_TRITON=0` does so from the start.

With `TRITON_INTERPRET=1` the kernels run on a CPU, slowly, for tests.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 1 << 14  # numbers of a row that one program holds
BLOCK = 1024  # numbers a program of an element-wise kernel takes
POINT_NUMBERS = 1 << 13  # numbers a program of the VAE's norm takes

Watcher = Callable[[str, Sequence[Tensor], Sequence[Tensor]], None]
_watcher: Watcher | None = None
_broken = False


@contextmanager
def counted_on_meta(watch: Watcher) -> Any:
    """While entered, tensors of the meta device take these kernels, too, and `watch` is told each: its name,
    what it reads, what it writes.
    """
    global _watcher
    before, _watcher = _watcher, watch
    try:
        yield
    finally:
        _watcher = before


def usable(x: Tensor) -> bool:
    """Whether x's device and dtype can take these kernels now."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype not in DTYPES:
        return False
    if x.is_meta:
        return _watcher is not None
    return (x.is_cuda or (x.is_cpu and _interpreting())) and not _broken and _triton() is not None


@cache
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton() -> ModuleType | None:
    """The kernels, or None where Triton is absent or not wanted."""
    if os.environ.get("LANCE_TRITON") == "0":
        return None
    try:
        from . import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def _launch(
    name: str,
    grid: tuple[int, ...],
    read: Sequence[Tensor],
    written: Sequence[Tensor],
    *numbers: float,
    rewritten: Sequence[Tensor] = (),
    **sizes: int | bool,
) -> bool:
    """Run a kernel. False if it could not be built: then none will be used again, and nothing is written.

    rewritten: which of those it reads it writes, too.
    """
    global _broken
    if read[0].is_meta:
        if _watcher is not None:
            _watcher(name, read, [*written, *rewritten])
        return True
    try:
        with torch.cuda.device(read[0].device) if read[0].is_cuda else _nowhere():
            getattr(_triton(), name)[grid](*read, *written, *numbers, **sizes)
    except Exception as error:  # whatever a compiler, a driver or a card lacks has an exception of its own
        _broken = True
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        log.warning("Triton kernels are off, the plain ones are used: %s fails here (%s)", name, reason)
        return False
    return True


@contextmanager
def _nowhere() -> Any:
    yield


def weight_of(module: nn.Module, like: Tensor) -> Tensor | None:
    """A layer's weight, if it can be read as it lies; None where the layer would cast, fetch or patch it, as
    ComfyUI's may (they say so by `ready_weight`).
    """
    ready = getattr(module, "ready_weight", None)
    weight = module.weight if ready is None else ready()
    return weight if isinstance(weight, Tensor) and weight.device == like.device else None


def silu_mul(gate: Tensor, up: Tensor) -> Tensor | None:
    """silu(gate) * up of [n, inner] each, rows of any stride; None if the kernel cannot be built."""
    n, inner = gate.shape
    out = gate.new_empty(n, inner)
    done = _launch(
        "silu_mul",
        (n, math.ceil(inner / BLOCK)),
        (gate, up),
        (out,),
        *(inner, gate.stride(0), up.stride(0), inner),
        BLOCK=BLOCK,
    )
    return out if done else None


def add_norm(x: Tensor, add: Tensor, norm: nn.RMSNorm) -> Tensor | None:
    """x += add, both [..., width] in contiguous rows, and the norm of x; None, and x as it was, if the kernel
    cannot be built or the norm's weight is not at hand.
    """
    width, weight = x.shape[-1], weight_of(norm, x)
    if weight is None or width > WIDEST or not (x.is_contiguous() and add.is_contiguous()):
        return None
    normed = torch.empty_like(x)
    done = _launch(
        "add_norm",
        (x.numel() // width,),
        (x, add, weight),
        (normed,),
        *(width, norm.eps or 0.0, width, width),
        rewritten=(x,),
        BLOCK=_power(width),
    )
    return normed if done else None


def norm_rope(
    qkv: Sequence[Tensor],
    norms: Sequence[nn.RMSNorm],
    cos: Tensor,
    sin: Tensor,
    out: Sequence[Tensor],
) -> bool:
    """Normed and rotated queries and keys, and values, written to `out`. False if the kernel cannot be built
    or a norm's weight is not at hand.

    qkv: three of [b, n, heads * width], rows of any stride; norms: of queries and of keys; cos, sin: float32
    [b or 1, n, width]; out: three of [b, n, heads, width], heads contiguous.
    """
    q_out, k_out, v_out = out
    b, n, heads, width = q_out.shape
    kv_heads, half = k_out.shape[2], width // 2
    fits = half & (half - 1) == 0 and all(t.stride(3) == 1 and t.stride(2) == width for t in out)
    rows = [t.flatten(0, 1) for t in qkv]
    weights = [weight for norm in norms if (weight := weight_of(norm, q_out)) is not None]
    if len(weights) < 2 or not fits or cos.stride(-1) != 1 or sin.stride() != cos.stride():
        return False
    table = (0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1))
    strides = [stride for t in out for stride in t.stride()[:2]]
    return _launch(
        "norm_rope",
        (b * n,),
        (*rows, *weights, cos, sin),
        tuple(out),
        *(norms[0].eps or 0.0, n, heads, kv_heads, *(t.stride(0) for t in rows), *table, *strides),
        HEADS=_power(heads),
        KV_HEADS=_power(kv_heads),
        HALF=half,
    )


def channel_norm_silu(x: Tensor, gamma: Tensor, out: Tensor, silu: bool) -> bool:
    """The VAE's norm over channels (streaming.ChannelNorm), and SiLU, of [b, c, ..., h, w] whose channels lie
    together, written to `out`. False if the layout is another or the kernel cannot be built.
    """
    channels = x.shape[1]
    points = x[0, 0].numel()
    if channels > WIDEST or not (_points_together(x) and _points_together(out)):
        return False
    block = max(1, POINT_NUMBERS // _power(channels))
    return _launch(
        "channel_norm_silu",
        (math.ceil(points / block), x.shape[0]),
        (x, gamma),
        (out,),
        *(points, channels, math.sqrt(channels), x.stride(0), out.stride(0)),
        SILU=silu,
        POINTS=block,
        CHANNELS=_power(channels),
    )


def _points_together(x: Tensor) -> bool:
    """Whether a result's points follow each other in memory, each with its channels together."""
    expected = x.shape[1]
    for size, stride in reversed(list(zip(x.shape[2:], x.stride()[2:], strict=True))):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return x.stride(1) == 1 or x.shape[1] == 1


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
