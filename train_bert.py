"""Pretrain a BERT on Wikipedia over a device list.

    heturun -c config/local.yml python3 train_bert.py --data SHARDS --placement local_2x2

Read from top to bottom: settings, who this process is, data, model, loss, training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
from datasets.wordpiece import read_tokens
from pipeline.cli import parse_bert
from pipeline.cluster.world import join_world, report_failures
from pipeline.errors import UserError
from pipeline.models import make_model
from pipeline.models.bert_config import read_shape
from pipeline.models.criterion import BertPretraining
from pipeline.train.emulated import make_emulated
from pipeline.train.plan import Task
from pipeline.train.run import deadline, say_on_rank_zero, train, use_threads


def check_vocabulary(path: str, size: int) -> None:
    """Refuses a vocabulary whose token ids the model cannot embed."""
    tokens = len(read_tokens(Path(path)))
    if tokens > size:
        raise UserError(
            f"--vocab {path} has {tokens} tokens, the model embeds {size}; "
            f'give --bert-config with "vocab_size": {tokens} or more'
        )


def main() -> None:
    settings = parse_bert(sys.argv[1:])
    with report_failures():
        world = join_world(settings.placement, timeout_s=deadline(settings), directory=Path(__file__).parent)
        use_threads(world)
        if settings.emulate:
            task = make_emulated(settings, stages=world.num_stages, pipelines=world.num_pipelines)
            train(settings, task, world)
            return

        shape = read_shape(settings.bert_config or settings.model)
        if settings.vocab:
            check_vocabulary(settings.vocab, shape.vocab_size)
        splits = datasets.load(
            settings.dataset,
            kind="tokens",
            data_dir=settings.data,
            sequence_length=settings.sequence_length,
            vocab_size=shape.vocab_size,
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

        model = make_model(
            settings.model, config=settings.bert_config, seq_length=settings.sequence_length, tied=not settings.untied
        )
        task = Task(model=model, criterion=BertPretraining(), train=splits.train, val=splits.val)
        train(settings, task, world)


if __name__ == "__main__":
    main()
