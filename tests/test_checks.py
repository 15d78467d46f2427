"""What a caller gives: taken as the number, text or choice it is, or refused in a sentence."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lance_core import CheckpointError, RequestError, checks


class Rude:
    """Fails at everything one may do with it."""

    def _fail(self, *args):
        raise ValueError("no")

    __repr__ = __float__ = __index__ = __iter__ = __eq__ = __len__ = __bool__ = _fail
    __hash__ = object.__hash__


ODD = [
    None,
    True,
    "3",
    b"3",
    "",
    [],
    [3],
    (1, 2, 3),
    {},
    {"a": 1},
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    -(10**400),
    10**5000,
    1e-320,
    1j,
    object(),
    Rude(),
    Rude,
    torch.zeros(2),
    torch.tensor([]),
    np.zeros(3),
    np.float64("nan"),
    range(3),
    lambda: 3,
    "x" * 100_000,
]


@pytest.mark.parametrize("index", range(len(ODD)))
def test_nothing_but_a_request_error_comes_of_odd_values(index):
    value = ODD[index]
    for check in (
        lambda: checks.whole("steps", value, 1, 1000),
        lambda: checks.real("shift", value, above=0),
        lambda: checks.real("cfg", value, 0, 100),
        lambda: checks.interval("cfg_interval", value, 0, 1),
        lambda: checks.choice("renorm", value, ("global", "none")),
        lambda: checks.text("prompt", value),
        lambda: checks.function("callback", value, "step, total"),
    ):
        try:
            check()
        except RequestError as error:
            assert len(str(error)) < 500 and "\n" not in str(error)


def test_a_function_that_takes_other_arguments_is_refused_before_the_work():
    for taken in (None, print, lambda step, total: 0, lambda *given: 0, lambda a, b, c=1: 0, dict, max):
        assert checks.function("callback", taken, "step, total") is taken
    for refused in (len, lambda: 0, lambda step: 0, lambda a, b, *, c: 0):
        with pytest.raises(RequestError, match=r"callback is called with \(step, total\), which"):
            checks.function("callback", refused, "step, total")


def test_a_message_is_never_too_long_and_keeps_both_ends():
    name = "layers." * 400
    error = CheckpointError(f"x.safetensors has an unexpected tensor {name}. Download it again.")
    assert len(str(error)) < 500
    assert str(error).startswith("x.safetensors has") and str(error).endswith(". Download it again.")
    assert str(RequestError("short")) == "short"
    path = "/models/" + "x" * 600
    refused = str(CheckpointError(f"{path} cannot be written: {path!r} is too long"))
    assert len(refused) < 500 and "… " not in refused[:20] and " cannot be written: " in refused
    many = str(CheckpointError("a b " * 400 + "the end"))
    assert len(many) < 500 and many.startswith("a b") and many.endswith("the end")


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3), torch.tensor(3), torch.tensor(3.0)])
def test_every_kind_of_three_is_three(value):
    number = checks.whole("steps", value, 1, 10)
    assert type(number) is int and number == 3
    again = checks.real("shift", value, above=0)
    assert type(again) is float and again == 3
    json.dumps([number, again])


def test_ranges_say_what_came_and_what_was_expected():
    for call, words in (
        (lambda: checks.whole("steps", 0, 1, 1000), ("steps is 0", "whole number from 1 to 1000")),
        (lambda: checks.whole("steps", 2.5, 1, 1000), ("steps is 2.5",)),
        (lambda: checks.real("shift", 0, above=0), ("shift is 0", "above 0")),
        (lambda: checks.real("cfg", -1, 0, 100), ("cfg is -1", "from 0 to 100")),
        (lambda: checks.real("top_p", 1.5, 0, 1, above=0), ("top_p is 1.5", "above 0 and at most 1")),
        (lambda: checks.interval("cfg_interval", (0.9, 0.1), 0, 1), ("(0.9, 0.1)", "0 <= low <= high <= 1")),
        (lambda: checks.choice("renorm", "x", ("global", "none")), ("'x'", "global, none")),
        (lambda: checks.text("The prompt", 5), ("The prompt is int", "expected text")),
        (lambda: checks.text("prompt", "a \ud83d b"), ("U+D83D", "place 3", "UTF-8")),
    ):
        with pytest.raises(RequestError) as caught:
            call()
        assert all(word in str(caught.value) for word in words), caught.value


@given(st.text())
def test_any_text_without_surrogates_is_taken_as_it_is(value):
    assert checks.text("prompt", value) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_taken_as_they_are(value):
    assert checks.real("x", value) == value
