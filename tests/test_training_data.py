"""Data sets in all their forms: what their rows are, and what is said of rows that cannot be used."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import training_cases as cases
from PIL import Image

from lance_core import RequestError
from lance_core.cli.main import main
from lance_core.inputs import media
from lance_core.training import conversion, inspection
from lance_core.training.dataset import read, require
from lance_core.training.rows import source_of


def picture(path, size=(48, 32), colour=(200, 40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def clip(path, frames=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    moving = np.zeros((frames, 32, 48, 3), np.uint8)
    for i, frame in enumerate(moving):
        frame[:, 4 * i : 4 * i + 8] = 255
    media.save_video(path, moving, 12)
    return path


def captioned(folder, count=3, **options):
    for i in range(count):
        picture(folder / f"p{i}.png", **options).with_suffix(".txt").write_text(f" picture {i}\n")
    return folder


def told(found):
    return [(r.name, r.task, r.text, r.repeats) for r in found.rows]


def test_a_folder_with_captions(tmp_path):
    captioned(tmp_path, 2)
    clip(tmp_path / "moving.mp4").with_suffix(".txt").write_text("it moves", encoding="utf-8-sig")
    captioned(tmp_path / "3_dog", 1)
    picture(tmp_path / ".hidden" / "a.png")
    (tmp_path / "notes.md").write_text("no media")
    found = read(tmp_path)
    assert not found.problems
    assert told(found) == [
        ("3_dog/p0.png", "t2i", "picture 0", 3),
        ("moving.mp4", "t2v", "it moves", 1),
        ("p0.png", "t2i", "picture 0", 1),
        ("p1.png", "t2i", "picture 1", 1),
    ]
    assert [r.task for r in read(tmp_path, "i2v").rows] == ["t2i", "i2v", "t2i", "t2i"]


def test_captions_as_answers(tmp_path):
    captioned(tmp_path, 1)
    row = read(tmp_path, "x2t_image", "What is it?").rows[0]
    assert (row.task, row.text, row.answer) == ("x2t_image", "What is it?", "picture 0")
    assert read(tmp_path, "x2t_image").rows[0].text == "Describe the image."


def test_pairs_by_name(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "a_edit.png").with_suffix(".txt").write_text("make it blue")
    picture(tmp_path / "b.jpg")
    picture(tmp_path / "b_edit.png")
    (tmp_path / "b.txt").write_text("make it red")
    rows = read(tmp_path).rows
    assert [(r.name, r.task, r.text, r.sources[0].name) for r in rows] == [
        ("a_edit.png", "image_edit", "make it blue", "a.png"),
        ("b_edit.png", "image_edit", "make it red", "b.jpg"),
    ]


@pytest.mark.parametrize(
    "names", [("source", "target"), ("input", "output"), ("before", "after"), ("Source", "Target")]
)
def test_pairs_in_two_folders(tmp_path, names):
    before, after = names
    picture(tmp_path / before / "one.jpg")
    picture(tmp_path / after / "one.png").with_suffix(".txt").write_text("x")
    picture(tmp_path / after / "two.png").with_suffix(".txt").write_text("y")
    found = read(tmp_path)
    assert [(r.task, r.sources[0].name) for r in found.rows] == [("image_edit", "one.jpg")]
    assert found.problems == {"two.png": f"no two.* in {before}/"}


def test_json_lines(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "m" / name)
    clip(tmp_path / "m" / "c.mp4")
    lines = [
        {"image": "m/a.png", "caption": "one", "repeats": 2},
        {"file_name": "m/a.png", "text": "two"},
        {"source": "m/a.png", "target": "m/b.png", "instruction": "three"},
        {"references": ["m/a.png", "m/b.png"], "image": "m/b.png", "caption": "four"},
        {"video": "m/c.mp4", "question": "what?", "answer": "a ball", "system": "Look."},
        {"video": "m/c.mp4", "caption": "five", "task": "i2v"},
        {"video": "m/c.mp4", "answer": "no question"},
    ]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = read(file)
    assert not found.problems and [r.task for r in found.rows] == [
        *("t2i", "t2i", "image_edit", "subject_image", "x2t_video", "i2v", "x2t_video")
    ]
    assert found.rows[0].repeats == 2 and found.rows[4].system == "Look." and found.rows[6].text == ""
    assert told(read(tmp_path)) == told(found), "a folder with one .jsonl is that"


BAD_LINES = {
    "{": "no JSON",
    "[1]": "a JSON list, expected an object",
    '{"caption": "x"}': "no picture or clip",
    '{"image": "gone.png", "caption": "x"}': "gone.png is missing",
    '{"image": "a.txt", "caption": "x"}': "a.txt has no picture's or clip's ending",
    '{"image": 3, "caption": "x"}': "a path that is no text",
    '{"image": "a.png"}': "no caption",
    '{"image": "a.png", "caption": 7}': "its text is a JSON int, expected text",
    '{"image": "a.png", "question": "x", "answer": " "}': "an empty answer",
    '{"image": "a.png", "source": "c.mp4", "caption": "x"}': "an edit needs one source of its target's kind",
    '{"image": "a.png", "references": "c.mp4", "caption": "x"}': "a clip among the references",
}


def test_bad_json_lines_are_listed(tmp_path):
    picture(tmp_path / "a.png")
    clip(tmp_path / "c.mp4")
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join([*BAD_LINES, '{"image": "a.png", "caption": "good"}']))
    found = read(file)
    assert [r.text for r in found.rows] == ["good"]
    for number, expected in enumerate(BAD_LINES.values(), 1):
        assert expected in found.problems[f"line {number}"]
    require(found, file)
    with pytest.raises(RequestError, match=f"{len(BAD_LINES)} bad rows.*line 1: no JSON"):
        require(found, file, strict=True)


def test_captions_that_are_missing(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png").with_suffix(".txt").write_text("  \n")
    picture(tmp_path / "c.png").with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    found = read(tmp_path)
    assert found.problems["a.png"] == "no caption: a.txt is missing"
    assert found.problems["b.png"] == "no caption: b.txt is empty"
    assert "c.txt cannot be read as UTF-8 text" in found.problems["c.png"]
    with pytest.raises(RequestError, match="no row that can be trained on.*a.txt is missing"):
        require(found, tmp_path)


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(RequestError, match="does not exist"):
        read(tmp_path / "gone")
    with pytest.raises(RequestError, match="holds no pictures or clips"):
        read(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(RequestError, match="is no data set"):
        read(tmp_path / "a.csv")
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(RequestError, match="holds 2 .jsonl files"):
        read(tmp_path)
    with pytest.raises(RequestError, match="is empty"):
        read(tmp_path / "a.jsonl")


def test_inspection_names_buckets_and_what_is_odd(tmp_path):
    captioned(tmp_path, 2, size=(640, 480))
    picture(tmp_path / "small.png").with_suffix(".txt").write_text("x")
    clip(tmp_path / "short.mp4", 3).with_suffix(".txt").write_text("x")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (tmp_path / "broken.txt").write_text("x")
    result = inspection.inspect(tmp_path, "image_512res")
    assert result["rows"] == 4 and result["tasks"] == {"t2i": 3, "t2v": 1}
    assert result["buckets"]["t2i 592x448"] == 3
    assert result["visual_tokens"]["most"] == 37 * 28
    assert list(result["problems"]) == ["broken.png"]
    notes = " ".join(result["notes"])
    assert "enlarged" in notes and "shorter than 5 frames" in notes and "4 rows only" in notes
    assert "bad: broken.png" in inspection.report(result)


def test_one_row_is_said(tmp_path):
    captioned(tmp_path, 1)
    assert any("one row only" in note for note in inspection.inspect(tmp_path)["notes"])


@pytest.mark.parametrize("form", ["folder", "jsonl"])
def test_conversion_keeps_the_rows(tmp_path, form):
    captioned(tmp_path / "set", 2)
    picture(tmp_path / "set" / "e.png")
    picture(tmp_path / "set" / "e_edit.png").with_suffix(".txt").write_text("turn it")
    captioned(tmp_path / "set" / "4_more", 1)
    before = read(tmp_path / "set")
    result = conversion.convert(tmp_path / "set", tmp_path / "out", form)
    after = read(tmp_path / "out")
    assert result["rows"] == 4 and not after.problems

    def content(found):
        return sorted((r.task, r.text, r.repeats, r.media.read_bytes(), len(r.sources)) for r in found.rows)

    assert content(after) == content(before)
    with pytest.raises(RequestError, match="is there already"):
        conversion.convert(tmp_path / "set", tmp_path / "out", form)


def test_a_folder_cannot_hold_answers(tmp_path):
    captioned(tmp_path / "set", 1)
    with pytest.raises(RequestError, match="convert to jsonl"):
        conversion.convert(tmp_path / "set", tmp_path / "out", "folder", task="x2t_image")


def test_dataset_commands(tmp_path, capsys):
    captioned(tmp_path / "set", 2)
    assert main(["dataset", "check", str(tmp_path / "set"), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    assert (
        main(["dataset", "convert", str(tmp_path / "set"), str(tmp_path / "o"), "--to", "jsonl", "-q"]) == 0
    )
    assert "2 rows as jsonl" in capsys.readouterr().out
    for wrong in (["check", "gone"], ["convert", str(tmp_path), str(tmp_path / "o"), "--to", "folder"]):
        assert main(["dataset", *wrong, "-q"]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_captions_are_written_where_there_are_none(tmp_path, golden, capsys):
    picture(tmp_path / "a.png", (120, 90))
    picture(tmp_path / "b.png").with_suffix(".txt").write_text("mine")
    clip(tmp_path / "c.mp4")
    (tmp_path / "d.png").write_bytes(b"no picture")
    model = str(golden / "checkpoint" / "Lance_3B_Video")
    args = ["dataset", "caption", str(tmp_path), "-m", model, "--dtype", "float32", "--max-new-tokens", "3"]
    assert main([*args, "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(result["captions"]) == ["a.png", "c.mp4"] and result["kept"] == 1
    assert list(result["problems"]) == ["d.png"]
    assert (tmp_path / "a.txt").read_text().strip() == result["captions"]["a.png"]
    assert (tmp_path / "b.txt").read_text() == "mine"


# -- the released trainer's forms ----------------------------------------------------------------------------

RELEASED = cases.FOLDER / "datasets"


def test_parquet_without_pyarrow_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(RequestError, match=r"need pyarrow .*comfyui-lance\[training\]"):
        read(RELEASED / "i2i.parquet")


def test_released_parquet():
    pytest.importorskip("pyarrow")
    inputs = cases.FOLDER / "inputs"
    edit = read(RELEASED / "i2i.parquet").rows[0]
    assert (edit.task, edit.text) == ("image_edit", "Mirror it and swap red and blue.")
    assert source_of(edit.sources[0]) == (inputs / "photo.png").read_bytes()
    assert source_of(edit.media) == (inputs / "photo_edited.png").read_bytes()
    video = read(RELEASED / "t2v.parquet").rows[0]
    assert (video.task, video.text) == ("t2v", "A ball rolls from left to right.")
    asked = read(RELEASED / "i2t.parquet").rows[0]
    assert (asked.text, asked.answer) == ("Which shape is the largest?", "The blue one.")
    assert asked.system == "Look at the image carefully and answer the question."
    assert inspection.inspect(RELEASED / "i2i.parquet")["rows"] >= 1


def test_released_yaml(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("yaml")
    (tmp_path / "yaml").mkdir()
    shutil.copytree(RELEASED, tmp_path / "datasets")
    for file in RELEASED.glob("*.yaml"):
        shutil.copy(file, tmp_path / "yaml")
    assert {r.task for r in read(tmp_path / "yaml" / "packed_i2i_i2t.yaml").rows} == {
        "image_edit",
        "x2t_image",
    }
    first = read(tmp_path / "yaml" / "ff2v.yaml")
    assert {r.task for r in first.rows} == {"i2v"} and "weight" in first.notes[0]
    (tmp_path / "yaml" / "bad.yaml").write_text("D1: {x: {dataset_names: {a: {data_dir: [gone.parquet]}}}}")
    with pytest.raises(RequestError, match=r"lists gone.parquet, which is missing"):
        read(tmp_path / "yaml" / "bad.yaml")


def test_parquet_round_trip(tmp_path):
    pytest.importorskip("pyarrow")
    captioned(tmp_path / "set", 3)
    picture(tmp_path / "set" / "e.png")
    picture(tmp_path / "set" / "e_edit.png").with_suffix(".txt").write_text("turn it")
    conversion.convert(tmp_path / "set", tmp_path / "out", "parquet")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["image_edit.parquet", "t2i.parquet"]
    after = read(tmp_path / "out")
    assert sorted(r.text for r in after.rows) == ["picture 0", "picture 1", "picture 2", "turn it"]
    conversion.convert(tmp_path / "out", tmp_path / "back", "folder")
    assert len(read(tmp_path / "back").rows) == 4
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(RequestError, match="cannot be read as parquet"):
        read(tmp_path / "bad.parquet")
