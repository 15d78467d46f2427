"""Conversations: what is sent through the model, turn by turn, and that what is kept equals what is
computed.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lance_core.dialogue import conversation, understanding
from lance_core.inputs import prompts, turns
from lance_core.inputs.seen import ClipRange, read_either
from lance_core.model import rope
from lance_core.model.kv_cache import Context
from lance_core.model.sequence import Kind, Role, Sequence, TextSegment, VisualSegment

LOW = {"resolution": "image_256res", "max_new_tokens": 5}


def picture(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def clip(seed: int, frames: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 40, 40, 3), np.uint8)


@pytest.fixture
def blocks(monkeypatch):
    """Tokens of every block that is run into a context from now on."""
    seen: list[int] = []
    extend = Context.extend

    def noted(self, region, tokens, causal, attention):
        seen.append(tokens)
        return extend(self, region, tokens, causal, attention)

    monkeypatch.setattr(Context, "extend", noted)
    return seen


def contents(kept) -> torch.Tensor:
    """Keys and values of what is kept, in one tensor."""
    context, part = kept.context, slice(kept.context.prefix.start, kept.context.prefix.end)
    return torch.stack([t[part] for t in (*context.keys, *context.values)])


# -- the sequence --------------------------------------------------------------------------------------------


def test_one_turn_is_the_trained_template(video_lance):
    tokenizer = video_lance.checkpoint.tokenizer
    with torch.inference_mode():
        seen = video_lance.components.vit_segment(picture(0)[None], "image_256res", Role.QUESTION)
    ours = turns.conversation(tokenizer, "Look.", [], [seen], "what?")
    assert ours.token_ids() == prompts.question(tokenizer, "Look.", [seen], "what?").token_ids()


def test_more_turns_follow_the_chat_template(video_lance):
    t = video_lance.checkpoint.tokenizer
    said = [((), "hi", t.encode("hello")), ((), "how?", t.encode("well"))]
    got = turns.conversation(t, "Be kind.", said, (), "bye")

    def text(role, words, *, open_=False):
        pieces = ["user\n", words] if role == "user" else [f"{role}\n{words}"]
        ids = [t.im_start, *[i for p in pieces for i in t.encode(p)]]
        return ids if open_ else [*ids, t.im_end, *t.encode("\n")]

    expected = text("system", "Be kind.")
    for asked, answered in (("hi", "hello"), ("how?", "well")):
        expected += text("user", asked)
        expected += [t.im_start, *t.encode("assistant\n"), *t.encode(answered), t.im_end, *t.encode("\n")]
    expected += [*text("user", "bye"), t.im_start, *t.encode("assistant\n")]
    assert got.token_ids() == expected and got.target is None


def test_pictures_and_clips_stand_in_order_before_their_question(video_lance):
    given = [picture(0), clip(1), picture(2, 60, 30)]
    answer = video_lance.understand("which?", images=given, **LOW)
    (turn,) = answer.history
    assert [s.grid[0] for s in turn.visuals] == [1, 5, 1] and turn.question == "which?"
    assert (
        turn.visuals[0].grid[1] < turn.visuals[0].grid[2]
        and turn.visuals[2].grid[1] > turn.visuals[2].grid[2]
    )
    alone = video_lance.understand("which?", image=given[0], **LOW).history[0].visuals[0]
    torch.testing.assert_close(turn.visuals[0].data, alone.data)
    swapped = video_lance.understand("which?", images=given[::-1], **LOW)
    assert [s.grid for s in swapped.history[0].visuals] == [s.grid for s in turn.visuals][::-1]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (None, turns.PLAIN_SYSTEM),
        ([], turns.PLAIN_SYSTEM),
        ([picture(0)], "Look at the image carefully and answer the question."),
        ([picture(0), clip(0)], "Watch the video carefully and answer the question."),
    ],
)
def test_the_instruction_is_the_trained_one_for_what_is_shown(video_lance, images, words):
    assert video_lance.understand("and?", images=images, **LOW).history.system == words


def test_a_question_without_pictures_needs_no_vision(golden):
    import lance_core

    lance = lance_core.load(golden / "checkpoint" / "Lance_3B", dtype=torch.float32)
    assert lance.understand("hello", max_new_tokens=2).token_ids
    assert set(lance.components._loaded) == {"und"}


def test_images_of_one_equal_image(video_lance):
    one = video_lance.understand("what?", image=picture(3), **LOW)
    assert video_lance.understand("what?", images=[picture(3)], **LOW) == one
    assert video_lance.understand("what?", images=[clip(3)], **LOW) == video_lance.understand(
        "what?", video=clip(3), **LOW
    )


# -- what is kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", understanding.POSITIONS)
def test_what_is_kept_equals_what_is_computed_afresh(video_lance, positions):
    """Keys and values of the whole conversation, and the answer, with and without what was kept."""
    more = LOW | {"positions": positions}
    first = video_lance.understand("what?", images=[picture(0)], **more)
    second = video_lance.understand("and this?", images=[clip(1), picture(2)], history=first.history, **more)
    kept = video_lance.understand("so?", history=second.history, **more)
    fresh = video_lance.understand("so?", history=list(second.history), **more)
    assert kept == fresh and kept.history.kept.tokens == fresh.history.kept.tokens
    torch.testing.assert_close(
        contents(kept.history.kept), contents(fresh.history.kept), atol=1e-5, rtol=1e-4
    )


def test_earlier_turns_are_not_computed_again(video_lance, blocks):
    first = video_lance.understand("what?", images=[picture(0)], **LOW)
    read = sum(blocks)
    blocks.clear()
    video_lance.understand("and now?", history=first.history, **LOW)
    tokenizer = video_lance.checkpoint.tokenizer
    ended = first.token_ids[-1] == tokenizer.im_end
    new = [tokenizer.im_end, *tokenizer.encode("\n"), tokenizer.im_start, *tokenizer.encode("user\n")]
    new += [*tokenizer.encode("and now?"), tokenizer.im_end, *tokenizer.encode("\n"), tokenizer.im_start]
    new += tokenizer.encode("assistant\n")
    assert blocks[0] == len(new) + (not ended) and sum(blocks) < read


def test_a_history_is_not_changed_by_what_follows_it(video_lance):
    first = video_lance.understand("what?", images=[picture(0)], **LOW)
    before = contents(first.history.kept).clone()
    one = video_lance.understand("a", history=first.history, **LOW)
    video_lance.understand("something else entirely", history=first.history, **LOW)
    assert torch.equal(contents(first.history.kept), before) and len(first.history) == 1
    assert video_lance.understand("a", history=first, **LOW) == one  # a whole answer is taken too


def test_kept_values_of_unloaded_weights_are_not_used(golden, blocks):
    import lance_core

    lance = lance_core.load(golden / "checkpoint" / "Lance_3B", dtype=torch.float32)
    first = lance.understand("what?", **LOW)
    after = lance.understand("and?", history=first.history, **LOW)
    lance.unload()
    gc.collect()
    blocks.clear()
    again = lance.understand("and?", history=first.history, **LOW)
    assert again == after and blocks[0] > first.history.kept.tokens


@pytest.mark.parametrize("change", [{"system_prompt": "Be brief."}, {"positions": "as trained"}])
def test_kept_values_of_another_instruction_or_position_are_not_used(video_lance, blocks, change):
    first = video_lance.understand("what?", images=[picture(0)], **LOW)
    blocks.clear()
    changed = video_lance.understand("and?", history=first.history, **LOW, **change)
    assert sum(blocks) == changed.history.kept.tokens  # all of it
    assert changed == video_lance.understand("and?", history=changed.history[:1], **(LOW | change))


@pytest.mark.parametrize(
    "history",
    [
        [("hi", "hello"), ("how?", "well")],
        [["hi", "hello"], {"question": "how?", "answer": "well"}],
        [
            {"role": r, "content": c}
            for r, c in zip(["user", "assistant"] * 2, ["hi", "hello", "how?", "well"], strict=True)
        ],
    ],
)
def test_turns_in_every_form_mean_the_same(video_lance, history):
    got = video_lance.understand("bye", history=history, **LOW)
    assert [(t.question, t.answer) for t in got.history[:2]] == [("hi", "hello"), ("how?", "well")]
    assert got == video_lance.understand("bye", history=[("hi", "hello"), ("how?", "well")], **LOW)


def test_pictures_of_earlier_turns_as_files(video_lance, golden):
    file = str(next((golden / "cases" / "inputs").glob("*.png")))
    first = video_lance.understand("what?", images=[file], **LOW)
    assert first.history.to_json() == [{"question": "what?", "images": [file], "answer": first.text}]
    whole = video_lance.understand("and?", history=[(*first.history[0].to_json().values(),)[::2]], **LOW)
    shown = video_lance.understand("and?", history=first.history.to_json(), **LOW)
    assert len(shown.history[0].visuals) == 1 and not whole.history[0].visuals


def test_a_control_token_in_a_question_is_text(video_lance):
    t = video_lance.checkpoint.tokenizer
    sequence = turns.conversation(t, "", [((), "<|im_end|>", ())], (), "<|im_start|>")
    plain = turns.conversation(t, "", [((), "x", ())], (), "y")
    assert sequence.token_ids().count(t.im_end) == plain.token_ids().count(t.im_end)
    assert sequence.token_ids().count(t.im_start) == plain.token_ids().count(t.im_start)


def test_long_conversations_are_refused_in_a_sentence(video_lance):
    from lance_core import RequestError

    with pytest.raises(RequestError, match=r"the conversation has .* at most 32,768"):
        video_lance.understand("and?", history=[("x " * 9000, "y " * 9000)] * 2, **LOW)


def test_context_cannot_end_inside_a_picture(video_lance):
    with torch.inference_mode():
        seen = video_lance.components.vit_segment(picture(0)[None], "image_256res", Role.QUESTION)
    sequence = turns.conversation(video_lance.checkpoint.tokenizer, "", [], [seen], "?")
    placed = conversation.place(sequence, 2, False)
    assert sum(s.length for s, _ in conversation.after(placed, 0)) == sum(s.length for s, _ in placed)
    with pytest.raises(ValueError, match="inside a picture"):
        conversation.after(placed, placed[0].segment.length + 1)


# -- positions -----------------------------------------------------------------------------------------------


def test_positions_as_trained_move_what_is_shown_to_1000(video_lance):
    with torch.inference_mode():
        segments = [
            video_lance.components.vit_segment(p[None], "image_256res", Role.QUESTION)
            for p in (picture(0), picture(1))
        ]
    sequence = turns.conversation(video_lance.checkpoint.tokenizer, "", [], segments, "what?")
    released, trained = (rope.positions(sequence, 2, as_trained=flag) for flag in (False, True))
    shift = 1000 - int(released[1][0, 0])
    for segment, a, b in zip(sequence.context, released, trained, strict=True):
        moved = torch.tensor([shift if segment.kind is Kind.VIT else 0, 0, 0])[:, None]
        assert torch.equal(a + moved, b)
    assert int(trained[1][0].min()) == 1000


@pytest.mark.parametrize("name", ["i2t", "v2t"])
def test_as_trained_is_what_the_released_training_code_does(video_lance, golden, name):
    """Its positions, and its logits for the first answer token, recorded from a picture and a clip."""
    case = {k.split(".")[1]: v for k, v in load_file(golden / "as_trained.safetensors").items() if name in k}
    t, ids = video_lance.checkpoint.tokenizer, case["token_ids"].tolist()
    start, end = ids.index(t.vision_start), ids.index(t.vision_end)
    frames, rows, columns = case["vit_grid_thw"][0].tolist()
    seen = VisualSegment(Kind.VIT, Role.QUESTION, (frames, rows // 2, columns // 2), case["vit_embeds"])
    texts = (tuple(ids[:start]), tuple(ids[end + 1 :]))
    before, after = (TextSegment(Role.TEMPLATE, text) for text in texts)
    whole = Sequence((before, seen, after), None, t.vision_start, t.vision_end, t.pad)
    first, visual, last = rope.positions(whole, 2, as_trained=True)
    read_in_order = torch.cat([first, visual[:, :1], visual[:, 2:], visual[:, 1:2], last], dim=1)
    assert whole.token_ids() == ids and torch.equal(read_in_order, case["position_ids"])
    asked = int(case["ce_loss_indexes"][0]) + 1 - (end + 1)
    question = replace(whole, context=(before, seen, TextSegment(Role.TEMPLATE, after.ids[:asked])))
    model = video_lance.components.experts(generation=False)
    with torch.inference_mode():
        trained, released = (
            conversation.read(model, question, conversation.place(question, 2, flag), 0)[1][: len(t)]
            for flag in (True, False)
        )
    torch.testing.assert_close(trained, case["logits"][0], atol=2e-5, rtol=0)
    assert (released - trained).abs().max() > 0.1


def test_the_positions_of_a_conversation_only_grow(video_lance):
    """What is kept stays right when turns come after it, also as trained."""
    tokenizer = video_lance.checkpoint.tokenizer
    with torch.inference_mode():
        seen = [
            video_lance.components.vit_segment(picture(i)[None], "image_256res", Role.QUESTION)
            for i in (0, 1)
        ]
    for flag in (False, True):
        short = turns.conversation(tokenizer, "", [], seen[:1], "what?")
        long = turns.conversation(tokenizer, "", [(seen[:1], "what?", [5, 6])], seen[1:], "and?")
        a, b = (torch.cat(rope.positions(s, 2, flag), dim=1) for s in (short, long))
        assert torch.equal(a, b[:, : a.shape[1]])


def test_positions_change_the_answer_path_only_where_asked(video_lance):
    asked = LOW | {"max_new_tokens": 12}
    released = video_lance.understand("what?", image=picture(0), **asked)
    trained = video_lance.understand("what?", image=picture(0), positions="as trained", **asked)
    different = contents(released.history.kept)[:, : trained.history.kept.tokens]
    assert not torch.allclose(different, contents(trained.history.kept)[:, : different.shape[1]])
    assert video_lance.understand("what?", image=picture(0), positions="released", **asked) == released


# -- clips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "picks"),
    [
        (ClipRange(), None),
        (ClipRange(frames=5), [0, 29, 59, 89, 119]),
        (ClipRange(frames=8), [0, 29, 59, 89, 119]),
        (ClipRange(fps=1), [0, 14, 29, 44, 59, 74, 89, 104, 119]),
        (ClipRange(start=5, frames=5), [60, 74, 89, 104, 119]),
        (ClipRange(start=5, length=1, frames=5), [60, 62, 65, 68, 71]),
        (ClipRange(start=9.99), [119]),
        (ClipRange(length=0.5, fps=12), [0, 1, 2, 3, 5]),
    ],
)
def test_which_frames_of_a_clip_are_seen(part, picks):
    assert part.pick == picks if picks is None else part.pick(120, 12.0) == picks


def test_more_than_six_seconds_worth_of_frames(video_lance):
    frames = np.zeros((240, 28, 28, 3), np.uint8)
    few = video_lance.understand("?", video=(frames, 12.0), **LOW).history[0].visuals[0]
    many = video_lance.understand("?", video=(frames, 12.0), fps=6, **LOW).history[0].visuals[0]
    assert (few.grid[0], many.grid[0]) == (35, 59)


def test_what_is_a_clip_and_what_a_picture(tmp_path, golden):
    from PIL import Image

    frames = [Image.fromarray(f) for f in clip(0, 3)]
    frames[0].save(tmp_path / "still.gif")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    video = next((golden / "cases" / "inputs").glob("*.mp4"))
    found = [
        read_either(source, ClipRange()).clip
        for source in (tmp_path / "still.gif", tmp_path / "moving.gif", video, frames[0], frames, picture(0))
    ]
    assert found == [False, True, True, False, True, False]
    assert read_either((clip(0), 12.0), ClipRange()).clip and read_either(clip(0), ClipRange()).clip
