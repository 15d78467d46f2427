"""Progress, previews, and interrupts: in denoising, VAE work, vision encoding and text decoding."""

from __future__ import annotations

import pytest
import torch
from graphs import node
from inprocess import InterruptedRunError, NodeFailedError
from small import advanced, edit, i2v, lance, module, question, samples, t2i

GUIDANCE = {"cfg": 4.0, "cfg_start": 1.0, "cfg_end": 0.0, "renorm": "global", "renorm_min": 0.0}


def guided(graph):
    guider = node("LanceGuider", model=["loader", 0], positive=["text", 0], negative=["text", 1], **GUIDANCE)
    return advanced(graph, guider)


def decoded(graph):
    return {**graph, "decoded": node("LanceVAEDecode", vae=["loader", 2], samples=["sampler", 0])}


def test_progress_is_told(comfy, monkeypatch):
    from comfy import utils
    from protocol import BinaryEventTypes

    for limit in (
        "PROGRESS_THROTTLE_MIN_INTERVAL",
        "PROGRESS_THROTTLE_MIN_PERCENT",
    ):  # newer hosts keep quiet between quick steps
        monkeypatch.setattr(utils, limit, 0, raising=False)
    comfy.forget()
    asked = question(tokens=5)
    for graph, name, least in (
        (decoded(lance(i2v())), "sampler", 3),
        (decoded(lance(i2v())), "decoded", 3),  # latent frames
        (i2v(), "latent", 1),
        (lance(edit()), "vision", 3),  # blocks of the tower
        (asked, "answer", 1),
    ):
        comfy._executor.reset()
        told = [(value, most) for at, value, most in comfy.run(graph, [(name, 0)]).progress if at == name]
        assert len(told) >= least and told[-1][0] == told[-1][1], (name, told)
        assert all(value <= most for value, most in told)
    texts = [data for event, data in comfy.sent if event == BinaryEventTypes.TEXT]
    assert texts, "the answer is streamed while it is written"


def test_previews_come_with_the_steps(comfy, monkeypatch):
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod
    from protocol import BinaryEventTypes

    kinds = ("PREVIEW_IMAGE", "UNENCODED_PREVIEW_IMAGE", "PREVIEW_IMAGE_WITH_METADATA")
    pictured = [getattr(BinaryEventTypes, kind) for kind in kinds if hasattr(BinaryEventTypes, kind)]

    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        latent_preview, "default_preview_method", LatentPreviewMethod.Latent2RGB, raising=False
    )  # newer hosts: for each run
    comfy._executor.reset()
    for graph in (lance(t2i()), lance(i2v()), guided(t2i())):
        sent = comfy.run(graph, [("sampler", 0)]).sent
        pictures = [data for event, data in sent if event in pictured]
        assert len(pictures) == 3


class Stopper:
    """Interrupts from inside the given call of a function, and counts the calls from then on."""

    def __init__(self, monkeypatch, owner, name: str, at: int, problem: Exception | None = None) -> None:
        self.calls, self.after = 0, 0
        function = getattr(owner, name)

        def counting(*args, **kwargs):
            import comfy.model_management as mm

            self.calls += 1
            self.after += self.calls > at
            if self.calls == at:
                if problem:
                    raise problem
                mm.interrupt_current_processing(True)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)


# Which graph, its node, and the attention call (three layers each; 1 to 6 are the context's, of two blocks)
# to interrupt in.
ATTENTION = {
    "prefill": (lambda: lance(t2i(), seed=60), "sampler", 2),
    "prefill of the second branch": (
        lambda: lance(t2i(negative="rain, snow and hail"), seed=60),
        "sampler",
        5,
    ),
    "denoising": (lambda: lance(t2i(), seed=60), "sampler", 14),
    "custom sampling": (lambda: guided(t2i("custom")), "sampler", 14),
    "vision": (lambda: edit("for vision", "alpha.png"), "vision", 2),
    "reading": (lambda: question("What was read?"), "answer", 2),
    "writing": (lambda: question("What was written?"), "answer", 11),
}


@pytest.fixture(scope="module")
def wanted():
    """What the graphs give when nobody stops them."""
    return {}


@pytest.mark.parametrize("where", ATTENTION)
@pytest.mark.parametrize("how", ["interrupt", "error"])
def test_stops_within_a_layer_and_the_next_job_is_clean(comfy, monkeypatch, wanted, where, how):
    make, name, at = ATTENTION[where]
    before = lance(t2i())
    if where not in wanted:
        comfy._executor.reset()
        wanted[where] = comfy.value(make(), name)
        wanted[""] = wanted.get("", samples(comfy, before))
    comfy._executor.reset()
    if name == "answer":
        comfy.run({k: v for k, v in make().items() if k != "answer"}, [("vision", 0)])
    with monkeypatch.context() as patched:
        problem = ValueError("on purpose") if how == "error" else None
        stopper = Stopper(patched, module(comfy, "nodes.comfy_compat"), "optimized_attention", at, problem)
        with pytest.raises(InterruptedRunError if how == "interrupt" else NodeFailedError):
            comfy.run(make(), [(name, 0)])
        assert (stopper.calls, stopper.after) == (at, 0), "no other layer ran"
    # Not forgotten in between: what the stopped run left is what the next one meets.
    assert same(comfy.value(make(), name), wanted[where])
    assert torch.equal(samples(comfy, before), wanted[""])


def same(a, b) -> bool:
    if isinstance(a, dict):
        return torch.equal(a["samples"], b["samples"])
    if hasattr(a, "segments"):
        return all(torch.equal(x.data, y.data) for x, y in zip(a.segments, b.segments, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(("name", "at"), [("latent", 3), ("decoded", 4)])
def test_vae_stops_within_a_layer(comfy, monkeypatch, name, at):
    comfy.forget()
    graph = decoded(lance(i2v()))
    good = comfy.value(graph, name)
    comfy._executor.reset()
    with monkeypatch.context() as patched:
        # Whatever a layer is: every convolution goes through torch's.
        stopper = Stopper(patched, torch.nn.functional, "conv3d", at)
        with pytest.raises(InterruptedRunError):
            comfy.run(graph, [(name, 0)])
        assert (stopper.calls, stopper.after) == (at, 0)
    assert same(comfy.value(graph, name), good)


def test_loading_can_be_interrupted(comfy, monkeypatch):
    comfy.forget()
    good = samples(comfy, lance(t2i()))
    comfy.forget()
    with monkeypatch.context() as patched:
        stopper = Stopper(patched, module(comfy, "nodes.comfy_compat").comfy.utils.ProgressBar, "update", 5)
        with pytest.raises(InterruptedRunError):
            comfy.run(t2i(), [("loader", 0)])
        assert (stopper.calls, stopper.after) == (5, 0)
    assert torch.equal(samples(comfy, lance(t2i())), good)
