"""Rows of a batch file: every form read, every mistake that row's alone; benchmark layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from batching import INPUTS, run, write_rows

from lance_core.errors import RequestError
from lance_core.scale import layouts
from lance_core.scale.row_files import read_entries
from lance_core.scale.row_forms import Defaults, make_row
from lance_core.scale.rows import BadRow, Row, without_doubles

PHOTO, CLIP = str(INPUTS / "photo.png"), str(INPUTS / "clip.mp4")


def rows_of(path: Path, task: str | None = None, **options) -> list[Row | BadRow]:
    defaults = Defaults(path.parent, task, None, options)
    return without_doubles([make_row(entry, defaults) for entry in read_entries(path)])


def written(tmp_path: Path, content, name: str = "rows.json") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# -- forms ---------------------------------------------------------------------------------------------------


def test_the_released_names_of_files(tmp_path):
    path = written(tmp_path, {"000000.png": "a fox", "000001": "a cat"})
    first, second = rows_of(path, "t2i")
    assert (first.id, first.prompt, first.files, first.task) == ("000000.png", "a fox", ["000000.png"], "t2i")
    assert second.files == ["000001.png"]


def test_a_names_ending_says_what_to_make_when_nothing_else_does(tmp_path):
    found = rows_of(written(tmp_path, {"a.png": "a fox", "b.mp4": "a fox runs", "c": "a fox"}))
    assert [row.task for row in found[:2]] == ["t2i", "t2v"]
    assert isinstance(found[2], BadRow) and "task" in found[2].error


def interleaved(items, kinds, targets) -> dict:
    return {"interleave_array": items, "element_dtype_array": kinds, "istarget_in_interleave": targets}


@pytest.mark.parametrize(
    ("task", "items", "kinds", "targets", "media", "prompt"),
    [
        ("i2v", ["it moves", PHOTO], ["text", "image"], [0, 0], PHOTO, "it moves"),
        ("video_edit", ["make it red", CLIP], ["text", "video"], [0, 0], CLIP, "make it red"),
        ("image_edit", ["blue", PHOTO, PHOTO], ["text", "image", "image"], [0, 0, 1], PHOTO, "blue"),
        ("idip_image", ["both", PHOTO, PHOTO], ["text", "image", "image"], [0] * 3, [PHOTO, PHOTO], "both"),
        ("x2t_image", [PHOTO, ["Look.", "What?", "-"]], ["image", "text"], [0, 1], PHOTO, "What?"),
        ("x2t_video", [CLIP, ["Look.", "What?", "-"]], ["video", "text"], [0, 1], CLIP, "What?"),
    ],
)
def test_the_released_interleaved_form(tmp_path, task, items, kinds, targets, media, prompt):
    (row,) = rows_of(written(tmp_path, {"0001": interleaved(items, kinds, targets)}), task)
    assert (row.id, row.media, row.prompt) == ("0001", media, prompt)
    if task.startswith("x2t"):
        assert row.options["system_prompt"] == "Look."
        assert row.files == ["0001.json"]


def test_the_released_benchmarks_lines(tmp_path):
    (row,) = rows_of(write_rows(tmp_path / "a.jsonl", [{"index": 7, "data": "a bench"}]), "t2i")
    assert (row.id, row.prompt) == ("7", "a bench")


def test_our_lines_and_our_list(tmp_path):
    given = [
        {"id": "a", "task": "t2i", "prompt": "a fox", "width": 64, "height": 48, "batch": 2},
        {"task": "t2v", "prompt": "it runs", "frames": 9, "checkpoint": "other"},
    ]
    for path in (write_rows(tmp_path / "a.jsonl", given), written(tmp_path, given)):
        first, second = rows_of(path, steps=3)
        assert first.options == {"width": 64, "height": 48, "batch_size": 2, "steps": 3}
        assert first.files == ["a_0.png", "a_1.png"]
        assert (second.id, second.options["num_frames"], second.checkpoint) == ("000001", 9, "other")


def test_a_rows_own_option_wins_and_a_default_goes_only_where_it_fits(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl",
        [
            {"id": "a", "task": "t2i", "prompt": "a fox", "steps": 9},
            {"id": "b", "task": "x2t_image", "prompt": "what?", "image": PHOTO},
            {"id": "c", "task": "image_edit", "prompt": "blue", "image": PHOTO},
        ],
    )
    a, b, c = rows_of(path, steps=3, width=64, height=64, num_frames=9, temperature=0.5)
    assert a.options == {"steps": 9, "width": 64, "height": 64}
    assert b.options == {"temperature": 0.5}
    assert c.options == {"steps": 3}, "an edit has the picture's size"


def test_media_lie_beside_the_file(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    path = write_rows(tmp_path / "a.jsonl", [{"task": "i2v", "prompt": "go", "image": "in/a.png"}])
    assert rows_of(path)[0].media == str(tmp_path / "in" / "a.png")


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"task": "t2i"}, "prompt"),
        ({"task": "t2i", "prompt": "  "}, "prompt is empty"),
        ({"task": "t3i", "prompt": "a fox"}, "unknown task"),
        ({"prompt": "a fox"}, "no task"),
        ({"task": "t2i", "prompt": "a fox", "stepz": 3}, "'stepz' is no option of t2i"),
        ({"task": "t2i", "prompt": "a fox", "steps": 0}, "steps is 0"),
        ({"task": "t2i", "prompt": "a fox", "width": 64}, "give both or neither"),
        ({"task": "t2i", "prompt": "a fox", "image": PHOTO}, "takes no pictures"),
        ({"task": "i2v", "prompt": "a fox"}, "needs image="),
        ({"task": "i2v", "prompt": "a fox", "image": 3}, "a media path is int"),
        ({"task": "t2v", "prompt": "a fox", "frames": 999}, "num_frames"),
        ({"task": "t2i", "prompt": "a fox", "seed": -1}, "seed is -1"),
        ({"task": "t2i", "prompt": "a fox", "cfg": "x"}, "cfg is 'x'"),
        ({"task": "t2i", "prompt": "a fox", "batch": 1000}, "batch_size is 1000"),
        ({"task": "x2t_image", "prompt": "what?", "image": PHOTO, "top_p": 2}, "top_p is 2"),
        ({"id": "../a", "task": "t2i", "prompt": "a fox"}, "cannot name a file"),
        ({"id": "/a", "task": "t2i", "prompt": "a fox"}, "cannot name a file"),
        ({"id": "a\\b", "task": "t2i", "prompt": "a fox"}, "cannot name a file"),
        ({"id": "C:a", "task": "t2i", "prompt": "a fox"}, "cannot name a file"),
        ({"id": "a\0", "task": "t2i", "prompt": "a fox"}, "cannot name a file"),
        ({"id": "é" * 130, "task": "t2i", "prompt": "a fox"}, "cannot name a file"),
        (interleaved(["a"], ["text", "image"], [0, 0]), "three lists of one length"),
        (interleaved(["a", 1], ["text", "sound"], [0, 0]) | {"task": "i2v"}, "'sound'"),
        ("not an object", "expected an object"),
        ([1], "expected an object"),
        (None, "expected an object"),
    ],
)
def test_a_mistake_is_that_rows_alone(tmp_path, row, said):
    path = write_rows(tmp_path / "a.jsonl", [row, {"task": "t2i", "prompt": "a fox"}])
    bad, good = rows_of(path)
    assert isinstance(bad, BadRow) and isinstance(good, Row)
    assert said in bad.error and len(bad.error) < 500


def test_a_line_that_is_no_json(tmp_path):
    bad, good = rows_of(written(tmp_path, '{"prompt": \n{"prompt": "a"}\n\n', "a.jsonl"), "t2i")
    assert "no JSON" in bad.error and bad.id == "000000" and isinstance(good, Row)


def test_a_line_that_is_no_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n{"prompt": "caf\xc3\xa9"}\n')
    bad, good = rows_of(path, "t2i")
    assert isinstance(bad, BadRow) and "half a character" in bad.error
    assert isinstance(good, Row) and good.prompt == "café"


def test_two_rows_of_one_name(tmp_path):
    rows = [{"id": "a", "prompt": "x"}, {"id": "a.png", "prompt": "y"}, {"id": "a", "prompt": "z"}]
    good, same_file, same_id = rows_of(write_rows(tmp_path / "a.jsonl", rows), "t2i")
    assert isinstance(good, Row)
    assert all(isinstance(row, BadRow) and "row 1" in row.error for row in (same_file, same_id))
    assert len({good.id, same_file.id, same_id.id}) == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", "nonsense", "3", '"a"', "[" * 100_000])
def test_a_file_that_holds_no_rows(tmp_path, content):
    with pytest.raises(RequestError) as error:
        read_entries(written(tmp_path, content))
    assert len(str(error.value)) < 500


def test_no_file(tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        read_entries(tmp_path / "missing.json")


# -- layouts -------------------------------------------------------------------------------------------------


def laid_out(name: str, path: Path, **options) -> list[Row]:
    found = layouts.read(name, path, Defaults(path.parent, None, None, options))
    assert all(isinstance(row, Row) for row in found), found
    return found


def test_geneval(tmp_path):
    about = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}
    released = write_rows(tmp_path / "a.jsonl", [{"index": 3, "data": "a bench", "additional_info": about}])
    own = write_rows(tmp_path / "b.jsonl", [about])
    for path, folder in ((released, "00003"), (own, "00000")):
        (row,) = laid_out("geneval", path)
        assert row.files == [f"{folder}/samples/{i}.png" for i in range(4)]
        assert row.grid == f"{folder}/grid.png"
        assert json.loads(row.beside[f"{folder}/metadata.jsonl"]) == about
        assert row.options["steps"] == 50 and row.options["batch_size"] == 4 and row.options["seed"] == 42
        assert row.options["width"] == row.options["height"] == 768


def test_dpg(tmp_path):
    (row,) = laid_out("dpg", write_rows(tmp_path / "a.jsonl", [{"index": "10", "data": "eggplants"}]))
    assert row.targets == ["10.png"] and row.options["batch_size"] == 4
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "p1.txt").write_text("a pickup\n")
    (row,) = laid_out("dpg", folder)
    assert (row.targets, row.prompt) == (["p1.png"], "a pickup")


def test_gedit(tmp_path):
    about = {"key": "4a7d", "task_type": "color_alter", "instruction_language": "en"}
    entry = interleaved(["red", PHOTO, PHOTO], ["text", "image", "image"], [0, 0, 1])
    (row,) = laid_out("gedit", written(tmp_path, {"0040": entry | {"additional_info": about}}))
    assert row.targets == ["fullset/color_alter/en/4a7d.webp"]
    assert (row.task, row.media, row.options["steps"]) == ("image_edit", PHOTO, 50)


def test_vbench(tmp_path):
    still, moving = "a toilet, frozen in time", "a dog runs"
    path = write_rows(
        tmp_path / "a.jsonl",
        [
            {"index": 0, "data": "A long toilet.", "original_prompt_en": still},
            {"index": 1, "data": "A long dog.", "original_prompt_en": moving},
            {"index": 2, "data": "A long dog again.", "original_prompt_en": moving},
        ],
    )
    assert len(laid_out("vbench", path)) == 10, "a prompt that comes twice is drawn once"
    (tmp_path / layouts.FLICKER_FILE).write_text(json.dumps([still]))
    found = laid_out("vbench", path)
    assert [row.targets[0] for row in found if row.prompt == "A long dog."] == [
        f"a dog runs-{i}.mp4" for i in range(5)
    ]
    assert [row.options["seed"] for row in found if row.prompt == "A long toilet."] == list(range(42, 67))
    own = written(tmp_path, [{"prompt_en": moving, "dimension": ["temporal_flickering"]}])
    assert len(laid_out("vbench", own)) == 25


def test_an_option_given_wins_over_the_benchmarks(tmp_path):
    (row,) = laid_out("dpg", write_rows(tmp_path / "a.jsonl", [{"index": "1", "data": "x"}]), steps=2)
    assert row.options["steps"] == 2


def test_a_row_that_is_not_the_benchmarks(tmp_path):
    found = layouts.read("gedit", written(tmp_path, {"1": {"prompt": "x"}}), Defaults(tmp_path))
    assert isinstance(found[0], BadRow) and "additional_info" in found[0].error


def test_the_folders_of_a_layout_as_they_are_written(tmp_path):
    from PIL import Image

    about = {"tag": "t", "prompt": "a bench"}
    path = write_rows(tmp_path / "a.jsonl", [{"index": 0, "data": "a bench", "additional_info": about}])
    small = {"task": None, "steps": 1, "width": 32, "height": 32, "resolution": "image_256res"}
    result = run(path, tmp_path / "out", layout="geneval", **small)
    assert result["made"] == 1
    folder = tmp_path / "out" / "00000"
    samples = [Image.open(folder / "samples" / f"{i}.png") for i in range(4)]
    grid = Image.open(folder / "grid.png")
    assert grid.size == (64, 64)
    for i, sample in enumerate(samples):
        x, y = i % 2 * 32, i // 2 * 32
        assert grid.crop((x, y, x + 32, y + 32)).tobytes() == sample.convert("RGB").tobytes()
    assert len({sample.tobytes() for sample in samples}) == 4
    assert (folder / "metadata.jsonl").read_text() == json.dumps(about) + "\n"
