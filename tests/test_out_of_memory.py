"""Memory that runs out: less at a time where that gives the same, a sentence where not, and the next request
right.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lance_core
from lance_core import RequestError
from lance_core.model.dual_expert import DualExpert
from lance_core.model.out_of_memory import is_out_of_memory
from lance_core.model.sequence import Role
from lance_core.model.vit import VisionTower
from lance_core.vae.wan import WanVAE

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    MemoryError(),
]
SMALL = {"width": 64, "height": 64, "steps": 1}
CLIP = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), np.uint8)


@pytest.fixture
def lance(golden):
    return lance_core.load(golden / "checkpoint" / "Lance_3B_Video", dtype=torch.float32)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_it_is_told_from_other_errors(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def failing(monkeypatch, kind, method, when, error):
    """Have a method raise while `when(arguments)` holds. Returns the sizes it was called with."""
    plain, seen = getattr(kind, method), []

    def call(self, x, *args, **kwargs):
        seen.append(tuple(x.shape) if isinstance(x, torch.Tensor) else None)
        if when(x):
            raise error
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(kind, method, call)
    return seen


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_the_vit_takes_fewer_frames_at_a_time(lance, monkeypatch, error):
    with torch.inference_mode():
        whole = lance.components.vit_segment(CLIP, "video_192p", Role.QUESTION)
        patches = whole.grid[1] * whole.grid[2] * 4
        seen = failing(monkeypatch, VisionTower, "forward", lambda x: len(x) > 2 * patches, error)
        again = lance.components.vit_segment(CLIP, "video_192p", Role.QUESTION)
    assert whole.grid[0] == 5 and len(seen) > 3
    torch.testing.assert_close(again.data, whole.data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", ERRORS[1:], ids=repr)
@pytest.mark.parametrize("method", ["_decode", "_encode"])
def test_the_vae_goes_on_in_tiles_on_a_cpu(lance, monkeypatch, method, error):
    plain, tiles = getattr(WanVAE, method), []

    def work(self, x, tile, *args):
        tiles.append(tile)
        if tile is None:
            raise error
        return plain(self, x, tile, *args)

    monkeypatch.setattr(WanVAE, method, work)
    vae = lance.components.vae
    if method == "_decode":
        vae.decode(torch.zeros(1, 48, 1, 20, 20))
    else:
        vae.encode(torch.zeros(1, 3, 1, 320, 320))
    assert tiles[0] is None and tiles[1] == 10


@pytest.mark.parametrize("where", [(DualExpert, "velocity"), (WanVAE, "decode")], ids=lambda w: w[1])
def test_elsewhere_it_is_a_sentence_and_the_next_request_is_right(lance, monkeypatch, where):
    wanted = lance.generate("t2i", "a fox", **SMALL).latent
    with monkeypatch.context() as patch:
        failing(patch, *where, lambda x: True, ERRORS[1])
        with pytest.raises(RequestError, match="memory ran out while generating; ask for fewer pixels"):
            lance.generate("t2i", "a fox", **SMALL)
    assert torch.equal(lance.generate("t2i", "a fox", **SMALL).latent, wanted)


def test_a_question_that_does_not_fit(lance, monkeypatch):
    failing(monkeypatch, VisionTower, "forward", lambda x: True, ERRORS[0])
    with pytest.raises(RequestError, match="memory ran out while answering; choose a smaller resolution"):
        lance.understand("what?", image=CLIP[0], resolution="image_256res")


def test_other_errors_are_not_called_so(lance, monkeypatch):
    failing(monkeypatch, DualExpert, "velocity", lambda x: True, RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        lance.generate("t2i", "a fox", **SMALL)
