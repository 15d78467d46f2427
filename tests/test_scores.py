"""Scores: the probability of an answer from the logits, and the best of several results."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lance_core import RequestError
from lance_core.cli.main import main
from lance_core.dialogue import scoring
from lance_core.inputs import media, turns
from lance_core.model.sequence import Role

SMALL = {"width": 32, "height": 32, "steps": 1}
LOW = {"resolution": "image_256res"}


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)


@pytest.mark.parametrize("answer", ["Yes", "x", "no, never"])
@pytest.mark.parametrize("positions", ["released", "as trained"])
def test_a_score_is_the_product_of_softmaxes(video_lance, answer, positions):
    """Against whole sequences: the question with ever more of the answer behind it, each run on its own."""
    tokenizer, parts = video_lance.checkpoint.tokenizer, video_lance.components
    (got,) = video_lance.score([picture(0)], "a cat", answer=answer, positions=positions, **LOW)
    asked = 'Does this figure show "a cat"? Please answer yes or no.'
    expected, ids = 1.0, tokenizer.encode(answer)
    with torch.inference_mode():
        seen = parts.vit_segment(picture(0)[None], "image_256res", Role.QUESTION)
        for i, token in enumerate(ids):
            system = "Look at the image carefully and answer the question."
            sequence = turns.conversation(tokenizer, system, [], [seen], asked)
            last = sequence.context[-1]
            more = type(last)(last.role, last.ids + tuple(ids[:i]))
            longer = type(sequence)(
                (*sequence.context[:-1], more), None, sequence.start, sequence.end, sequence.pad
            )
            placed = scoring.place(longer, 2, positions == "as trained")
            _, logits, _ = scoring.read(parts.experts(generation=False), longer, placed, 0)
            expected *= torch.softmax(logits[: len(tokenizer)], -1)[token].item()
    assert got == pytest.approx(expected, rel=1e-4) and 0 < got < 1


def test_scores_are_one_for_each_picture_in_order(video_lance):
    batch = [picture(i) for i in range(3)]
    values = video_lance.score(batch, "a cat", **LOW)
    assert len(values) == 3 == len(set(values)) and all(isinstance(v, float) for v in values)
    assert video_lance.score(np.stack(batch), "a cat", **LOW) == values
    assert video_lance.score(batch[1], "a cat", **LOW) == values[1:2]
    clips = video_lance.score([np.stack(batch * 3), batch[0]], "a cat", **LOW)
    assert clips[1] == values[0] != clips[0]


def test_another_question_and_its_text(video_lance):
    one = video_lance.score([picture(0)], "a cat", question='Is it "{text}"?', **LOW)
    assert one != video_lance.score([picture(0)], "a cat", **LOW)
    assert one != video_lance.score([picture(0)], "a dog", question='Is it "{text}"?', **LOW)
    with pytest.raises(RequestError, match="text"):
        video_lance.score([picture(0)], "a cat", question="Is it?", **LOW)
    with pytest.raises(RequestError, match="answer of a score is empty"):
        video_lance.score([picture(0)], "a cat", answer="", **LOW)
    with pytest.raises(RequestError, match="text is empty"):
        video_lance.score([picture(0)], " ", **LOW)


def test_order():
    assert scoring.order([0.1, 0.9, 0.1, 0.5]) == [1, 3, 0, 2]


@pytest.mark.parametrize("task", ["t2i", "t2v"])
def test_best_of_is_sorted_and_each_is_its_seed(video_lance, task):
    more = SMALL | ({"num_frames": 5} if task == "t2v" else {})
    best = video_lance.best_of(4, task, "a cat", keep=3, seed=7, **more)
    values = [r.request["score"] for r in best]
    assert len(best) == 3 and values == sorted(values, reverse=True)
    every = video_lance.best_of(4, task, "a cat", keep=4, seed=7, **more)
    assert {r.request["seed"] for r in every} == {7, 8, 9, 10}
    assert [r.request["seed"] for r in every][:3] == [r.request["seed"] for r in best]
    alone = video_lance.generate(task, "a cat", seed=best[0].request["seed"], **more)
    torch.testing.assert_close(best[0].latent, alone.latent, atol=1e-4, rtol=1e-3)
    frames = (alone.frames.numpy() * 255).round().astype(np.uint8)
    (score,) = video_lance.score([frames if task == "t2v" else frames[0]], "a cat")
    assert score == pytest.approx(values[0], rel=1e-2)


def test_an_edit_is_scored_with_what_it_was_made_from(video_lance, monkeypatch):
    shown = []

    def note(components, groups, asked, **options):
        shown.append(([len(g) for g in groups], [len(g[0].frames) for g in groups], asked))
        return [0.2, 0.7]

    monkeypatch.setattr(scoring, "scores", note)
    best = video_lance.best_of(2, "image_edit", "blue", image=picture(0), seed=1, steps=1, **LOW)
    assert [r.request["seed"] for r in best] == [2]
    video_lance.best_of(2, "subject_image", "both", references=[picture(0), picture(1)], **SMALL, **LOW)
    video_lance.best_of(2, "t2i", "a cat", **SMALL)
    assert [s[0] for s in shown] == [[2, 2], [3, 3], [1, 1]]
    assert (
        "blue" in shown[0][2]
        and "same subjects" in shown[1][2]
        and shown[2][2].startswith("Does this figure")
    )


@pytest.mark.parametrize(
    ("count", "keep", "options", "words"),
    [
        (0, 1, {}, "best_of is 0"),
        (2, 3, {}, "keep is 3"),
        (65, 1, {}, "best_of is 65"),
        (2, 1, {"batch_size": 2}, "batch_size"),
    ],
)
def test_what_best_of_refuses(video_lance, count, keep, options, words):
    with pytest.raises(RequestError, match=words):
        video_lance.best_of(count, "t2i", "a", keep=keep, **SMALL, **options)


# -- the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def run(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    where = str(golden / "checkpoint" / "Lance_3B_Video")

    def run_(command, *args):
        code = main([command, *args, "-m", where, "--dtype", "fp32", "--json", "-q"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run_


FLAGS = ("--width", "32", "--height", "32", "--steps", "1", "-o", "x.png")


def test_the_best_alone_is_written_and_keep_keeps_more(run, tmp_path, video_lance):
    expected = video_lance.best_of(3, "t2i", "a cat", keep=3, **SMALL)
    code, result = run("t2i", "a cat", *FLAGS, "--best-of", "3")
    assert code == 0 and [p.name for p in tmp_path.iterdir()] == ["x.png"]
    saved = media.read_metadata(tmp_path / "x.png")
    assert (saved["best_of"], saved["seed"]) == (3, expected[0].request["seed"])
    assert result["files"][0]["score"] == saved["score"] == pytest.approx(expected[0].request["score"])
    _, result = run("t2i", "a cat", *FLAGS, "--best-of", "3", "--keep", "2")
    seeds = [r.request["seed"] for r in expected[:2]]
    assert [(f["file"], f["seed"]) for f in result["files"]] == list(
        zip(["x_0.png", "x_1.png"], seeds, strict=True)
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--keep", "2"), "--keep 2"),
        (("--best-of", "2", "--keep", "3"), "--keep is 3"),
        (("--best-of", "2", "--batch", "2"), "--batch 2"),
        (("--best-of", "0"), "--best-of is 0"),
    ],
)
def test_what_the_command_refuses_before_loading(run, monkeypatch, args, words):
    def fail(*args, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr("lance_core.pipeline.load", fail)
    code, result = run("t2i", "a cat", *FLAGS, *args)
    assert code == 2 and words in result["error"]


def test_the_command_score_sorts(run, tmp_path, video_lance):
    for i in range(3):
        media.save_image(tmp_path / f"{i}.png", picture(i))
    code, result = run("score", "a cat", "0.png", "1.png", "2.png", "--resolution", "image_256res")
    values = [s["score"] for s in result["scores"]]
    assert code == 0 and values == sorted(values, reverse=True)
    expected = video_lance.score([picture(i) for i in range(3)], "a cat", **LOW)
    assert [s["file"] for s in result["scores"]] == [f"{i}.png" for i in scoring.order(expected)]
