"""The nodes for dialogue, scores, prompts, keyframes, long videos and guidance on what is shown."""

from __future__ import annotations

import pytest
import torch
from graphs import node
from small import VIDEO_CHECKPOINT, advanced, away, edit, i2v, lance, module, question, samples, t2i

ASKED = {"system_prompt": "", "max_new_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def then(graph, name: str, asked: str, **inputs):
    """`graph` with another Lance Understand after "answer"."""
    inputs = {"lance": ["loader", 1], "chat": ["answer", 1], "question": asked} | ASKED | inputs
    return {**graph, name: node("LanceUnderstand", **inputs)}


def refused(comfy, graph, name: str, *words: str) -> None:
    with pytest.raises(Exception, match=".*".join(words)):
        comfy.value(graph, name)


# -- Lance Understand ----------------------------------------------------------------------------------------


def test_a_conversation_equals_one_computed_afresh(comfy):
    graph = then(question(tokens=5), "again", "And why?")
    text_, chat = comfy.run(graph, [("again", 0), ("again", 1)]).values
    conversation = chat.conversation
    assert [t.question for t in conversation.turns] == ["What is it?", "And why?"]
    dialogue, loader = module(comfy, "nodes.dialogue"), comfy.value(graph, "loader", 1)
    earlier = comfy.value(graph, "answer", 1).conversation
    fresh = type(conversation)(earlier.turns, earlier.system, False, None)
    chooser = module(comfy, "lance_core.text_generation").Chooser(0.0, 1.0, 0)
    with torch.inference_mode():
        again, after = dialogue.answer(loader, fresh, "And why?", (), 5, chooser, lambda piece: None)
    assert again == text_ and after.kept.tokens == conversation.kept.tokens
    for a, b in zip(after.kept.context.keys, conversation.kept.context.keys, strict=True):
        assert away(a, b) < 1e-2


def test_earlier_turns_are_not_computed_again(comfy, monkeypatch):
    cache = module(comfy, "lance_core.model.kv_cache")
    blocks, extend = [], cache.Context.extend

    def noted(self, region, tokens, causal, attention):
        blocks.append(tokens)
        return extend(self, region, tokens, causal, attention)

    monkeypatch.setattr(cache.Context, "extend", noted)
    graph = question("What is this?", tokens=5)
    comfy.value(then(graph, "again", "And why?"), "again")
    whole = sum(blocks)
    blocks.clear()
    comfy.value(then(graph, "again", "And why, then?"), "again")
    assert 0 < sum(blocks) < whole / 2


def test_nothing_is_kept_where_nothing_goes_on(comfy, monkeypatch):
    dialogue, made = module(comfy, "nodes.dialogue"), []
    answer = dialogue.answer
    monkeypatch.setattr(dialogue, "answer", lambda *args: (made.append(answer(*args)), made[-1])[1])
    comfy.value(question("Who is it?", tokens=5), "answer")
    comfy.value(then(question("Who is she?", tokens=5), "again", "Why?"), "again")
    assert [bool(chat.kept) for _, chat in made] == [False, True, False]


def test_a_question_without_a_picture_and_several_pictures(comfy):
    graph = question(tokens=4)
    alone = {
        "loader": graph["loader"],
        "answer": {**graph["answer"], "inputs": dict(graph["answer"]["inputs"])},
    }
    del alone["answer"]["inputs"]["vision"]
    chat = comfy.value(alone, "answer", 1)
    assert not chat.conversation[0].visuals and "helpful" in chat.conversation.system
    more = {**graph["vision"]["inputs"], "earlier": ["vision", 0]}
    both = {**graph, "second": node("LanceVisionEncode", **more)}
    both["answer"] = node("LanceUnderstand", **{**graph["answer"]["inputs"], "vision": ["second", 0]})
    assert len(comfy.value(both, "answer", 1).conversation[0].visuals) == 2


def test_positions_as_trained(comfy):
    graph = question(tokens=3)
    changed = {**graph["answer"]["inputs"], "positions": "as trained"}
    trained = {**graph, "answer": node("LanceUnderstand", **changed)}
    graph, trained = (then(g, "again", "And?") for g in (graph, trained))
    a, b = (comfy.value(g, "answer", 1).conversation.kept.context.keys[1] for g in (graph, trained))
    size = min(len(a), len(b))
    assert away(a[:size], b[:size]) > 0.01


def test_which_part_of_a_clip_is_seen(comfy):
    graph = question(tokens=3)
    graph["loader"] = node("LanceLoader", checkpoint=VIDEO_CHECKPOINT, weight_dtype="default")
    graph["clip"] = node("LoadVideo", file="clip.mp4")
    seen = dict(graph["vision"]["inputs"], video=["clip", 0], clip_frames=5)
    del seen["image"]
    graph["vision"] = node("LanceVisionEncode", **seen)
    assert comfy.value(graph, "vision").segments[0].grid[0] == 3
    graph["vision"] = node("LanceVisionEncode", **dict(seen, role="edit source", vae=["loader", 2]))
    refused(comfy, graph, "vision", "clip_fps", "for questions")


def test_a_chat_of_another_checkpoint_is_refused(comfy):
    graph = then(question(), "again", "Why?", lance=["other", 1])
    graph["other"] = node("LanceLoader", checkpoint=VIDEO_CHECKPOINT, weight_dtype="default")
    refused(comfy, graph, "again", "held with Lance_3B", "one Lance Loader")


# -- Lance Score, Lance Enhance Prompt -----------------------------------------------------------------------


def score(images=("photo", 0), **changes):
    inputs = {
        "text": "a cat",
        "keep": 1,
        "answer": "Yes",
        "resolution": "image_256res",
        "positions": "released",
    }
    inputs |= {"question": 'Is it "{text}"?', "image": list(images)}
    return node("LanceScore", lance=["loader", 1], **(inputs | changes))


def test_scores_sort_a_batch(comfy):
    graph = question()
    graph |= {
        "other": node("ImageInvert", image=["photo", 0]),
        "batch": node("ImageBatch", image1=["photo", 0], image2=["other", 0]),
        "score": score(("batch", 0), keep=2),
    }
    images, best, listed, batch = comfy.run(
        graph, [("score", 0), ("score", 1), ("score", 2), ("batch", 0)]
    ).values
    values = [float(line) for line in listed.split("\n")]
    assert len(values) == 2 and best == pytest.approx(max(values), abs=1e-4)
    alone = comfy.run(graph | {"score": score()}, [("score", 1)]).values[0]
    assert alone == pytest.approx(values[0], abs=2e-4)
    first = int(values[1] > values[0])
    assert values[0] == values[1] or torch.equal(images[0], batch[first])
    refused(comfy, graph | {"score": score(question="Is it?")}, "score", "text")


def test_an_enhanced_prompt_falls_back_where_nothing_is_set_up(comfy, monkeypatch, caplog):
    for name in ("BASE_URL", "MODEL_NAME", "API_KEY"):
        monkeypatch.delenv(f"LANCE_REWRITE_{name}", raising=False)
    enhance = dict(lance=["loader", 1], wish="a fox", task="t2i", temperature=0.7, seed=0)
    graph = t2i() | {"prompt": node("LanceEnhancePrompt", writer="service", **enhance)}
    assert comfy.value(graph, "prompt") == "a fox" and "not enhanced" in caplog.text


def test_an_enhanced_prompt_is_what_the_model_writes(comfy, monkeypatch):
    nodes, asked = module(comfy, "nodes.nodes_dialogue"), []

    def write(reader, before, question, visuals, *rest):
        asked.append((before.system, question, len(visuals)))
        return ' "A red fox." ', before

    monkeypatch.setattr(nodes.dialogue, "answer", write)
    enhance = dict(
        lance=["loader", 1], wish="a fox", task="i2v", writer="this model", temperature=0.7, seed=0
    )
    graph = question() | {"prompt": node("LanceEnhancePrompt", image=["photo", 0], **enhance)}
    del graph["answer"]
    assert comfy.value(graph, "prompt") == "A red fox."
    ((system, wish, seen),) = asked
    assert "first frame" in system and wish == "The wish: a fox" and seen == 1


# -- guidance on what is shown -------------------------------------------------------------------------------


def test_cfg_vision_is_the_core_formula(comfy):
    """All branches by hand, a step at a time, against the sampler."""
    graph = lance(edit(), cfg=3.0, cfg_vision=2.0, renorm="none", steps=1, shift=1.0)
    made = samples(comfy, graph)
    seen, conditioning = comfy.run(graph, [("vision", 0), ("text", 0)]).values
    encoded = conditioning[0][1]["lance"].encoded
    core = module(comfy, "lance_core.model.dual_expert")
    sequence = module(comfy, "lance_core.model.sequence")
    sampler = module(comfy, "lance_core.model.sampler")
    model = comfy.value(graph, "loader")
    grid = tuple(made.shape[2:])
    import comfy.model_management as mm

    with torch.inference_mode():
        mm.load_models_gpu([model, *model.get_additional_models()])
        model.model.current_patcher = model
        experts = model.model.experts(model.load_device, {})
        plan, dropped = encoded.plan(grid), encoded.without_references.plan(grid)
        ready, bare = experts.prefill(plan), experts.prefill(dropped)
        x = sampler.seeded_noise(7, grid, encoded.reference_tokens)[None]
        rows = [core.Row(ready, branch) for branch in sequence.Branch]
        rows.append(core.Row(bare, sequence.Branch.CONDITIONAL))
        c, r, u = experts.velocity(rows, torch.cat([x] * 3), torch.ones(3, grid[0]))
        wanted = x - (u + 2.0 * (r - u) + 3.0 * (c - r))
    raw = module(comfy, "nodes.latents").normalised(made)
    assert away(raw, wanted.permute(0, 4, 1, 2, 3)) < 2e-2
    off = samples(comfy, lance(edit(), cfg=3.0, renorm="none", steps=1, shift=1.0))
    assert away(made, off) > 2e-2


def test_cfg_vision_off_is_the_same_graph(comfy):
    assert torch.equal(samples(comfy, lance(edit())), samples(comfy, lance(edit(), cfg_vision=1.0)))


def test_cfg_vision_needs_something_shown(comfy):
    refused(comfy, lance(t2i(), cfg_vision=2.0), "sampler", "shows nothing")


def test_the_guider_has_it_too(comfy):
    graph = edit()
    graph["latent"] = node("LanceVisionEncode", **graph["vision"]["inputs"])
    settings = dict(cfg=4.0, cfg_start=1.0, cfg_end=0.0, renorm="global", renorm_min=0.0, cfg_vision=2.0)
    links = dict(model=["loader", 0], positive=["text", 0], negative=["text", 1])
    graph = advanced(graph, node("LanceGuider", **links, **settings))
    graph["noise"]["inputs"]["positive"] = ["text", 0]
    graph["sampler"]["inputs"]["latent_image"] = ["vision", 1]
    assert away(samples(comfy, graph), samples(comfy, lance(edit(), cfg_vision=2.0))) < 1e-5


# -- Lance Keyframes, Lance Extend Video ---------------------------------------------------------------------


def test_keyframes_are_kept_bit_for_bit(comfy):
    graph = i2v()
    graph["last"] = node(
        "LanceKeyframes", vae=["loader", 2], latent=["latent", 0], image=["photo", 0], frame=-1
    )
    graph = lance(graph, latent=["last", 0])
    start, made = comfy.run(graph, [("last", 0), ("sampler", 0)]).values
    mask = start["noise_mask"].amax(dim=(1, 3, 4))[0]
    assert mask.tolist() == [0, 1, 0]
    for frame in (0, 2):
        assert torch.equal(made["samples"][:, :, frame], start["samples"][:, :, frame])
    assert away(made["samples"][:, :, 1], start["samples"][:, :, 1]) > 0.1


def test_the_first_frame_as_a_keyframe_is_image_to_video(comfy):
    graph = i2v()
    trained = comfy.value(graph, "latent")
    empty = dict(size="custom", aspect="1:1", width=96, height=64, frames=9, batch_size=1)
    graph["empty"] = node("EmptyLanceLatent", **empty)
    graph["first"] = node(
        "LanceKeyframes", vae=["loader", 2], latent=["empty", 0], image=["photo", 0], frame=0
    )
    ours = comfy.value(graph, "first")
    assert torch.equal(ours["samples"], trained["samples"])
    assert torch.equal(ours["noise_mask"], trained["noise_mask"])
    graph["first"]["inputs"]["frame"] = 9
    refused(comfy, graph, "first", "9 frames", "0 to 8")


def extended(**changes):
    inputs = dict(prompts="it goes on\n\nand on", frames=4, size="video_192p", overlap=1, hold_colours=False)
    inputs |= dict(seed=7, steps=2, cfg=4.0, images=["photo", 0]) | changes
    links = dict(model=["loader", 0], lance=["loader", 1], vae=["loader", 2])
    return i2v() | {"longer": node("LanceExtendVideo", **links, **inputs)}


def test_a_clip_goes_on_with_a_prompt_for_each_part(comfy):
    images = comfy.value(extended(), "longer")
    assert images.shape[0] == 1 + 4 + 4 and bool(torch.isfinite(images).all())
    one = comfy.value(extended(prompts="it goes on"), "longer")
    assert torch.equal(images[:5], one)


def test_frames_before_are_put_in_front(comfy):
    graph = extended(prompts="it goes on")
    graph["shot"] = {**graph["longer"], "inputs": {**graph["longer"]["inputs"], "before": ["longer", 0]}}
    first, both = comfy.run(graph, [("longer", 0), ("shot", 0)]).values
    assert len(both) == 2 * len(first) and torch.equal(both[len(first) :], first)
    assert float((both[: len(first)] - first).abs().max()) < 0.01  # through 8 bits


def test_a_part_is_image_to_video(comfy):
    """What Lance Extend Video makes of a picture is what the nodes for image to video make of it."""
    images = comfy.value(extended(prompts="the shapes drift apart"), "longer")
    graph = i2v(frames=5)
    graph["latent"]["inputs"] |= {"size": "video_192p"}
    graph = lance(graph, steps=2, cfg_end=0.4)
    graph["decoded"] = node("LanceVAEDecode", samples=["sampler", 0], vae=["loader", 2])
    wanted = comfy.value(graph, "decoded")
    assert float((images[1:] - wanted[1:]).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("changes", "words"), [({"prompts": " \n"}, "0 prompts"), ({"prompts": "a\n" * 65}, "65 prompts")]
)
def test_what_extend_refuses(comfy, changes, words):
    refused(comfy, extended(**changes), "longer", words)
