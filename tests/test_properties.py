"""What must hold whatever the weights: the fast path against the plain reference, and the promises of the
public API.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import Block, Model, positions, unconditional
from safetensors.torch import load_file

import lance_core
from lance_core.config import VAEConfig
from lance_core.inputs import prompts
from lance_core.model import dual_expert, rope
from lance_core.model.attention import attention
from lance_core.model.dual_expert import Plan, Row
from lance_core.model.sampler import Guidance, euler, schedule
from lance_core.model.sequence import Branch, Kind, Placed, Role, TextSegment
from lance_core.text_generation import Chooser, write

BF16 = {"latent": 0.07, "frames": 0.026}  # twice what was measured
FP16 = {"latent": 0.009, "frames": 0.0035}
QUICK = {"width": 64, "height": 48, "steps": 3}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random image, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(x * rng.uniform(0.02, 0.2) + y * rng.uniform(0.02, 0.2) + rng.uniform(0, 6)) for _ in range(3)
    ]
    return (127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)


def reference_of(lance) -> Model:
    folder, t = lance.checkpoint.path, lance.checkpoint.tokenizer
    config = json.loads((folder / "llm_config.json").read_text())
    return Model(load_file(folder / "model.safetensors"), config, t.vision_start, t.vision_end, t.pad)


def blocks_of(sequence) -> list[Block]:
    fields = [
        {name: getattr(s, name) for name in ("ids", "grid", "data") if hasattr(s, name)}
        for s in sequence.segments
    ]
    return [
        Block(s.kind.value, s.role.value, **given) for s, given in zip(sequence.segments, fields, strict=True)
    ]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


# -- against the reference -----------------------------------------------------------------------------------


def test_reference_reproduces_golden_velocities(drawn):
    """The second opinion itself is held against the recording, so that agreeing with it means something."""
    blocks, model = blocks_of(drawn.sequence), reference_of(drawn.lance)
    x = drawn.start[0].clone()
    t = torch.ones(len(x))
    if drawn.first_frame is not None:
        x[:1], t[0] = drawn.first_frame, 0
    pairs = {"cond": (blocks, positions(blocks, 2)), "uncond": unconditional(blocks, 2)}
    for name, (given, at) in pairs.items():
        expected = drawn.tensors.get(f"velocity_step0_{name}")
        if expected is not None:
            assert error(model.velocity(given, at, x, t).flatten(0, 2), expected) < 5e-5


def test_reference_reproduces_golden_logits(answered):
    """All answer tokens in one uncached pass, where the model wrote them one by one."""
    blocks, model = blocks_of(answered.sequence), reference_of(answered.lance)
    written = answered.tensors["answer_ids"].tolist()
    last = Block("text", "", (*answered.sequence.segments[-1].ids, *written[:-1]))
    blocks = [*blocks[:-1], last]
    logits = model.logits(blocks, positions(blocks, 2, offsets=False))[
        -len(written) :, : len(answered.lance.checkpoint.tokenizer)
    ]
    assert error(logits, answered.tensors["logits"]) < 5e-5
    assert error(torch.stack(answered.logits), logits) < 5e-5


OTHERS = {
    "narrow": {
        "hidden": 36,
        "inner": 50,
        "layers": 1,
        "heads": 3,
        "kv": 3,
        "width": 12,
        "mrope": (2, 2, 2),
        "theta": 500.0,
    },
    "deep, one kv head": {
        "hidden": 40,
        "inner": 24,
        "layers": 5,
        "heads": 5,
        "kv": 1,
        "width": 8,
        "mrope": (0, 1, 3),
        "rows": 398,
    },
    "heads wider than hidden": {
        "hidden": 30,
        "inner": 90,
        "layers": 2,
        "heads": 4,
        "kv": 2,
        "width": 20,
        "mrope": (5, 1, 4),
        "rows": 640,
    },
}
VITS = {
    "narrow": {"depth": 1, "num_heads": 4, "fullatt_block_indexes": [], "tokens_per_second": 4},
    "deep, one kv head": {"depth": 4, "hidden_size": 24, "fullatt_block_indexes": [0, 3], "window_size": 56},
    "heads wider than hidden": {"hidden_size": 32, "intermediate_size": 12},
}
VAES = {
    "narrow": VAEConfig((4, 8, 16, 16), (8, 8, 16, 32), 1, 1, (False, True, True)),
    "deep, one kv head": VAEConfig((8, 16, 32, 16), (6, 12, 12, 24), 3, 2, (False, True, True)),
    "heads wider than hidden": VAEConfig((6, 12, 24, 24), (10, 20, 20, 20), 2, 3, (False, True, True)),
}


@pytest.fixture(scope="module", params=list(OTHERS))
def other(request, write_checkpoint, tmp_path_factory):
    """A random checkpoint unlike the golden one in every size."""
    name = request.param
    folder = write_checkpoint(
        tmp_path_factory.mktemp("other"), seed=len(name), vit=VITS[name], vae=VAES[name], **OTHERS[name]
    )
    return lance_core.load(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "task, given",
    [
        ("t2i", {"width": 80, "height": 48}),
        ("t2v", {"width": 64, "height": 32, "num_frames": 10, "renorm": "channel", "renorm_min": 0.5}),
        ("i2v", {"image": picture(40, 50), "num_frames": 5, "steps": 1}),
        ("image_edit", {"image": picture(70, 50), "cfg_interval": (0.0, 0.95), "renorm": "none"}),
        ("video_edit", {"video": (np.stack([picture(30, 40, i) for i in range(6)]), 12.0), "steps": 1}),
        (
            "subject_image",
            {"references": [picture(64, 64), picture(30, 90)], "width": 48, "height": 64, "cfg": 0.5},
        ),
        (
            "subject_video",
            {"references": picture(50, 60), "width": 48, "height": 64, "num_frames": 5, "shift": 1.0},
        ),
        ("t2i", {"width": 48, "height": 48, "negative_prompt": "blurry, badly drawn"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "negative" if "negative_prompt" in value else "",
)
def test_other_checkpoints_equal_the_reference(other, recorded, task, given):
    resolution = "video_192p" if "vid" in task or "2v" in task else "image_256res"
    options = {"resolution": resolution, "steps": 2, "seed": 5} | given
    run = recorded(other, task, "a fox 狐狸\nin 20 snows", **options)
    blocks, model, rate = blocks_of(run.sequence), reference_of(other), other.config.vit.tokens_per_second
    uncond = unconditional(blocks, rate)
    if "negative_prompt" in given:
        ids = tuple(other.checkpoint.tokenizer.encode(given["negative_prompt"]))
        changed = [Block("text", "caption", ids) if b.role == "caption" else b for b in blocks]
        uncond = (changed, positions(changed, rate))
    defaults = {"shift": 3.5, "cfg": 4.0, "renorm": "global", "renorm_min": 0.0}
    chosen = {key: options.get(key, value) for key, value in defaults.items()}
    latent = model.sample(
        (blocks, positions(blocks, rate)),
        uncond,
        run.start[0],
        steps=options["steps"],
        interval=options.get("cfg_interval", (0.4, 1.0)),
        first_frame=run.first_frame,
        **chosen,
    )
    assert error(run.result.latent, latent) < 5e-5
    t, h, w = latent.shape[:3]
    assert run.result.frames.shape == (4 * t - 3, 16 * h, 16 * w, 3) and bool(
        torch.isfinite(run.result.frames).all()
    )


def test_other_checkpoints_answer_as_the_reference(other):
    answer = other.understand(
        "what is this?", image=picture(40, 60), resolution="image_256res", max_new_tokens=6
    )
    with torch.inference_mode():
        seen = other.components.vit_segment(picture(40, 60)[None], "image_256res", Role.QUESTION)
    blocks = blocks_of(
        prompts.question(
            other.checkpoint.tokenizer, prompts.SYSTEM_PROMPTS["x2t_image"], [seen], "what is this?"
        )
    )
    model, rate, written = reference_of(other), other.config.vit.tokens_per_second, []
    for _ in answer.token_ids:
        given = [*blocks, Block("text", "", tuple(written))] if written else blocks
        logits = model.logits(given, positions(given, rate, offsets=False))
        written.append(int(logits[-1, : len(other.checkpoint.tokenizer)].argmax()))
    assert answer.token_ids == written


def test_nothing_after_the_target_matters(recorded, image_lance):
    run = recorded(image_lance, "t2i", "a fox", **QUICK)
    blocks, model, t = blocks_of(run.sequence), reference_of(image_lance), torch.ones(1)
    tokenizer = image_lance.checkpoint.tokenizer
    longer = [*blocks, Block("text", "", (tokenizer.im_end, *tokenizer.encode("and much more")))]
    bare = model.velocity(blocks, positions(blocks, 2), run.start[0], t)
    assert error(model.velocity(longer, positions(longer, 2), run.start[0], t), bare) < 1e-5
    assert error(run.velocities[0][3][0], bare) < 1e-5


# -- the context ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(recorded, image_lance):
    return recorded(
        image_lance, "image_edit", "make it blue", image=picture(60, 60), resolution="image_256res", steps=1
    )


def fill(lance, sequence, parts_of) -> list[torch.Tensor]:
    """Keys and values after running the conditional context in the parts that parts_of makes of it."""
    model, plan = lance.components.experts(), Plan.of(sequence, 2, guided=False)
    parts = plan.prefix + plan.rests[Branch.CONDITIONAL]
    with torch.inference_mode():
        context = model.new_context(sum(s.length for s, _ in parts))
        for part in parts_of(parts):
            model.extend(context, context.prefix, part, model.markers(sequence))
    assert context.prefix.filled == context.prefix.stop
    return context.keys + context.values


def token_by_token(parts):
    for segment, position in parts:
        if segment.kind is not Kind.TEXT:
            yield [Placed(segment, position)]
            continue
        for i, token in enumerate(segment.ids):
            yield [Placed(TextSegment(segment.role, (token,)), position[:, i : i + 1])]


@pytest.mark.parametrize(
    "parts_of", [lambda parts: [[part] for part in parts], token_by_token], ids=["by segment", "by token"]
)
def test_prefill_in_parts_equals_at_once(edit, image_lance, parts_of):
    whole = fill(image_lance, edit.sequence, lambda parts: [parts])
    split = fill(image_lance, edit.sequence, parts_of)
    assert max(error(a, b) for a, b in zip(split, whole, strict=True)) < 1e-5


def test_velocity_leaves_the_context_alone(recorded, image_lance):
    run = recorded(image_lance, "t2i", "a fox", **QUICK)
    context, (rows, x, t, v) = run.prepared.context, run.velocities[0]
    assert rows == list(Branch)
    with torch.inference_mode():
        again = image_lance.components.experts().velocity(
            [Row(run.prepared, b) for b in reversed(Branch)], x.flip(0), t
        )
    assert error(again.flip(0), v) < 1e-6  # rows in another order, after all the other steps
    kept = [k[r.start : r.stop] for k in context.keys for r in (context.prefix, *context.rests.values())]
    assert all(bool(torch.isfinite(k).all()) for k in kept) and context.nbytes == sum(
        k.nbytes for k in context.keys + context.values
    )


def test_unconditional_context_is_the_conditional_less_the_caption(drawn):
    if len(drawn.plan.rests) == 1:
        assert drawn.case["cfg"] == 1
        return
    cond, uncond = (drawn.plan.prefix + rest for rest in drawn.plan.rests.values())
    kept = [(s, p) for s, p in cond if s.role is not Role.CAPTION]
    assert [s for s, _ in uncond] == [s for s, _ in kept] and len(kept) == len(cond) - 1
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(uncond, kept, strict=True)
    )  # a gap stays where the caption was
    bare = rope.positions(drawn.sequence.without_caption(), 2)
    assert torch.equal(drawn.plan.targets[Branch.UNCONDITIONAL], bare[-1])
    assert drawn.sequence.source is None or torch.equal(*drawn.plan.targets.values())


def test_the_shared_prefix_is_computed_once(edit, monkeypatch, image_lance):
    tokens, run_layers = [], dual_expert.run_layers

    def counted(und_layers, gen_layers, und, gen, *rest):
        tokens.append(und.shape[1] + (0 if gen is None else gen.shape[1]))
        return run_layers(und_layers, gen_layers, und, gen, *rest)

    monkeypatch.setattr(dual_expert, "run_layers", counted)
    with torch.inference_mode():
        image_lance.components.experts().prefill(edit.plan)
    caption = edit.sequence.context[edit.sequence.caption].length
    template = edit.sequence.context[-1].length
    whole = sum(s.length for s in edit.sequence.context)
    assert sum(tokens) == whole + template  # all but the template after the caption, once
    assert caption + template in tokens and tokens.count(template) == 1


# -- results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "checkpoint, task", [("Lance_3B", "t2i"), ("Lance_3B_Video", "i2v"), ("Lance_3B", "image_edit")]
)
def test_a_batch_equals_single_runs(opened, checkpoint, task):
    lance = opened(checkpoint)
    options = {"steps": 2} | {
        "t2i": {"width": 64, "height": 48},
        "i2v": {"image": picture(30, 40), "resolution": "video_192p", "num_frames": 5},
        "image_edit": {"image": picture(30, 40), "resolution": "image_256res", "renorm": "channel"},
    }[task]
    both = lance.generate(task, "two foxes", seed=8, batch_size=2, **options)
    for i in range(2):
        one = lance.generate(task, "two foxes", seed=8 + i, **options)
        assert error(both.latent[i], one.latent) < 1e-5
        assert (both.frames[i] - one.frames).abs().max() < 1e-4
    assert error(both.latent[0], both.latent[1]) > 0.1


def test_given_noise_is_the_seeds(image_lance):
    seeded = image_lance.generate("t2i", "a fox", seed=9, **QUICK)
    noise = torch.randn((3 * 4, 48), generator=torch.Generator().manual_seed(9)).view(1, 3, 4, 48)
    for given in (noise, noise[None], noise.numpy()):
        assert torch.equal(
            image_lance.generate("t2i", "a fox", seed=1, noise=given, **QUICK).latent, seeded.latent
        )
    batch = image_lance.generate("t2i", "a fox", noise=torch.stack([noise, -noise]), batch_size=2, **QUICK)
    assert error(batch.latent[0], seeded.latent) < 1e-5 and error(batch.latent[1], seeded.latent) > 0.1


def test_seed_zero_is_a_seed(image_lance, recorded):
    zero = recorded(image_lance, "t2i", "a fox", seed=0, **QUICK)
    assert torch.equal(
        zero.start.view(-1, 48), torch.randn((12, 48), generator=torch.Generator().manual_seed(0))
    )
    assert torch.equal(zero.result.latent, image_lance.generate("t2i", "a fox", seed=0, **QUICK).latent)
    assert error(zero.result.latent, image_lance.generate("t2i", "a fox", **QUICK).latent) > 0.1
    assert zero.result.request["seed"] == 0


def test_global_random_state_is_neither_used_nor_touched(image_lance):
    def draw() -> tuple[torch.Tensor, list[int]]:
        latent = image_lance.generate(
            "image_edit", "a fox", image=picture(20, 20), resolution="image_256res", steps=1
        ).latent
        answer = image_lance.understand(
            "?", image=picture(20, 20), resolution="image_256res", max_new_tokens=4, temperature=1.0
        )
        return latent, answer.token_ids

    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: E731
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        before = states()
        seen.append(draw())
        assert states() == before
    assert torch.equal(seen[0][0], seen[1][0]) and seen[0][1] == seen[1][1]


def test_a_negative_prompt_equal_to_the_prompt_cancels_guidance(image_lance):
    plain = image_lance.generate("t2i", "a red fox", cfg=1.0, **QUICK).latent
    same = image_lance.generate("t2i", "a red fox", negative_prompt="a red fox", cfg=7.0, **QUICK).latent
    assert error(same, plain) < 1e-5


def test_a_negative_prompt_matters_and_an_empty_one_is_none(image_lance):
    none = image_lance.generate("t2i", "a red fox", **QUICK).latent
    assert torch.equal(image_lance.generate("t2i", "a red fox", negative_prompt=" ", **QUICK).latent, none)
    assert (
        error(image_lance.generate("t2i", "a red fox", negative_prompt="grass", **QUICK).latent, none) > 1e-3
    )


def test_a_video_of_one_frame_is_an_image(video_lance):
    image = video_lance.generate("t2i", "a red fox", **QUICK)
    video = video_lance.generate(
        "t2v", "a red fox", num_frames=1, system_prompt=prompts.SYSTEM_PROMPTS["t2i"], **QUICK
    )
    assert torch.equal(image.latent, video.latent) and torch.equal(image.frames, video.frames)


def test_the_first_frame_stays_as_it_came(video_lance, recorded):
    seen = []
    run = recorded(
        video_lance, "i2v", "it moves", image=picture(30, 40), resolution="video_192p", num_frames=5, steps=3,
        callback=lambda step, total, latent: seen.append(latent[:1].clone()),
    )  # fmt: skip
    assert torch.equal(run.result.latent[:1], run.first_frame)
    assert all(torch.equal(frame, run.first_frame) for frame in seen) and len(seen) == 3
    assert all(t[:, 0].eq(0).all() and t[:, 1:].gt(0).all() for _, _, t, _ in run.velocities)


def test_the_system_prompt_matters(image_lance):
    default = image_lance.generate("t2i", "a fox", **QUICK).latent
    assert torch.equal(
        image_lance.generate("t2i", "a fox", system_prompt=prompts.SYSTEM_PROMPTS["t2i"], **QUICK).latent,
        default,
    )
    assert error(image_lance.generate("t2i", "a fox", system_prompt="", **QUICK).latent, default) > 1e-3


def test_callback_sees_every_step(image_lance):
    seen = []
    result = image_lance.generate(
        "t2i", "a fox", callback=lambda *args: seen.append((*args[:2], args[2].clone())), **QUICK
    )
    assert [(step, total) for step, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(latent.shape == (1, 3, 4, 48) and latent.dtype == torch.float32 for *_, latent in seen)
    assert torch.equal(seen[-1][2], result.latent)
    batch = []
    image_lance.generate(
        "t2i", "a fox", batch_size=2, callback=lambda *args: batch.append(args[2].shape), **QUICK
    )
    assert batch == [(2, 1, 3, 4, 48)] * 3


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


def test_cancelling_leaves_nothing_behind(write_checkpoint, tmp_path):
    lance = lance_core.load(write_checkpoint(tmp_path), dtype=torch.float32)

    def ask(**more):
        options = {"resolution": "image_256res", "steps": 2}
        return lance.generate("image_edit", "a fox", image=picture(20, 20), **options, **more)

    def question(**more):
        options = {"resolution": "image_256res", "max_new_tokens": 4}
        return lance.understand("?", image=picture(20, 20), **options, **more)

    for stage in (
        "loading vae",
        "loading und",
        "encoding the picture",
        "encoding",
        "denoising",
        "decoding",
        "writing",
    ):
        lance.components.progress = lambda what, done, total, stage=stage: stop() if what == stage else None
        with pytest.raises(Stop):
            question() if stage == "writing" else ask()
    lance.components.progress = None
    with pytest.raises(Stop):
        ask(callback=stop)
    with pytest.raises(Stop):
        question(on_token=stop)
    fresh = lance_core.load(lance.checkpoint.path, dtype=torch.float32)
    other = fresh.generate("image_edit", "a fox", image=picture(20, 20), resolution="image_256res", steps=2)
    assert torch.equal(ask().latent, other.latent) and torch.equal(ask().frames, other.frames)
    assert question() == fresh.understand(
        "?", image=picture(20, 20), resolution="image_256res", max_new_tokens=4
    )


def test_progress_reports_every_stage_to_its_end(write_checkpoint, tmp_path):
    last: dict[str, tuple[int, int]] = {}
    lance = lance_core.load(
        write_checkpoint(tmp_path), dtype=torch.float32, progress=lambda what, *n: last.update({what: n})
    )
    lance.generate(
        "image_edit", "a fox", image=picture(20, 20), resolution="image_256res", steps=2, batch_size=2
    )
    assert set(last) >= {f"loading {p}" for p in ("und", "gen", "vit", "vae")} | {
        "encoding the picture",
        "encoding",
        "denoising",
        "decoding",
    }
    assert all(done == total > 0 for done, total in last.values())


# -- guidance and the solver ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "renorm, renorm_min",
    [("none", 0.0), ("global", 0.0), ("global", 0.97), ("channel", 0.0), ("channel", 0.97)],
)
@pytest.mark.parametrize("cfg", [0.0, 0.5, 1.0, 1.6, 7.0])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.4, 1.0), (0.5, 0.9), (0.3, 0.3)])
def test_guidance_equals_a_plain_loop(cfg, interval, renorm, renorm_min):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 1, 2, 3, 4, generator=generator)
    a, b = (torch.randn(4, 4, generator=generator) / 2 for _ in range(2))
    calls = []

    def velocity(x, t, guided):
        calls.append(guided)
        return torch.tanh(x @ a) + t, (torch.sin(x @ b) - t if guided else None)

    got = euler(velocity, x0, schedule(5, 2.0), Guidance(cfg, interval, renorm, renorm_min))
    even = torch.arange(5, -1, -1, dtype=torch.float64) / 5
    times = 2 * even / (1 + even)
    rows, guided = [], []
    for x in x0.double():
        for t, after in pairwise(times.tolist()):
            v = c = torch.tanh(x @ a.double()) + t
            if cfg != 1 and interval[0] < t <= interval[1]:
                u = torch.sin(x @ b.double()) - t
                v = u + cfg * (c - u)
                if renorm == "global":
                    v = v * min(max(float(c.norm() / (v.norm() + 1e-8)), renorm_min), 1)
                if renorm == "channel":
                    cells = zip(c.reshape(-1, 4), v.reshape(-1, 4), strict=True)
                    v = torch.stack(
                        [w * min(max(float(d.norm() / (w.norm() + 1e-8)), renorm_min), 1) for d, w in cells]
                    ).view(v.shape)
            guided.append(cfg != 1 and interval[0] < t <= interval[1])
            x = x - v * (t - after)
        rows.append(x)
    assert calls == guided[: len(calls)] and error(got.double(), torch.stack(rows)) < 1e-5


def test_the_interval_is_open_below_and_closed_above():
    guidance = Guidance(interval=(0.5, 0.75))
    assert [guidance.applies(t) for t in schedule(4, 1.0)] == [False, True, False, False, False]
    assert Guidance(interval=(0.0, 0.1)).applies(torch.tensor(0.1))  # compared in float32


def test_scale_one_and_an_empty_interval_are_no_guidance(image_lance, recorded):
    plain = recorded(image_lance, "t2i", "a fox", cfg=1.0, **QUICK)
    assert all(rows == [Branch.CONDITIONAL] for rows, *_ in plain.velocities) and len(plain.plan.rests) == 1
    never = image_lance.generate("t2i", "a fox", cfg=4.0, cfg_interval=(0.3, 0.3), **QUICK)
    assert error(never.latent, plain.result.latent) < 1e-6


def test_one_step(image_lance, recorded):
    run = recorded(image_lance, "t2i", "a fox", cfg=1.0, width=32, height=32, steps=1)
    assert torch.allclose(run.result.latent, (run.start - run.velocities[0][3])[0])


# -- precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, bound", [(torch.bfloat16, BF16), (torch.float16, FP16)], ids=["bfloat16", "float16"]
)
def test_drift_from_float32_is_bounded(opened, dtype, bound):
    def rms(a, b):
        return float((a - b).norm() / b.norm())

    for task, given in (
        ("t2i", {"width": 64, "height": 64}),
        ("image_edit", {"image": picture(50, 50), "resolution": "image_256res"}),
    ):
        exact, rough = (
            opened("Lance_3B", d).generate(task, "a red fox", steps=4, **given)
            for d in (torch.float32, dtype)
        )
        assert rough.latent.dtype == rough.frames.dtype == torch.float32
        assert 0 < rms(rough.latent, exact.latent) < bound["latent"]
        assert rms(rough.frames, exact.frames) < bound["frames"]


# -- answers -------------------------------------------------------------------------------------------------


ASK = {"image": picture(40, 40), "resolution": "image_256res"}


def test_understanding_loads_only_what_it_needs(write_checkpoint, tmp_path):
    lance = lance_core.load(write_checkpoint(tmp_path), dtype=torch.float32)
    assert set(lance.components._loaded) == set()
    lance.understand("what?", max_new_tokens=2, **ASK)
    assert set(lance.components._loaded) == {"und", "vit"}
    lance.unload("vit")
    assert set(lance.components._loaded) == {"und"}
    lance.unload()
    lance.generate("t2i", "a fox", width=32, height=32, steps=1)
    assert set(lance.components._loaded) == {"und", "gen", "vae"}


def test_max_new_tokens_is_respected(image_lance):
    long = image_lance.understand("what?", max_new_tokens=12, **ASK).token_ids
    for n in (1, 2, 5):
        assert image_lance.understand("what?", max_new_tokens=n, **ASK).token_ids == long[:n]


def test_the_answer_ends_at_the_end_token(image_lance):
    with torch.inference_mode():
        seen = image_lance.components.vit_segment(ASK["image"][None], ASK["resolution"], Role.QUESTION)
    sequence = prompts.question(image_lance.checkpoint.tokenizer, "", [seen], "what?")
    tokenizer = image_lance.checkpoint.tokenizer
    script = iter([*tokenizer.encode("ab"), tokenizer.im_end, *tokenizer.encode("no more")])
    pieces = []
    with torch.inference_mode():
        answer = image_lance.answer(sequence, 20, lambda _: next(script), pieces.append)
    assert answer.text == "ab" and answer.token_ids == [*tokenizer.encode("ab"), tokenizer.im_end]
    assert "".join(pieces) == "ab" and [p.token_id for p in pieces] == answer.token_ids


def test_sampling_is_seeded(image_lance):
    def ask(seed, **more):
        return image_lance.understand("what?", seed=seed, max_new_tokens=8, **ASK, **more).token_ids

    hot = {"temperature": 1.5}
    assert ask(0, **hot) == ask(0, **hot)
    assert len({tuple(ask(seed, **hot)) for seed in range(4)}) > 1
    greedy = ask(0)
    assert ask(3, temperature=1e-4) == greedy == ask(3, temperature=2.0, top_p=1e-6)


def test_top_p_keeps_the_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = lambda p: {Chooser(1.0, p, seed)(logits) for seed in range(200)}  # noqa: E731
    assert (draws(0.5), draws(0.6), draws(0.9), draws(1.0)) == ({0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3})


@pytest.mark.parametrize("seed", range(3))
def test_pieces_join_to_the_text(image_lance, seed):
    pieces = []
    answer = image_lance.understand(
        "what?", temperature=2.0, seed=seed, max_new_tokens=24, on_token=pieces.append, **ASK
    )
    assert "".join(pieces) == answer.text and [p.token_id for p in pieces] == answer.token_ids


def test_pieces_hold_back_unfinished_characters(image_lance):
    tokenizer = image_lance.checkpoint.tokenizer
    ids = tokenizer.encode("狐狸 in 雪")
    assert len(ids) > 8  # bytes, in this tokeniser
    with torch.inference_mode():
        seen = image_lance.components.vit_segment(ASK["image"][None], ASK["resolution"], Role.QUESTION)
    script, pieces = iter(ids), []
    sequence = prompts.question(tokenizer, "", [seen], "what?")
    with torch.inference_mode():
        answer = image_lance.answer(sequence, len(ids), lambda _: next(script), pieces.append)
    assert answer.text == "狐狸 in 雪" == "".join(pieces)
    assert not any("\ufffd" in p for p in pieces)


@pytest.mark.parametrize("ahead", [False, True])
def test_pieces_are_told_whole_however_the_bytes_fall(image_lance, ahead):
    """Characters of several tokens, bytes that never become one, special tokens between: the text is that of
    all ids at once.
    """
    tokenizer = image_lance.checkpoint.tokenizer
    broken = tokenizer.encode("雪")[:-1]
    whole = tokenizer.encode("a狐 ")
    ids = [
        *whole,
        *broken,
        *tokenizer.encode("b"),
        tokenizer.vision_start,
        *broken,
        *broken,
        *tokenizer.encode("狸c"),
        *broken,
    ]
    script, pieces, told = iter(ids), [], []
    sequence = prompts.question(tokenizer, "", [], "what?")

    def tell(piece):
        pieces.append(piece)
        told.append(len(passes))

    with torch.inference_mode():
        model = image_lance.components.experts(generation=False)
        passes = []
        model.attention = lambda *args: (passes.append(1), attention(*args))[1]
        text, written = write(
            model, tokenizer, sequence, 2.0, len(ids), lambda _: next(script), tell, ahead=ahead
        )
    assert written == ids and text == tokenizer.decode(ids) == "".join(pieces)
    assert "".join(pieces[: len(whole)]) == "a狐 "
    assert pieces[ids.index(tokenizer.vision_start)] == "<|vision_start|>"
    # Each token but the last has a pass of its own, begun before or after it is told.
    layers = model.config.num_layers
    assert [n - told[0] for n in told] == [
        layers * (min(i + ahead, len(ids) - 1) - ahead) for i in range(len(ids))
    ]
