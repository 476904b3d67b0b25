"""How fast a data set can be read, without any training: `--test-io 1`."""

from __future__ import annotations

import time
from collections.abc import Callable

from datasets.base import Split
from pipeline.data.loader import Batch, Key, MicrobatchFeed, Samples
from pipeline.data.plan import Plan


def test_io(
    split: Split,
    *,
    batch_size: int,
    workers: int = 0,
    disp_batches: int = 20,
    seconds: float = 10.0,
    say: Callable[[str], None] = print,
    now: Callable[[], float] = time.perf_counter,
) -> float:
    """Reads for that many seconds, says `Batch [i]\\tSpeed: x samples/sec` now and then, returns samples/s.

    Inputs and targets are both read, as by one process that holds the first and the last stage. The clock starts
    when the first batch is there, which is not counted.
    """
    plan = Plan(size=split.size, batch_size=min(batch_size, split.size))
    feed = iter(MicrobatchFeed(_Both(split.inputs, split.targets), plan, workers=workers))
    next(feed)
    begin = last = time_s = now()
    total = since = 0
    for batch, tensors in feed:
        total, since, time_s = total + len(tensors[0]), since + len(tensors[0]), now()
        if batch % disp_batches == 0:
            say(f"Batch [{batch}]\tSpeed: {since / max(time_s - last, 1e-9):.2f} samples/sec")
            last, since = time_s, 0
        if time_s - begin >= seconds:
            break
    speed = total / max(time_s - begin, 1e-9)
    say(f"Read {total} samples in {time_s - begin:.1f} s with {workers} workers: {speed:.2f} samples/sec")
    return speed


test_io.__test__ = False  # type: ignore[attr-defined]  # its name is the option's; pytest would run it


class _Both:
    """Inputs and targets of a sample together."""

    def __init__(self, inputs: Samples, targets: Samples) -> None:
        self._inputs, self._targets = inputs, targets

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, key: Key) -> Batch:
        return (*self._inputs[key], *self._targets[key])
