"""`train` from a folder of media to a file: the contract, going on after a stop, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import lance_core
from lance_core import CheckpointError, NumericsError, RequestError, training
from lance_core.checkpoint.checkpoint import Checkpoint
from lance_core.cli.main import main
from lance_core.inputs import media
from lance_core.training import encoding, learner, lora, run, state
from lance_core.training.rows import Row

QUICK = {"rank": 2, "lr": 1e-3, "dtype": "float32", "resolution": "image_256res"}


@pytest.fixture(scope="module")
def model(golden) -> Path:
    return golden / "checkpoint" / "Lance_3B_Video"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Five pictures with captions."""
    return pattern(tmp_path_factory.mktemp("set"), 5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Latents and embeddings, made once for all tests."""
    return tmp_path_factory.mktemp("cache")


def pattern(folder: Path, count: int, seed: int = 0) -> Path:
    """Pictures of one colour pattern: a blue band on red, somewhere."""
    draw = np.random.RandomState(seed)
    for i in range(count):
        pixels = np.full((64, 64, 3), (220, 40, 30))
        pixels[8 * (i % 4) : 8 * (i % 4) + 24] = (30, 60, 200)
        noisy = np.clip(pixels + draw.randint(-8, 8, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"p{i:02}.png")
        (folder / f"p{i:02}.txt").write_text(f"a red and blue pattern {i}")
    return folder


def clip(path: Path, frames: int = 9) -> Path:
    moving = np.zeros((frames, 32, 48, 3), np.uint8)
    for i, frame in enumerate(moving):
        frame[:, 4 * i : 4 * i + 8] = 255
    media.save_video(path, moving, 12)
    return path


def lines(output: Path, name: str = "training.jsonl") -> list[dict]:
    text = (output.with_name(f"{output.stem}.training") / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def without_times(output: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "gpu_gb")} for line in lines(output)]


# -- the contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["generation", "understanding", "both"])
def test_the_command(experts, pictures, model, tmp_path, capsys, cache):
    output = tmp_path / "my_lora.safetensors"
    args = ["train", str(pictures), "-m", str(model), "-o", str(output), "--steps", "4", "--rank", "3"]
    args += ["--alpha", "6", "--lr", "1e-3", "--experts", experts, "--seed", "1", "--dtype", "float32"]
    args += ["--resolution", "image_256res", "--save-every", "2", "--cache", str(cache), "--json", "-q"]
    assert main(args) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["file"] == str(output) and result["steps"] == 4 and result["rows"] == 5
    tensors = load_file(output)
    sides = {"generation": [""], "understanding": ["understanding."], "both": ["", "understanding."]}[experts]
    layers = [
        f"diffusion_model.{side}layers.{n}.{leaf}"
        for side in sides
        for n in range(3)
        for leaf in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    ]
    ends = ("lora_A.weight", "lora_B.weight", "alpha")
    assert tensors.keys() == {f"{layer}.{end}" for layer in layers for end in ends}
    assert all(tensors[f"{layer}.alpha"] == 6 for layer in layers)
    assert all(tensors[f"{layer}.lora_A.weight"].shape[0] == 3 for layer in layers)
    moved = [bool(tensors[f"{layer}.lora_B.weight"].any()) for layer in layers]
    # Of the understanding expert's last layer only keys and values reach a picture.
    assert moved.count(False) == (0 if experts == "generation" else 5)
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()["lance_training"])["settings"]["steps"] == 4
    told = lines(output)
    assert [line["step"] for line in told] == [1, 2, 3, 4]
    assert all(
        {"loss", "ce", "mse", "lr", "grad_norm", "tokens", "rows", "seconds"} <= line.keys() for line in told
    )
    folder = tmp_path / "my_lora.training"
    assert {p.name for p in folder.iterdir()} >= {"training.jsonl", "loss.png", "state-000004.safetensors"}
    assert Image.open(folder / "loss.png").size == (960, 540)
    assert [line["step"] for line in lines(output, "validation.jsonl")] == [0, 2, 4]


def test_what_the_command_says(pictures, model, tmp_path, capsys, cache):
    output = tmp_path / "a.safetensors"
    args = [
        "train",
        str(pictures),
        "-m",
        str(model),
        "-o",
        str(output),
        "--steps",
        "1",
        "--dtype",
        "fp32",
        "-q",
    ]
    assert main([*args, "--resolution", "image_256res", "--cache", str(cache)]) == 0
    said = capsys.readouterr().out
    assert "1 steps on 5 rows" in said and "validation loss" in said and "of trained rows" in said


WRONG = {
    "gone": [],
    "{set}": ["--steps", "0"],
    "{set} ": ["--rank", "0"],
    "{set}  ": ["--lr", "-1"],
    "{set}   ": ["--validation", "-1"],
    "{set}    ": ["-o", "nowhere/a.safetensors"],
    "{set}     ": ["-o", "a.bin"],
    "{set}      ": ["-m", "gone"],
    "{set}       ": ["--steps", "3", "--epochs", "2"],
    "{empty}": [],
}


@pytest.mark.parametrize("data", WRONG)
def test_wrong_requests_end_with_a_sentence(data, pictures, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    place = data.strip().format(set=pictures, empty="empty")
    assert main(["train", place, "-m", str(model), "-o", "a.safetensors", "-q", *WRONG[data]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said) < 520 and said.count("\n") == 1


def test_options_of_the_library(pictures, model, tmp_path):
    with pytest.raises(RequestError, match="train has no option 'ranks'"):
        training.train(pictures, model, tmp_path / "a.safetensors", ranks=4)
    with pytest.raises(RequestError, match="dtype is float16, expected bfloat16 or float32"):
        training.train(pictures, model, tmp_path / "a.safetensors", dtype="float16")
    for option, value in [
        ("experts", "all"),
        ("targets", ()),
        ("schedule", "linear"),
        ("batch", 0),
        ("task", "t2i"),
        ("num_frames", 4),
        ("caption_dropout", 2),
        ("ema", 1),
        ("optimizer", "sgd"),
    ]:
        with pytest.raises(RequestError, match=option):
            training.train(pictures, model, tmp_path / "a.safetensors", **{option: value})


# -- going on ------------------------------------------------------------------------------------------------

LONG = QUICK | {"steps": 7, "save_every": 3, "batch": 2, "ema": 0.9, "schedule": "cosine", "max_tokens": 400}


class Stop(BaseException):
    """As a signal raises."""


def test_a_stopped_run_goes_on_bit_for_bit(pictures, model, tmp_path, cache):
    whole, parted = tmp_path / "whole.safetensors", tmp_path / "parted.safetensors"
    training.train(pictures, model, whole, **LONG, cache=cache)

    def stop(step, total, result):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        training.train(pictures, model, parted, **LONG, cache=cache, on_step=stop)
    assert [p.name for p in state.paths(tmp_path / "parted.training")][-1] == "state-000005.safetensors"
    result = training.train(pictures, model, parted, **LONG, cache=cache, resume=True)
    assert result["steps"] == 7
    assert whole.read_bytes() == parted.read_bytes()
    averages = [p.with_suffix(".ema.safetensors").read_bytes() for p in (whole, parted)]
    assert averages[0] == averages[1] != whole.read_bytes()
    assert without_times(whole) == without_times(parted)
    assert lines(whole, "validation.jsonl") == lines(parted, "validation.jsonl")


def test_a_killed_process_goes_on(pictures, model, tmp_path, cache):
    """SIGKILL, at whatever place it hits."""
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    args = [sys.executable, "-m", "lance_core", "train", str(pictures), "-m", str(model), "--steps", "60"]
    args += ["--rank", "2", "--dtype", "float32", "--resolution", "image_256res", "--save-every", "10", "-q"]
    args += ["--lr", "1e-3", "--cache", str(cache), "-o", str(killed)]
    env = os.environ | {"PYTHONPATH": str(Path(lance_core.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(args, env=env)
    folder, began = tmp_path / "killed.training", time.monotonic()
    while not list(folder.glob("state-*.safetensors")) and time.monotonic() - began < 100:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.paths(folder) and not (folder / "state-000060.safetensors").exists()
    options = QUICK | {"cache": cache, "steps": 60, "save_every": 10}
    training.train(pictures, model, killed, **options, resume=True)
    training.train(pictures, model, whole, **options)
    assert killed.read_bytes() == whole.read_bytes()
    assert without_times(killed) == without_times(whole)


def test_more_steps_may_be_asked_for(pictures, model, tmp_path, cache):
    output, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    options = QUICK | {"cache": cache, "save_every": 2}
    training.train(pictures, model, output, steps=2, **options)
    training.train(pictures, model, output, steps=4, resume=True, **options)
    training.train(pictures, model, other, steps=4, **options)
    assert load_file(output).keys() == load_file(other).keys()
    assert all(torch.equal(load_file(other)[k], v) for k, v in load_file(output).items())


def test_resume_refuses_another_run(pictures, model, tmp_path, cache, golden):
    output = tmp_path / "a.safetensors"
    options = QUICK | {"cache": cache, "steps": 2}
    training.train(pictures, model, output, **options)
    with pytest.raises(RequestError, match="other options: rank was 2 and is 4"):
        training.train(pictures, model, output, **options | {"rank": 4, "alpha": 2}, resume=True)
    with pytest.raises(RequestError, match="another checkpoint"):
        training.train(pictures, golden / "checkpoint" / "Lance_3B", output, **options, resume=True)
    other = pattern(tmp_path, 4, seed=1)
    with pytest.raises(RequestError, match="another data set"):
        training.train(other, model, output, **options, resume=True)
    for path in state.paths(tmp_path / "a.training"):
        path.write_bytes(b"cut off")
    with pytest.raises(RequestError, match="is damaged, and so are older states"):
        training.train(pictures, model, output, **options, resume=True)


def test_a_state_of_other_layers_is_refused(pictures, model, tmp_path, cache):
    training.train(pictures, model, tmp_path / "a.safetensors", **QUICK, cache=cache, steps=1)
    path = state.paths(tmp_path / "a.training")[-1]
    opened = Checkpoint(model)
    other = learner.Learner(opened, run.settings_of({"rank": 3}), torch.float32, torch.device("cpu"))
    with pytest.raises(RequestError, match="a state of another model, rank or choice of layers"):
        state.restore(path, other.weights, other.optimizer, None)


def test_a_damaged_state_falls_back_to_the_one_before(pictures, model, tmp_path, cache):
    output = tmp_path / "a.safetensors"
    options = QUICK | {"cache": cache, "steps": 4, "save_every": 2}
    training.train(pictures, model, output, **options)
    whole = output.read_bytes()
    kept = state.paths(tmp_path / "a.training")
    assert [p.name for p in kept] == ["state-000002.safetensors", "state-000004.safetensors"]
    kept[-1].write_bytes(kept[-1].read_bytes()[:200])
    training.train(pictures, model, output, **options, resume=True)
    assert output.read_bytes() == whole and [line["step"] for line in lines(output)] == [1, 2, 3, 4]


def test_a_new_run_puts_the_old_one_aside(pictures, model, tmp_path):
    output = tmp_path / "a.safetensors"
    for _ in range(2):
        training.train(pictures, model, output, **QUICK, steps=1)
    assert (tmp_path / "a.training-1" / "state-000001.safetensors").exists()
    assert len(list((tmp_path / "a.training" / "cache").iterdir())) == 5, "the cache moves on"


# -- the result ----------------------------------------------------------------------------------------------


def test_the_file_is_what_was_trained(pictures, model, tmp_path, cache):
    """Its adapters, and the weights they add up to, give the last validation loss."""
    output = tmp_path / "a.safetensors"
    result = training.train(
        pictures, model, output, **QUICK | {"lr": 0.01}, steps=5, experts="both", alpha=4, cache=cache
    )
    tensors, opened = load_file(output), Checkpoint(model)
    settings = run.settings_of({"rank": 2, "alpha": 4, "experts": "both", "resolution": "image_256res"})
    trained = learner.Learner(opened, settings, torch.float32, torch.device("cpu"))
    fresh = measured(trained, pictures, opened, cache)
    lora.fill(trained.adapters, tensors, "a")
    assert (
        measured(trained, pictures, opened, cache) == pytest.approx(result["validation"], rel=1e-6) != fresh
    )
    merged = learner.load_experts(opened, False, torch.float32, torch.device("cpu"))
    for name in trained.adapters:
        key = f"diffusion_model.{name}"
        side = merged.und if name.startswith("understanding.") else merged.gen
        layer = side.get_submodule(name.removeprefix("understanding."))
        added = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        layer.weight.data += tensors[f"{key}.alpha"] / 2 * added
    trained.experts = merged
    assert measured(trained, pictures, opened, cache) == pytest.approx(result["validation"], rel=1e-5)


def measured(trained, pictures, opened, cache) -> float:
    from lance_core.components import Components
    from lance_core.training.batches import Batches
    from lance_core.training.dataset import read

    components = Components(opened, torch.device("cpu"), torch.float32)
    encoder = encoding.Encoder(components, cache, "image_256res")
    batches = Batches(read(pictures).rows, encoder, opened.tokenizer, trained.settings)
    return trained.measure(batches.validation()).loss


def test_a_lora_of_other_layers_is_refused(pictures, model, tmp_path, cache):
    output = tmp_path / "a.safetensors"
    training.train(pictures, model, output, **QUICK, steps=1, cache=cache)
    opened = Checkpoint(model)
    for options, said in [({"rank": 3}, "has shape"), ({"rank": 2, "experts": "both"}, "are missing")]:
        other = learner.Learner(opened, run.settings_of(options), torch.float32, torch.device("cpu"))
        with pytest.raises(RequestError, match=f"a LoRA of other layers or sizes.*{said}"):
            lora.fill(other.adapters, load_file(output), str(output))


def test_a_quantised_base(pictures, model, tmp_path, cache):
    """int8 weights stay int8, and learn like the ones they came from."""
    small = tmp_path / "int8.safetensors"
    assert main(["convert", str(model), str(small), "--dtype", "int8", "-q"]) == 0
    result = training.train(pictures, small, tmp_path / "a.safetensors", **QUICK, steps=3)
    plain = training.train(pictures, model, tmp_path / "b.safetensors", **QUICK, steps=3, cache=cache)
    assert result["validation"] == pytest.approx(plain["validation"], rel=0.05)
    opened = Checkpoint(small)
    trained = learner.Learner(opened, run.settings_of({"rank": 2}), torch.float32, torch.device("cpu"))
    kept = trained.adapters["layers.1.self_attn.q_proj"].base
    assert kept.weight.dtype is torch.int8
    with pytest.raises(RequestError, match=r"is quantised \(int8\), and only LoRAs"):
        training.train(pictures, small, tmp_path / "c.safetensors", **QUICK, full=True, steps=1)


def test_full_training_saves_a_checkpoint(pictures, model, tmp_path, cache):
    output = tmp_path / "whole.safetensors"
    options = QUICK | {"lr": 1e-3, "cache": cache, "steps": 3, "full": True, "save_every": 2}
    result = training.train(pictures, model, output, **options, experts="both")
    opened = Checkpoint(output, vae=model.parent / "Wan2.2_VAE.pth")
    assert opened.config.llm == Checkpoint(model).config.llm and opened.config.variant == "video"
    again = learner.Learner(opened, run.settings_of({"rank": 2}), torch.float32, torch.device("cpu"))
    assert measured(again, pictures, opened, tmp_path / "c") == pytest.approx(result["validation"], rel=1e-5)
    before, after = load_file(model / "model.safetensors"), load_file(output)
    assert not torch.equal(
        before["language_model.model.layers.0.mlp_moe_gen.up_proj.weight"],
        after["language_model.model.layers.0.mlp_moe_gen.up_proj.weight"],
    )
    for frozen in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert torch.equal(before[frozen], after[frozen])
    assert lance_core.load(output, dtype=torch.float32, vae=model.parent / "Wan2.2_VAE.pth")


@pytest.mark.parametrize("full", [False, True])
def test_bfloat16(full, pictures, model, tmp_path, cache):
    """Rounds, but learns the same; what is trained stays float32."""
    options = QUICK | {"steps": 2, "full": full, "lr": 1e-4}
    half = training.train(pictures, model, tmp_path / "a.safetensors", **options | {"dtype": "bfloat16"})
    same = training.train(pictures, model, tmp_path / "b.safetensors", **options, cache=cache)
    assert half["validation"] == pytest.approx(same["validation"], rel=0.03)
    kept = {k: v for k, v in load_file(tmp_path / "a.safetensors").items() if "vit_model" not in k}
    assert all(v.dtype is torch.float32 for v in kept.values())


@pytest.mark.parametrize("full", [False, True])
def test_two_processes_train_what_one_does(full, pictures, model, tmp_path, cache):
    """Started by torchrun: each takes its share of every batch; LoRAs whole on both, full weights halved."""
    outputs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    options = QUICK | {"cache": cache, "steps": 2, "batch": 4, "save_every": 1, "full": full, "lr": 1e-4}
    training.train(pictures, model, outputs[0], **options)
    args = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args += ["-m", "lance_core", "train", str(pictures), "-m", str(model), "-o", str(outputs[1])]
    args += ["--steps", "2", "--batch", "4", "--save-every", "1", "--rank", "2", "--lr", "1e-4", "-q"]
    args += [
        "--dtype",
        "float32",
        "--resolution",
        "image_256res",
        "--cache",
        str(cache),
        "--max-tokens",
        "400",
    ]
    env = os.environ | {"PYTHONPATH": str(Path(lance_core.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*args, *["--full"] * full], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 steps on 5 rows") == 1
    first, second = (load_file(path) for path in outputs)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert (value - second[key]).abs().max() <= 2e-6, key  # a step moves a weight by up to 1e-5
    told = [lines(path) for path in outputs]
    for one, two in zip(*told, strict=True):
        assert one["rows"] == two["rows"] and one["tokens"] == two["tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)
    assert len(state.paths(tmp_path / "two.training")) == 2


# -- other tasks ---------------------------------------------------------------------------------------------


def mixed(folder: Path) -> Path:
    """A row of each kind, as JSON lines."""
    for name, colour in (("a", (200, 30, 30)), ("b", (30, 30, 200))):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    clip(folder / "c.mp4")
    rows = [
        {"image": "a.png", "caption": "red"},
        {"video": "c.mp4", "caption": "it moves"},
        {"video": "c.mp4", "caption": "it moves", "task": "i2v"},
        {"source": "a.png", "target": "b.png", "instruction": "make it blue"},
        {"source": "c.mp4", "target": "c.mp4", "instruction": "leave it"},
        {"references": ["a.png", "b.png"], "image": "a.png", "caption": "both"},
        {"image": "a.png", "question": "which colour?", "answer": "red"},
        {"video": "c.mp4", "question": "what?", "answer": "a bar"},
    ]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "set.jsonl"


@pytest.mark.parametrize("released", [False, True])
def test_every_kind_of_row_in_one_step(model, tmp_path, released):
    options = {"rank": 2, "dtype": "float32", "resolution": "video_192p", "batch": 8, "as_released": released}
    options |= {"caption_dropout": 0.5, "reference_dropout": 0.5, "experts": "both"}
    training.train(mixed(tmp_path), model, tmp_path / "a.safetensors", steps=2, **options)
    line = lines(tmp_path / "a.safetensors")[0]
    assert len(line["rows"]) == 8 and line["ce"] > 0 and line["mse"] > 0
    assert line["loss"] == pytest.approx(0.25 * line["ce"] + line["mse"])


@pytest.mark.parametrize(
    ("kind", "ending"), [(0, "png"), (1, "mp4"), (2, "mp4"), (3, "png"), (5, "png"), (6, "txt")]
)
def test_samples(kind, ending, model, tmp_path):
    file = mixed(tmp_path)
    file.write_text(file.read_text().splitlines()[kind])
    options = {"rank": 2, "dtype": "float32", "resolution": "video_192p", "sample_steps": 2}
    options |= {"sample_prompts": ("one", "two"), "save_every": 2, "steps": 2, "num_frames": 5}
    if ending == "txt":
        options["experts"] = "understanding"
    training.train(file, model, tmp_path / "a.safetensors", **options)
    names = sorted(p.name for p in (tmp_path / "a.training" / "samples").iterdir())
    assert names == [f"step-000002-{i}.{ending}" for i in range(2)]


def test_an_image_checkpoint_cannot_learn_clips(golden, tmp_path):
    with pytest.raises(RequestError, match=r"line 2: t2v needs the video checkpoint"):
        training.train(mixed(tmp_path), golden / "checkpoint" / "Lance_3B", tmp_path / "a.safetensors")


# -- what goes wrong -----------------------------------------------------------------------------------------


def test_bad_media_are_left_out_and_listed(pictures, model, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(pictures, folder)
    (folder / "q.png").write_bytes(b"no picture")
    clip(folder / "short.mp4", 3)
    for name in ("q.txt", "short.txt"):
        (folder / name).write_text("x")
    (folder / "p04.txt").unlink()
    result = training.train(folder, model, tmp_path / "a.safetensors", **QUICK, steps=1)
    assert result["rows"] == 4 and result["skipped"].keys() == {"q.png", "short.mp4", "p04.png"}
    assert "fewer than 5 frames" in result["skipped"]["short.mp4"]
    with pytest.raises(RequestError, match="1 bad rows.*no caption: p04.txt is missing"):
        training.train(folder, model, tmp_path / "b.safetensors", **QUICK, steps=1, strict=True)


def test_one_picture_and_a_batch_larger_than_the_set(model, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    pattern(folder, 1)
    result = training.train(folder, model, tmp_path / "a.safetensors", **QUICK, steps=2, batch=3)
    assert result["rows"] == 1 and result["held_out"] == 0
    assert [line["rows"] for line in lines(tmp_path / "a.safetensors")] == [["p00.png"] * 3] * 2


def test_epochs_and_held_out_rows(model, tmp_path, cache):
    folder = tmp_path / "set"
    folder.mkdir()
    pattern(folder, 12)
    result = training.train(
        folder, model, tmp_path / "a.safetensors", **QUICK, epochs=1, batch=5, cache=cache
    )
    seen = [name for line in lines(tmp_path / "a.safetensors") for name in line["rows"]]
    assert result["held_out"] == 1 and result["steps"] == 3 and len(set(seen)) == 11
    assert sorted(seen[:11]) == sorted(set(seen)), "an epoch has each row once"


def test_not_a_number_stops_with_the_rows_named(pictures, model, tmp_path, cache, monkeypatch):
    output = tmp_path / "a.safetensors"
    options = QUICK | {"steps": 6, "save_every": 2, "cache": cache}
    material = encoding.Encoder.material
    training.train(pictures, model, output, **options | {"steps": 3})
    kept = output.read_bytes()

    def broken(self, row: Row):
        found = material(self, row)
        return encoding.Material(found.latent * float("nan")) if row.name == "p03.png" else found

    monkeypatch.setattr(encoding.Encoder, "material", broken)
    with pytest.raises(NumericsError, match=r"the loss became NaN or infinity in step \d+, on p03.png"):
        training.train(pictures, model, output, **options, resume=True)
    newest = state.newest(tmp_path / "a.training")[0]
    assert all(bool(torch.isfinite(v).all()) for v in load_file(newest).values())
    assert output.read_bytes() == kept or len(lines(output)) > 3


def test_a_full_disk_keeps_the_older_state(pictures, model, tmp_path, cache, monkeypatch):
    output = tmp_path / "a.safetensors"
    options = QUICK | {"save_every": 2, "cache": cache}
    training.train(pictures, model, output, **options, steps=2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="are to be written and 0.0 GB are free"):
        training.train(pictures, model, output, **options, steps=4, resume=True)
    assert [p.name for p in state.paths(tmp_path / "a.training")] == ["state-000002.safetensors"]


def test_out_of_memory_says_what_helps(pictures, model, tmp_path, cache, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(learner, "loss", full)
    with pytest.raises(RequestError, match=r"memory ran out while training; .*--resolution.*--max-tokens"):
        training.train(pictures, model, tmp_path / "a.safetensors", **QUICK, steps=2, cache=cache)


def test_the_cache_is_checked(pictures, model, tmp_path, monkeypatch):
    options = QUICK | {"steps": 1, "cache": tmp_path / "cache"}
    training.train(pictures, model, tmp_path / "a.safetensors", **options)
    files = sorted((tmp_path / "cache").iterdir())
    data = files[0].read_bytes()
    files[0].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    files[1].write_bytes(b"cut")
    encoded = []
    encode = encoding.Components.encode_vae
    monkeypatch.setattr(encoding.Components, "encode_vae", lambda *args: encoded.append(1) or encode(*args))
    training.train(pictures, model, tmp_path / "b.safetensors", **options)
    assert len(encoded) == 2 and files[0].read_bytes() == data
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_clip_without_motion(model, tmp_path):
    clip(tmp_path / "c.mp4", 4).with_suffix(".txt").write_text("x")
    with pytest.raises(RequestError, match="no row that can be trained on.*fewer than 5 frames"):
        training.train(tmp_path, model, tmp_path / "a.safetensors", resolution="video_192p", dtype="float32")


def test_adam_in_8_bits_needs_its_package(pictures, model, tmp_path, monkeypatch, cache):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RequestError, match="needs bitsandbytes"):
        training.train(
            pictures, model, tmp_path / "a.safetensors", **QUICK, optimizer="adamw8bit", cache=cache
        )
