"""The understanding expert beside the generation expert: whatever order two streams take, the result is the
same.

On one device two streams may run in any order between the points where one waits for the other. A stand-in
runs the second line's work
as early as it may and as late as it may, and notes whose memory each line touches: where neither writes what
the other touches, every order between these two gives the same.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import lance_core
from lance_core import RequestError
from lance_core.cli.main import main as command_line
from lance_core.model import dual_expert
from lance_core.model.sequence import Branch, Kind, Role, Sequence, TargetSegment, TextSegment, VisualSegment
from lance_core.model.side_stream import SideStream


class Touched(TorchDispatchMode):
    """Which memory operations read and write. Tensors are kept, so that no two of them can have the same
    memory one after the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.lines: dict[str, dict[str, set[int]]] = {}
        self.line: str | None = None

    def begin(self) -> None:
        self.kept, self.lines, self.line = (
            [],
            {line: {"read": set(), "written": set()} for line in ("main", "side")},
            "main",
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.line is not None:
            written = []
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.append(value)
            written += [value for name, value in (kwargs or {}).items() if name == "out"]
            view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            if not view:  # a view touches nothing
                self._note("read", (args, kwargs))
                self._note("written", written)
        return out

    def _note(self, how: str, values) -> None:
        tensors = [t for t in tree_flatten(values)[0] if isinstance(t, Tensor)]
        self.kept += tensors
        self.lines[self.line][how] |= {t.untyped_storage().data_ptr() for t in tensors}

    def check(self) -> None:
        main, side = self.lines["main"], self.lines["side"]
        assert side["read"] and side["written"], "nothing ran beside"
        for one, other in ((main, side), (side, main)):
            assert not one["written"] & (other["read"] | other["written"]), (
                "one line writes what the other touches"
            )
        self.line = None


class StandIn:
    """`Side` without a device: work runs when it is started, or not before its result is wanted."""

    def __init__(self, late: bool, touched: Touched) -> None:
        self.late, self.touched, self.count, self.pending = late, touched, 0, None

    def start(self, work) -> None:
        assert self.pending is None
        self.touched.begin()
        self.pending = work if self.late else self._run(work)
        self.count += 1

    def result(self):
        found, self.pending = (self._run(self.pending) if self.late else self.pending), None
        self.touched.check()
        return found

    def _run(self, work):
        self.touched.line = "side"
        found = work()
        self.touched.line = "main"
        return found


def sequence_of(grid: tuple[int, int, int]) -> Sequence:
    noise = torch.randn(*grid, 48, generator=torch.Generator().manual_seed(1))
    texts = [
        TextSegment(role, tuple(range(a, a + 9)))
        for role, a in ((Role.TEMPLATE, 5), (Role.CAPTION, 30), (Role.TEMPLATE, 50))
    ]
    clean = VisualSegment(Kind.CLEAN, Role.SOURCE, grid, noise)
    return Sequence((texts[0], clean, *texts[1:]), TargetSegment(grid), 0, 1, 2)


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@torch.inference_mode()
def test_any_order_gives_what_one_after_the_other_gives(golden, late, rows):
    lance = lance_core.load(golden / "checkpoint" / "Lance_3B", dtype=torch.float32)
    sequence = sequence_of((2, 3, 4))
    plan = dual_expert.Plan.of(sequence, 2.0, guided=True)
    x = torch.randn(rows, 2, 3, 4, 48, generator=torch.Generator().manual_seed(2))
    t = torch.full((rows, 2), 0.7)

    def velocity(model):
        prepared = model.prefill(plan)
        return model.velocity([dual_expert.Row(prepared, list(Branch)[i % 2]) for i in range(rows)], x, t)

    plain = velocity(lance.components.experts())
    with Touched() as touched:
        lance.components.side = StandIn(late, touched)
        beside = velocity(lance.components.experts())
    layers = lance.config.llm.num_layers
    assert lance.components.side.count == 2 * (layers + 1)  # the clean latent of the context, and the step
    assert torch.equal(beside, plain) and float(plain.std()) > 0.1


@torch.inference_mode()
def test_text_and_questions_have_nothing_to_run_beside(golden):
    lance = lance_core.load(golden / "checkpoint" / "Lance_3B", dtype=torch.float32)
    text = Sequence((TextSegment(Role.CAPTION, tuple(range(5, 25))),), None, 0, 1, 2)
    plain = lance.components.experts(generation=False).read(text, 2.0, 1)[1]
    lance.components.side = StandIn(False, Touched())
    assert (
        torch.equal(lance.components.experts(generation=False).read(text, 2.0, 1)[1], plain)
        and lance.components.side.count == 0
    )


def test_the_stand_in_sees_a_race():
    """What it is for: work that writes what the main line reads meanwhile, and the other way round."""
    for spoil in (lambda a, b: (a.add_(1), b.mul(2)), lambda a, b: (a.mul(2), b.add_(1))):
        shared = torch.zeros(4)
        with Touched() as touched:
            side = StandIn(False, touched)
            side.start(lambda: spoil(shared, shared)[0])  # noqa: B023
            spoil(shared, shared)
            with pytest.raises(AssertionError, match="touches"):
                side.result()


def test_a_device_without_streams_is_told_so(golden, capsys):
    folder = golden / "checkpoint" / "Lance_3B"
    with pytest.raises(RequestError, match="the device is cpu; leave it off"):
        lance_core.load(folder, overlap=True)
    for command in (["t2i", "a fox", "-m", str(folder)], ["bench"]):
        assert command_line([*command, "--device", "cpu", "--overlap"]) == 2
        assert "overlap runs on two streams of a CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: two real streams were not tested")
@torch.inference_mode()
def test_two_real_streams_give_what_one_gives(golden):
    folder, size = golden / "checkpoint" / "Lance_3B", {"width": 96, "height": 64, "steps": 4}
    assert isinstance(lance_core.load(folder, device="cuda", overlap=True).components.side, SideStream)
    for batch in (1, 3):
        one, two = (
            lance_core.load(folder, device="cuda", dtype=torch.float32, overlap=overlap).generate(
                "t2i", "a fox", batch_size=batch, **size
            )
            for overlap in (False, True)
        )
        torch.testing.assert_close(two.latent, one.latent, rtol=1e-5, atol=1e-5)
