"""The campaigns of tests/fuzz, short: nothing untyped, no hang, nothing large, no dead worker."""

from __future__ import annotations

from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
CASES = {"media": 400, "checkpoints": 150, "requests": 120}


@pytest.mark.parametrize("campaign", CASES)
def test_a_short_campaign(campaign, monkeypatch):
    monkeypatch.syspath_prepend(str(FUZZ))
    import runner

    found = runner.run(campaign, CASES[campaign], seed=1, jobs=2)
    assert found["bad"] == []
    assert sum(found["counts"].values()) == CASES[campaign]
    assert found["counts"]["typed"] > 0 and found["counts"]["done"] > 0, "both kinds are met"
