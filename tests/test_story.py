"""A story from its script: what is made, what is made again, and what is refused before anything is drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lance_core.cli import story
from lance_core.cli.main import main
from lance_core.inputs import media

DEFAULTS = """
[defaults]
model = "{model}"
dtype = "fp32"
steps = 1
frames = 5
width = 32
height = 32
resolution = "video_192p"
"""
SHOTS = """
[[shot]]
prompt = "a fox in the snow"
seed = 7

[[shot]]
prompt = "the cat sees it"
references = ["cat.png"]
cfg-vision = 1.5
cfg_interval = [0.5, 1.0]
"""


@pytest.fixture
def tell(golden, tmp_path, capsys):
    """tell(shots, defaults) -> exit code and result; files land in tmp_path / "out"."""
    media.save_image(tmp_path / "cat.png", np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    model = (golden / "checkpoint" / "Lance_3B_Video").as_posix()

    def tell_(shots=SHOTS, defaults=DEFAULTS):
        script = tmp_path / "story.toml"
        script.write_text(defaults.format(model=model) + shots, encoding="utf-8")
        code = main(["story", str(script), "-o", str(tmp_path / "out"), "--json", "-q"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return tell_


NAMES = [f"0{i}_{end}" for i in (1, 2) for end in ("clip.mp4", "picture.png", "prompt.txt")]


def names(files):
    return sorted(f.replace("\\", "/").rsplit("/", 1)[-1] for f in files)


def test_every_step_is_kept_and_joined(tell, tmp_path):
    code, result = tell()
    out = tmp_path / "out"
    assert code == 0 and sorted(p.name for p in out.iterdir()) == [*NAMES, "story.mp4"]
    assert names(result["files"]) == [*NAMES, "story.mp4"]
    first, second = (media.read_metadata(out / f"0{i}_picture.png") for i in (1, 2))
    assert (first["task"], first["seed"], first["prompt"]) == ("t2i", 7, "a fox in the snow")
    assert (second["task"], second["seed"], second["cfg_vision"]) == ("subject_image", 42, 1.5)
    assert second["cfg_interval"] == [0.5, 1.0]
    moving = media.read_metadata(out / "02_clip.mp4")
    assert (moving["task"], moving["num_frames"], moving["prompt"]) == ("i2v", 5, "the cat sees it")
    clips = [media.load_video(out / f"0{i}_clip.mp4")[0] for i in (1, 2)]
    whole, fps = media.load_video(out / "story.mp4")
    assert len(whole) == 10 and fps == 12
    assert np.abs(whole.astype(int) - np.concatenate(clips)).mean() < 12  # once more through the codec


def test_a_second_run_does_only_what_is_missing(tell, tmp_path, monkeypatch):
    tell()
    out = tmp_path / "out"
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}

    def fail(*args, **options):
        raise AssertionError("the model was opened")

    with monkeypatch.context() as patch:
        patch.setattr("lance_core.pipeline.load", fail)
        code, result = tell()
    assert code == 0 and result["files"] == []
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


@pytest.mark.parametrize(
    ("deleted", "again"),
    [
        (["02_clip.mp4"], ["02_clip.mp4", "story.mp4"]),
        (["02_picture.png"], ["02_clip.mp4", "02_picture.png", "story.mp4"]),
        (["01_prompt.txt"], ["01_clip.mp4", "01_picture.png", "01_prompt.txt", "story.mp4"]),
        (["story.mp4"], ["story.mp4"]),
    ],
)
def test_a_shot_is_made_anew_by_deleting_its_files(tell, tmp_path, deleted, again):
    tell()
    for name in deleted:
        (tmp_path / "out" / name).unlink()
    assert names(tell()[1]["files"]) == again


def test_a_run_that_was_stopped_goes_on(tell, tmp_path, monkeypatch):
    from lance_core.cli import generate

    draw, calls = generate.generate, []

    def stop(args, task, *rest):
        calls.append(task.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(args, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "generate", stop)
        script = tmp_path / "story.toml"
        assert tell_code(tell) == 130
    assert script.is_file() and not (tmp_path / "out" / "story.mp4").exists()
    code, result = tell()
    assert code == 0 and names(result["files"]) == ["02_clip.mp4", "02_picture.png", "story.mp4"]


def tell_code(tell):
    try:
        return tell()[0]
    except IndexError:  # nothing was printed
        return 130


def test_a_changed_prompt_file_is_drawn(tell, tmp_path):
    tell()
    (tmp_path / "out" / "01_prompt.txt").write_text("a wolf", encoding="utf-8")
    (tmp_path / "out" / "01_picture.png").unlink()
    tell()
    assert media.read_metadata(tmp_path / "out" / "01_picture.png")["prompt"] == "a wolf"


def test_another_shot_is_added(tell, tmp_path):
    tell()
    code, result = tell(SHOTS + '[[shot]]\nprompt = "the end"\n')
    assert code == 0
    assert names(result["files"]) == ["03_clip.mp4", "03_picture.png", "03_prompt.txt", "story.mp4"]
    assert len(media.load_video(tmp_path / "out" / "story.mp4")[0]) == 15


def test_prompts_are_enhanced_where_asked(tell, tmp_path, monkeypatch):
    from lance_core.prompting import enhance

    asked = []

    def write(components, told, wish, shown, choose):
        asked.append((wish, len(shown)))
        return "written out"

    monkeypatch.setattr(enhance, "written", write)
    tell(SHOTS.replace('references = ["cat.png"]', 'references = ["cat.png"]\nenhance = true'))
    assert asked == [("The wish: the cat sees it", 1)]
    assert (tmp_path / "out" / "02_prompt.txt").read_text(encoding="utf-8") == "written out\n"
    assert (tmp_path / "out" / "01_prompt.txt").read_text(encoding="utf-8") == "a fox in the snow\n"


def test_best_of_chooses_the_picture_alone(tell, tmp_path):
    tell('[[shot]]\nprompt = "a fox"\nbest-of = 2\n')
    assert media.read_metadata(tmp_path / "out" / "01_picture.png")["best_of"] == 2
    assert "best_of" not in media.read_metadata(tmp_path / "out" / "01_clip.mp4")


def test_references_may_be_defaults(tell, tmp_path):
    tell(
        '[[shot]]\nprompt = "a"\n[[shot]]\nprompt = "b"\nreferences = []\n',
        DEFAULTS + 'references = ["cat.png"]\n',
    )
    found = [media.read_metadata(tmp_path / "out" / f"0{i}_picture.png")["task"] for i in (1, 2)]
    assert found == ["subject_image", "t2i"]


WRONG = {
    "no TOML": ("[[shot\n", "cannot be read as TOML"),
    "no shots": ("", "no shots"),
    "no prompt": ("[[shot]]\nseed = 1\n", "shot 1 has no prompt"),
    "blank prompt": ('[[shot]]\nprompt = " "\n', "shot 1 has no prompt"),
    "unknown option": ('[[shot]]\nprompt = "a"\nstep = 3\n', "'step', which is no option"),
    "unknown table": ('[scene]\n[[shot]]\nprompt = "a"\n', "'scene'"),
    "wrong value": ('[[shot]]\nprompt = "a"\nsteps = "many"\n', "shot 1: argument --steps"),
    "wrong choice": ('[[shot]]\nprompt = "a"\nrenorm = "some"\n', "shot 1: argument --renorm"),
    "enhance": ('[[shot]]\nprompt = "a"\nenhance = "yes"\n', "enhance = 'yes'"),
    "writer": ('[[shot]]\nprompt = "a"\nenhance-by = "me"\n', "enhance-by = 'me'"),
    "output": ('[[shot]]\nprompt = "a"\noutput = "x.png"\n', "output, which a story decides"),
    "batch": ('[[shot]]\nprompt = "a"\nbatch = 2\n', "batch, which a story decides"),
    "model of a shot": ('[[shot]]\nprompt = "a"\nmodel = "x"\n', "put it in [defaults]"),
    "missing reference": (
        '[[shot]]\nprompt = "a"\nreferences = ["no.png"]\n',
        "no.png of shot 1 does not exist",
    ),
    "reference of a kind": ('[[shot]]\nprompt = "a"\nreferences = "cat.png"\n', "expected a list"),
}


@pytest.mark.parametrize(("shots", "words"), WRONG.values(), ids=list(WRONG))
def test_wrong_scripts_are_refused_before_anything_is_made(tell, tmp_path, shots, words):
    code, result = tell(shots)
    assert code == 2 and words in result["error"], result
    assert not (tmp_path / "out").exists()


def test_a_script_that_is_not_there(tmp_path, capsys):
    assert main(["story", str(tmp_path / "no.toml"), "-o", str(tmp_path / "out")]) == 2
    assert "no.toml cannot be read" in capsys.readouterr().err


def test_the_command_line_is_above_the_script(tmp_path):
    script = tmp_path / "s.toml"
    script.write_text('[defaults]\nmodel = "a"\ndevice = "cpu"\n[[shot]]\nprompt = "x"\n')
    whole, shots = story.read(script, tmp_path)
    assert whole == {"model": "a", "device": "cpu"} and shots[0].options == {}
