"""`chat` as it is typed: lines in, a streamed conversation out."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from lance_core.cli.main import main
from lance_core.inputs import media


@pytest.fixture
def chat(golden, tmp_path, monkeypatch, capsys):
    """chat(lines, *args) -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        media.save_image(f"{i}.png", np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8))
    where = str(golden / "checkpoint" / "Lance_3B_Video")
    small = ("--max-new-tokens", "4", "--resolution", "image_256res", "--dtype", "fp32", "-q", "-m", where)

    def chat_(lines, *args):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = main(["chat", *small, *args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return chat_


def test_a_conversation(chat, video_lance):
    code, out, err = chat(["/image 0.png", "what?", "", "and why?"])
    more = {"max_new_tokens": 4, "resolution": "image_256res"}
    first = video_lance.understand("what?", images=["0.png"], **more)
    second = video_lance.understand("and why?", history=first.history, **more)
    assert (code, out, err) == (0, f"{first.text}\n{second.text}\n", "")


def test_what_is_kept_is_handed_on(chat, video_lance, monkeypatch):
    from lance_core.dialogue import understanding

    seen, resume = [], understanding.resume
    monkeypatch.setattr(understanding, "resume", lambda c, h, *rest: (seen.append(h), resume(c, h, *rest))[1])
    chat(["a", "b", "/new", "c"])
    assert seen[0] is None and seen[1].kept is not None and seen[2] is None


def test_it_streams(chat, monkeypatch):
    parts = []
    monkeypatch.setattr("builtins.print", lambda *a, end="\n", **k: parts.append((a, end)))
    chat(["hello"])
    assert len([a for a, end in parts if end == ""]) == 4


def test_saving_and_going_on(chat, tmp_path, video_lance):
    code, out, _ = chat(["what?", "/save c.json", "/save c.txt"], "--image", "0.png", "--image", "1.png")
    turns = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert code == 0 and [t["images"] for t in turns] == [["0.png", "1.png"]]
    text = (tmp_path / "c.txt").read_text(encoding="utf-8")
    assert text.startswith("[0.png]\n[1.png]\n> what?\n") and turns[0]["answer"] in text
    more = {"max_new_tokens": 4, "resolution": "image_256res"}
    expected = video_lance.understand("and?", history=turns, **more).text
    assert chat(["and?"], "--history", "c.json")[1] == f"{expected}\n"
    assert chat(["/load c.json", "and?"])[1] == f"{expected}\n"


def test_mistakes_are_said_and_the_conversation_goes_on(chat, tmp_path):
    (tmp_path / "bad.json").write_text('{"a": 1}')
    lines = [
        "/image no.png",
        "/nope",
        "/save",
        "/load bad.json",
        "/load no.json",
        "/save no/where.txt",
        "hello",
    ]
    code, out, err = chat(lines)
    assert code == 0 and len(out.splitlines()) >= 1
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    for line, words in zip(
        said,
        ("no.png", "/nope is no command", "/save needs a file", "no conversation", "no.json", "no/where"),
        strict=True,
    ):
        assert words in line.replace("\\", "/")


def test_json_is_one_object_at_the_end(chat):
    code, out, _ = chat(["hello", "/quit", "never asked"], "--json")
    result = json.loads(out)
    assert code == 0 and [t["question"] for t in result["turns"]] == ["hello"] and result["errors"] == 0


def test_help(chat):
    _, out, _ = chat(["/help"])
    assert all(word in out for word in ("/image FILE", "/save FILE", "/load FILE", "/new", "/quit"))
