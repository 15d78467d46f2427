"""The in-process host itself, on stock nodes."""

from __future__ import annotations

import pytest
from inprocess import NodeFailedError, RejectedError

LATENT = {"1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32, "batch_size": 2}}}


def test_values_are_the_real_ones(comfy):
    latent = comfy.value(LATENT, "1")
    assert latent["samples"].shape == (2, 4, 4, 8)


def test_results_are_cached_until_forgotten(comfy):
    comfy.run(LATENT, [("1", 0)])
    assert "1" in comfy.run(LATENT, [("1", 0)]).cached
    comfy.forget()
    assert "1" not in comfy.run(LATENT, [("1", 0)]).cached


def test_bad_workflows_are_rejected(comfy):
    with pytest.raises(RejectedError, match="Value 0 smaller than min"):
        comfy.value(
            {"1": {"class_type": "EmptyLatentImage", "inputs": {"width": 0, "height": 32, "batch_size": 1}}},
            "1",
        )


def test_a_failing_node_raises_what_it_said(comfy):
    comfy.nodes["TestRaises"] = _Raises
    with pytest.raises(NodeFailedError, match="on purpose"):
        comfy.value({"1": {"class_type": "TestRaises", "inputs": {}}}, "1")


class _Raises:
    RETURN_TYPES = ("INT",)
    FUNCTION = "go"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def go(self):
        raise ValueError("on purpose")
