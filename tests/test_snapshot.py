"""A joiner's copy of a stage that trains on meanwhile: every statistic in it is of whole forwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from pipeline.stage.stage import BlockModule, Stage, StageOptions

OVERTAKE_S = 0.3  # for a copy that would not wait
SOON_S = 20.0


class Counted(nn.Module):
    """Counts its forwards twice, before and after something happens."""

    before: Tensor
    after: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.between: Callable[[], object] = lambda: None
        for name in ("before", "after"):
            self.register_buffer(name, torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.before += 1
            self.between()
            self.after += 1
        return x * self.weight


def stage_of(module: nn.Module, **options: bool) -> Stage:
    return Stage(
        [BlockModule(0, "block.", module)],
        lambda groups: torch.optim.SGD(groups, lr=0.1),
        device=torch.device("cpu"),
        window=2,
        options=StageOptions(**options),
    )


def copied_meanwhile(module: Counted, stage: Stage, act: Callable[[], object]) -> dict[str, Tensor]:
    """The copy of a thread that asks in the middle of what `act` makes the module do."""
    copy: list[Future[dict[str, Tensor]]] = []
    copied = threading.Event()

    def snapshot() -> dict[str, Tensor]:
        taken = stage.snapshot(stage.model_state())
        copied.set()
        return taken

    def between() -> None:
        if not copy:
            copy.append(pool.submit(snapshot))
            copied.wait(OVERTAKE_S)

    with ThreadPoolExecutor(1) as pool:
        module.between = between
        act()
        return copy[0].result(SOON_S)


def test_a_copy_waits_for_the_end_of_a_forward() -> None:
    module = Counted()
    stage = stage_of(module)
    stage.forward(0, (torch.ones(1),))
    copy = copied_meanwhile(module, stage, lambda: stage.forward(1, (torch.ones(1),)))
    assert copy["model.block.before"] == copy["model.block.after"] == 2
    assert copy.keys() == stage.model_state().keys()


def test_a_copy_does_not_see_the_statistics_of_a_recomputation() -> None:
    module = Counted()
    stage = stage_of(module, recompute=True)
    stage.forward(0, (torch.ones(1),))
    copy = copied_meanwhile(module, stage, lambda: stage.backward(0, (torch.ones(1),)))
    assert copy["model.block.before"] == copy["model.block.after"] == 1


def test_a_forward_waits_for_the_copy_of_the_statistics_only() -> None:
    module = Counted()
    stage = stage_of(module)
    live = stage.model_state()
    forwards: list[int] = []

    class Slow(dict[str, Tensor]):
        """A state whose weight takes as long as a whole forward to be read."""

        def items(self):  # type: ignore[no-untyped-def]
            for name, tensor in super().items():
                if name == "model.block.weight":
                    thread = threading.Thread(target=lambda: forwards.append(len(stage.forward(0, (torch.ones(1),)))))
                    thread.start()
                    thread.join(SOON_S)
                yield name, tensor

    copy = stage.snapshot(Slow(live))
    assert forwards == [1]
    assert copy["model.block.before"] == copy["model.block.after"] == 0
    assert module.before == 1


def test_what_was_copied_does_not_change_with_the_stage() -> None:
    stage = stage_of(nn.BatchNorm2d(2))
    copy = stage.snapshot(stage.model_state())
    assert copy["model.block.num_batches_tracked"] == 0 and copy["model.block.num_batches_tracked"].shape == ()
    stage.forward(0, (torch.randn(4, 2, 3, 3),))
    assert stage.model_state()["model.block.num_batches_tracked"] == 1
    assert copy["model.block.num_batches_tracked"] == 0 and not copy["model.block.running_mean"].any()
