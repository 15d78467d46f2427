"""scripts/comfyui.py: which version, and one base folder for each checkout. Needs no ComfyUI."""

from __future__ import annotations

import sys
from pathlib import Path

import comfyui as comfyui_script
import pytest


@pytest.fixture(autouse=True)
def no_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and no ComfyUI around the pack."""
    monkeypatch.setenv("LANCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("LANCE_COMFYUI", raising=False)
    monkeypatch.setattr(comfyui_script, "_enclosing_comfyui", lambda: None)


def test_every_checkout_has_a_base_folder_of_its_own(tmp_path):
    one, other = comfyui_script.base_folder(tmp_path / "one"), comfyui_script.base_folder(tmp_path / "other")
    assert one != other
    assert one == comfyui_script.base_folder(tmp_path / "one")


def test_start_is_refused_in_a_sentence_while_its_folder_is_in_use(monkeypatch, capsys):
    def must_not_touch(*args, **kwargs):
        raise AssertionError("the links of a running server were changed")

    monkeypatch.setattr(comfyui_script, "lay_out", must_not_touch)
    with comfyui_script.in_use(comfyui_script.base_folder()):
        assert comfyui_script.main(["start"]) == comfyui_script.EXIT_UNAVAILABLE
    assert "still runs" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are not inherited there")
def test_the_folder_is_free_again_afterwards():
    for _ in range(2):
        with comfyui_script.in_use(comfyui_script.base_folder()):
            pass


@pytest.mark.parametrize(
    ("asked", "versions"),
    [(None, ("oldest",)), ("oldest", ("oldest",)), ("newest", ("newest",)), ("both", ("oldest", "newest"))],
)
def test_versions_to_test_in(asked, versions, monkeypatch):
    if asked:
        monkeypatch.setenv("LANCE_COMFYUI", asked)
    assert comfyui_script.versions() == versions


def test_an_unknown_version_is_refused(monkeypatch):
    monkeypatch.setenv("LANCE_COMFYUI", "latest")
    with pytest.raises(comfyui_script.HostUnavailableError, match="none of oldest, newest, both"):
        comfyui_script.versions()


def test_the_oldest_serves_where_the_newest_cannot_be_had(monkeypatch):
    def prepare(version, *, may_build):
        if version == "newest":
            raise comfyui_script.HostUnavailableError("no network")
        return version

    monkeypatch.setattr(comfyui_script, "prepare", prepare)
    assert comfyui_script.prepare_newest() == "oldest"
