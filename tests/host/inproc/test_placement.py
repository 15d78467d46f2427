"""What goes where when memory is short: the generation expert before the understanding expert, in the host's
own accounts.
"""

from __future__ import annotations

import pytest
import torch
from small import away, lance, question, samples, t2i

GB = 1 << 30


@pytest.fixture(scope="module")
def wanted(comfy):
    return samples(comfy, lance(t2i()))


@pytest.fixture
def card(comfy, monkeypatch):
    """(gigabytes) -> patchers of both experts, loaded from now on as on a card of that size, as if the
    generation expert had 4 GB.

    The accounts are ComfyUI's; what is faked is the device they are of.
    """
    import comfy.model_management as mm

    def card(gigabytes: float):
        main = comfy.value(t2i(), "loader")
        und = main.get_additional_models_with_key("lance_und")[0]
        scale, size = 4 * GB / main.model_size(), mm.module_size

        def free(device=None, torch_free_too: bool = False):
            left = gigabytes * GB - main.loaded_size() - und.loaded_size()
            return (left, 0) if torch_free_too else left

        for patcher in (main, und):
            monkeypatch.setattr(patcher, "size", int(patcher.size * scale))
            monkeypatch.setattr(
                patcher, "load_device", torch.device("cpu", 0)
            )  # not the one that the host takes to be no card
        monkeypatch.setattr(mm, "get_free_memory", free)
        monkeypatch.setattr(mm, "module_size", lambda module: int(size(module) * scale))
        monkeypatch.setattr(mm, "is_device_cpu", lambda device: False)
        monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
        for reserve in ("minimum_inference_memory", "extra_reserved_memory"):
            monkeypatch.setattr(mm, reserve, lambda: 0)
        return main, und

    comfy.forget()
    yield card
    comfy.forget()


@pytest.mark.parametrize("answered_before", [False, True])
@pytest.mark.parametrize("gigabytes", [6.0, 4.5, 2.0])
def test_the_understanding_expert_gives_way(comfy, wanted, card, gigabytes, answered_before):
    main, und = card(gigabytes)
    if answered_before:
        comfy.value(question(), "answer")
        assert und.loaded_size() > 0.5 * min(und.size, gigabytes * GB), (
            "for a question it may take what there is"
        )
    for seed in (7, 8, 7):  # and again, with what the first time has left behind
        found = samples(comfy, lance(t2i(), seed=seed))
        generation, understanding = main.loaded_size() / main.size, und.loaded_size() / und.size
        print(f"{gigabytes} GB: {generation:.2f} of generation, {understanding:.2f} of understanding")
        if gigabytes > 4:
            assert generation > 0.99, "whole on the card"
            assert understanding < 0.5, "and what is left for the other"
            assert understanding > 0.1 or gigabytes < 5, "but that wholly, less what the host keeps free"
        else:
            assert generation > 0.3 and understanding < 0.1
    assert away(found, wanted) < 1e-5
