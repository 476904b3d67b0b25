"""Train a ResNet over a device list.

    heturun -c config/local.yml python3 train_resnet.py --dataset digits --placement local_2x2

Read from top to bottom: settings, who this process is, data, model, loss, training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
from pipeline.cli import parse_resnet
from pipeline.cluster.world import join_world, report_failures
from pipeline.models import make_model
from pipeline.models.criterion import Classification
from pipeline.train.emulated import make_emulated
from pipeline.train.plan import Task
from pipeline.train.run import deadline, say_on_rank_zero, train, use_threads

SMALL = 64  # pixels; a stem for images up to this side does not shrink them


def main() -> None:
    settings = parse_resnet(sys.argv[1:])
    with report_failures():
        world = join_world(settings.placement, timeout_s=deadline(settings), directory=Path(__file__).parent)
        use_threads(world)
        if settings.emulate:
            task = make_emulated(settings, stages=world.num_stages, pipelines=world.num_pipelines)
            train(settings, task, world)
            return

        splits = datasets.load(
            settings.dataset,
            data_dir=settings.data,
            image_size=settings.image_size,
            seed=settings.seed,
            validation=settings.validate_every > 0,
            warn=say_on_rank_zero(world),
        )
        if settings.test_io:
            if world.rank == 0:
                datasets.test_io(
                    splits.train,
                    batch_size=settings.batch_size,
                    workers=settings.workers or 0,
                    disp_batches=settings.disp_batches,
                )
            return

        side = splits.train.inputs[0][0].shape[-1]
        stem = "imagenet" if settings.dataset == "imagenet" or side > SMALL else "cifar"
        model = make_model(settings.model, num_classes=splits.train.num_classes, stem=stem, image_size=side)
        task = Task(model=model, criterion=Classification(), train=splits.train, val=splits.val)
        train(settings, task, world)


if __name__ == "__main__":
    main()
