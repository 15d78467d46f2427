"""Shapes of ComfyUIs that are older or newer than those the tests run in, faked where our code meets them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import module, t2i


@pytest.fixture(scope="module")
def compat(comfy):
    return module(comfy, "nodes.comfy_compat")


@pytest.fixture(scope="module")
def main(comfy):
    """The MODEL's patcher."""
    return comfy.value(t2i(), "loader")


# -- attention -----------------------------------------------------------------------------------------------


def test_an_attention_that_takes_a_preference(compat, monkeypatch):
    """0.38's functions know `preferred_attention` and modules; a node's override is given all keywords."""
    seen = []

    def newest(
        q,
        k,
        v,
        heads,
        mask=None,
        attn_precision=None,
        skip_reshape=False,
        skip_output_reshape=False,
        low_precision_attention=True,
        preferred_attention=None,
        **kwargs,
    ):
        assert skip_reshape and skip_output_reshape and preferred_attention is None
        seen.append(kwargs)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    monkeypatch.setattr(compat, "optimized_attention", newest)
    q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 8)
    options = {"sigmas": None}
    assert compat.attention(q, k, k, False, options).shape == q.shape
    assert compat.attention(q, k, k, True, options).shape == q.shape
    assert compat.attention(q, k, k).shape == q.shape
    assert seen == [{"transformer_options": options}, {}, {}]


# -- context windows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"index_list": [3, 4]}, ((3, 4), False)),
        ({"index_list": [3, 4], "causal_anchor_index": None}, ((3, 4), False)),
        ({"index_list": [0, 1], "causal_anchor_index": -1}, ((0, 1), False)),
        ({"index_list": [3, 4], "causal_anchor_index": 2}, ((2, 3, 4), True)),
        ({"index_list": [1, 2], "causal_anchor_index": 0}, ((0, 1, 2), True)),
        ({"index_list": list(np.array([3, 4])), "modality_windows": {}}, ((3, 4), False)),
    ],
)
def test_windows_with_and_without_a_lead_in(comfy, compat, given, wanted):
    window = SimpleNamespace(dim=2, **given)
    assert compat.window_indices(window) == wanted
    found = module(comfy, "nodes.windows").Window.of({"context_window": window})
    assert found == (2, *wanted) and hash(found) == hash((2, *wanted))


def test_a_condition_that_is_cut_by_whoever_asks(comfy, main):
    """Newer ComfyUIs ask the model before they cut a condition, and name what is to be kept."""
    contexts = module(comfy, "nodes.contexts")
    clean = contexts.CleanCond([contexts.CleanPart(torch.zeros(1, 3), torch.zeros(1, 48, 3, 4, 4))])
    ask, x = main.model.resize_cond_for_context_window, torch.zeros(1, 48, 2, 4, 4)
    assert ask("lance_clean", clean, None, x, None) is clean
    assert ask("lance_clean", clean, None, x, None, retain_index_list=[]) is clean
    assert ask("lance_clean", clean, None, x, None, retain_index_list=[0]).retained
    assert ask("latent_shapes", object(), None, x, None, retain_index_list=[0]) is None


# -- models and patchers -------------------------------------------------------------------------------------


def test_memory_is_asked_for_with_more_keywords(main):
    plain = main.model.memory_required([2, 48, 1, 4, 4], cond_shapes={})
    newer = main.model.memory_required([2, 48, 1, 4, 4], cond_shapes={}, memory_efficient_attention=True)
    assert plain == newer > 0


def test_select_model_device_asks_for_the_dtypes(main):
    """0.38 looks for them at the model's configuration, to choose one that the device can compute in."""
    assert torch.float32 in main.model.model_config.supported_inference_dtypes


def test_options_that_newer_hosts_set_are_no_patches(comfy):
    patches = module(comfy, "nodes.layer_patches").LayerPatches
    options = {
        "prefetch_dynamic_vbars": True,
        "multigpu_thread_device": "cpu",
        "sigmas": None,
        "wrappers": {},
    }
    found = patches.of(options, 3)
    assert not found.unused and not found.active


def test_patches_that_were_taken_off_again(comfy):
    """Newer ComfyUIs leave empty lists and dictionaries behind."""
    patches = module(comfy, "nodes.layer_patches").LayerPatches
    found = patches.of(
        {"patches": {"attn1_patch": [], "middle_patch": None}, "patches_replace": {"attn1": {}}}, 3
    )
    assert not found.unused and not found.active


def test_patchers_without_the_words_for_it(compat):
    old = SimpleNamespace()
    assert not compat.is_dynamic(old) and compat.hook_strengths(old) == ()
    assert compat.hook_strengths(SimpleNamespace(current_hooks=None)) == ()
    hook = SimpleNamespace(strength=0.5)
    group = SimpleNamespace(current_hooks=SimpleNamespace(hooks=[hook]))
    before = compat.hook_strengths(group)
    hook.strength = 0.25
    assert [s for _, s in before] == [0.5] and [s for _, s in compat.hook_strengths(group)] == [0.25]


def test_rope_options_in_part(compat):
    assert compat.grid_scale({}) is compat.grid_scale({"rope_options": None}) is None
    assert compat.grid_scale({"rope_options": {"scale_x": 1.0, "shift_t": 0.0}}) is None
    found = compat.grid_scale({"rope_options": {"scale_x": 2.0, "shift_t": 1.0}})
    assert found.scale == (1.0, 1.0, 2.0) and found.shift == (1.0, 0.0, 0.0)


def test_clones_hand_on_what_a_newer_constructor_needs(comfy):
    """0.38's patchers are made with `fast_disk`, which their clones hand on."""
    behaviour = module(comfy, "nodes.patcher")

    class Newer:
        def __new__(cls, model, size=0, fast_disk=False):
            return super().__new__(cls)

        def __init__(self, model, size=0, fast_disk=False):
            self.model, self.size, self.fast_disk = model, size, fast_disk

        def clone(self, disable_dynamic=False, model_override=None, force_deepcopy=False):
            return self.__class__(self.model, self.size, fast_disk=self.fast_disk)

    made = behaviour._patcher_subclass(behaviour.PatchesInForward, Newer)("model", 1, fast_disk=True)
    copy = made.clone().clone()
    assert copy.fast_disk and isinstance(copy, behaviour.PatchesInForward) and isinstance(copy, Newer)
