"""tests/tiny.py with a fate: `python tests/doomed.py FATES FOLDER SETTINGS TASK`.

FATES is JSON, pipeline -> where it is killed for good, in its first incarnation and on its last stage:

    hello        before it has said hello to the coordinator
    final        when it knows with whom to average at the end of a segment, and they know it too
    validation   at the beginning of its first validation
    giving       when one who joins while it trains asks for its state
    saving       when its part of the last checkpoint of the run is written
    exporting    when it is to export the weights
    standing     stands still, for somebody to wake it, when its part of its first checkpoint is written
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import tiny

from pipeline.replicas.elastic import ElasticWorld
from pipeline.train import run as job
from pipeline.train.elastic import ElasticTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Doomed:
    """Wraps one method so that the trainer of a doomed pipeline dies in it."""

    def __init__(self, fates: dict[str, str]) -> None:
        self._fates = fates

    def hits(self, trainer: ElasticTrainer, where: str) -> bool:
        world = trainer.world
        return world.is_last_stage and not world.incarnation and self._fates.get(str(world.pipeline)) == where

    def install(self) -> None:
        trainer: Any = ElasticTrainer
        world: Any = ElasticWorld
        connect = world.connect

        def connecting(self_: ElasticWorld) -> None:
            if self_.is_last_stage and not self_.incarnation and self._fates.get(str(self_.pipeline)) == "hello":
                die()
            connect(self_)

        world.connect = connecting
        average, validate, provide = trainer._average, trainer._validate, trainer._provide
        may_write, export = trainer.may_write, job._export

        def averaging(self_: ElasticTrainer, segment: int) -> None:
            if self.hits(self_, "final"):
                self_.world.client.final(segment).result()
                die()
            average(self_, segment)

        def validating(self_: ElasticTrainer, **more: Any) -> None:
            if self.hits(self_, "validation"):
                die()
            validate(self_, **more)

        def providing(self_: ElasticTrainer) -> Any:
            if self.hits(self_, "giving") and self_.samples:
                die()
            return provide(self_)

        def writing(self_: ElasticTrainer) -> None:
            if self.hits(self_, "saving") and self_.batches == self_.calendar.total_batches:
                die()
            if self.hits(self_, "standing"):
                self._fates.clear()
                self_.world.diary.note("stands", pid=os.getpid())
                os.kill(os.getpid(), signal.SIGSTOP)
            may_write(self_)

        def exporting(trainer: Any, path: str) -> None:
            if self.hits(trainer, "exporting"):
                die()
            export(trainer, path)

        trainer._average, trainer._validate, trainer._provide = averaging, validating, providing
        trainer.may_write = writing
        job._export = exporting


if __name__ == "__main__":
    Doomed(json.loads(sys.argv.pop(1))).install()
    tiny.main()
