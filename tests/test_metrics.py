"""Log lines to the letter, sums that wait, and the files they go to."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.criterion import BertPretraining, Classification, Criterion
from pipeline.report.lines import add_sums, io_line, speed_line, training_line
from pipeline.report.run_log import Losses, Rows, RunLog, Window, run_name
from pipeline.report.training_log import mixed_since
from pipeline.report.writers import JsonLines, TensorBoard
from pipeline.simulation.emulated_model import SumOfShares


def test_the_lines_are_the_references_to_the_letter() -> None:
    assert training_line(100, 390) == "Training 100 epoch, each epoch runs 390 iteration"
    resnet, bert = Classification().wording, BertPretraining().wording
    said = resnet.train.format(epoch=3, loss=1.23456, acc=0.5, lr=0.01, seconds=12.34567)
    assert said == "3 TRAIN loss 1.2346 acc 0.5000 lr 1.00e-02, time 12.3457"
    assert resnet.validation.format(epoch=3, loss=1.5, acc=0.98765) == "3 EVAL  loss 1.5000 acc 0.9877"
    said = bert.train.format(epoch=0, loss=10.5, lm=9.8, ns=0.7, lr=1e-5, seconds=2.0)
    assert said == "0 TRAIN loss 10.5000  lm 9.8000e+00 ns 7.0000e-01 lr 1.0000e-05, time 2.0000"


def test_the_speed_line_is_mxnets() -> None:
    line = speed_line(0, 20, samples_per_s=1234.567, shown=Classification().wording.window.format(acc=0.25))
    assert line == "Epoch[0] Batch [20]\tSpeed: 1234.57 samples/sec\taccuracy=0.250000"
    assert io_line(40, samples_per_s=99.0) == "Batch [40]\tSpeed: 99.00 samples/sec"


def test_means_weigh_uneven_batches_by_their_samples() -> None:
    window = Window()
    window.add(loss=torch.tensor(10.0), correct=torch.tensor(6), samples=10)
    window.add(loss=torch.tensor(0.0), correct=torch.tensor(2), samples=2)
    means = Classification().means(window.take().sums())
    assert means == {"loss": pytest.approx(10 / 12), "acc": pytest.approx(8 / 12)}


def test_uneven_shards_are_added_before_they_are_divided() -> None:
    shards = [{"loss": 30.0, "correct": 1.0, "samples": 3.0}, {"loss": 1.0, "correct": 1.0, "samples": 1.0}]
    assert Classification().means(add_sums(*shards)) == {"loss": 31 / 4, "acc": 2 / 4}


def test_berts_loss_is_the_mean_over_masked_words_plus_the_mean_over_pairs() -> None:
    sums = {"lm": 90.0, "masked": 10.0, "ns": 3.0, "samples": 4.0, "correct": 5.0, "ns_correct": 1.0}
    assert BertPretraining().means(sums) == {"loss": 9.75, "lm": 9.0, "ns": 0.75, "acc": 0.5, "ns_acc": 0.25}


def test_where_nothing_was_masked_words_cost_nothing() -> None:
    sums = {"lm": 0.0, "masked": 0.0, "ns": 3.0, "samples": 4.0, "correct": 0.0, "ns_correct": 1.0}
    assert BertPretraining().means(sums)["loss"] == 0.75


@pytest.mark.parametrize("criterion", [Classification(top_k=(1, 5)), BertPretraining(), SumOfShares()])
def test_every_line_of_a_criterion_follows_from_its_means_also_of_nothing(criterion: Criterion) -> None:
    means = criterion.means({})
    assert "loss" in means and all(math.isnan(value) for value in means.values())
    for template in criterion.wording:
        assert "nan" in template.format(epoch=0, lr=0.1, seconds=1.0, **means)


def test_an_emulated_run_says_no_accuracy() -> None:
    said: list[str] = []
    log = RunLog(SumOfShares(), say=said.append)
    log.window(epoch=0, batch=4, update=4, sums={"loss": 3.0, "samples": 2.0}, samples=2, seconds=1.0, lr=0.1)
    log.epoch(epoch=0, update=4, sums={"loss": 3.0, "samples": 2.0}, lr=0.1, seconds=1.0)
    assert said[0].endswith("\tloss=1.500000")
    assert said[1] == "0 TRAIN loss 1.5000 lr 1.00e-01, time 1.0000"


def test_an_epoch_without_batches_has_a_line_and_no_error() -> None:
    said: list[str] = []
    kept = Kept()
    log = RunLog(Classification(), say=said.append, writers=(kept,))
    log.epoch(epoch=2, update=30, sums={}, lr=0.1, seconds=0.5)
    log.window(epoch=2, batch=1, update=30, sums={}, samples=0, seconds=0.5, lr=0.1)
    assert said[0] == "2 TRAIN loss nan acc nan lr 1.00e-01, time 0.5000"
    assert kept.events[0][1]["samples"] == 0.0 and "Speed: 0.00 samples/sec" in said[1]


def test_a_window_reads_nothing_until_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    window, graph = Window(), torch.ones(1, requires_grad=True)
    reads = []
    monkeypatch.setattr(torch, "stack", lambda tensors, real=torch.stack: reads.append(len(tensors)) or real(tensors))
    for _ in range(100):
        window.add(loss=(graph * 2).sum(), samples=1)
    assert reads == []
    rows = window.take()
    assert reads == [100] and rows.sums() == {"loss": 200.0, "samples": 100.0}
    assert window.take().sums() == {}


def test_a_window_nobody_takes_stays_small() -> None:
    window = Window(limit=8)
    for number in range(20):
        window.add(loss=torch.tensor(float(number)), samples=1)
    assert len(window._waiting["loss"]) == 4
    assert window.take().columns["loss"] == [float(number) for number in range(20)]


def test_a_window_takes_numbers_and_one_element_tensors_alike() -> None:
    window = Window()
    window.add(loss=1.5)
    window.add(loss=torch.tensor([2.5], dtype=torch.bfloat16))
    assert window.take().columns == {"loss": [1.5, 2.5]}


def test_the_loss_of_an_update_is_that_of_all_who_have_said_theirs_and_old_updates_are_settled() -> None:
    losses = Losses(Classification().means, open_updates=2)
    for update in range(1, 6):
        losses.add(update, {"loss": 2.0 * update, "samples": 2.0, "correct": 0.0})
    losses.add(5, {"loss": 2.0, "samples": 2.0, "correct": 0.0})
    assert losses.points() == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 3.0)] and losses.last == 3.0
    assert len(losses._open) == 2


class Kept:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = []
        self.closed = False

    def write(self, event: str, values) -> None:
        self.events.append((event, dict(values)))

    def close(self) -> None:
        self.closed = True


def rows_of(*losses: float) -> Rows:
    count = [2.0] * len(losses)
    return Rows({"loss": [2 * loss for loss in losses], "correct": [1.0] * len(losses), "samples": count})


def test_a_run_says_each_event_once_and_keeps_the_curve() -> None:
    said: list[str] = []
    kept = Kept()
    log = RunLog(Classification(), say=said.append, writers=(kept,))
    log.go_on(10)
    log.start(1, 4)
    log.window(
        epoch=0, batch=4, update=14, sums=rows_of(4, 3, 2, 1).sums(), samples=8, seconds=2.0, lr=0.1, bubble=0.25
    )
    for update, loss in ((12, 3.0), (11, 4.0)):
        log.losses.add(update, rows_of(loss).sums())
    log.epoch(epoch=0, update=14, sums=rows_of(4, 3, 2, 1).sums(), lr=0.1, seconds=2.5)
    log.validation(epoch=0, update=14, sums=rows_of(0.5).sums())
    log.close()
    assert said == [
        "Training 1 epoch, each epoch runs 4 iteration",
        "Epoch[0] Batch [4]\tSpeed: 4.00 samples/sec\taccuracy=0.500000",
        "0 TRAIN loss 2.5000 acc 0.5000 lr 1.00e-01, time 2.5000",
        "0 EVAL  loss 0.5000 acc 0.5000",
    ]
    assert log.curve == [(11, 4), (12, 3)] and log.validations == [(14, 0.5)]
    assert [event for event, _ in kept.events] == ["start", "window", "train", "validation"] and kept.closed
    window = kept.events[1][1]
    assert (window["samples_per_s"], window["step_s"], window["bubble"]) == (4.0, 0.5, 0.25)


def test_a_bert_run_has_its_own_lines() -> None:
    said: list[str] = []
    log = RunLog(BertPretraining(), say=said.append)
    sums = {"lm": 40.0, "masked": 10.0, "ns": 2.0, "samples": 4.0, "correct": 1.0, "ns_correct": 1.0}
    log.window(epoch=0, batch=1, update=1, sums=sums, samples=4, seconds=1.0, lr=1e-4)
    log.epoch(epoch=0, update=1, sums=sums, lr=1e-4, seconds=1.0)
    assert said[0].endswith("\tloss=4.500000")
    assert said[1] == "0 TRAIN loss 4.5000  lm 4.0000e+00 ns 5.0000e-01 lr 1.0000e-04, time 1.0000"


def test_json_lines_are_readable_while_the_run_goes_on_and_hold_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    writer = JsonLines(path)
    writer.write("window", {"loss": math.nan, "acc": 0.5, "update": 3})
    assert json.loads(path.read_text()) == {"event": "window", "loss": None, "acc": 0.5, "update": 3}
    writer.close()
    JsonLines(path, append=True).write("train", {"loss": torch.tensor(1.0)})
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["window", "train"]
    JsonLines(path)
    assert path.read_text() == ""


def test_a_metrics_file_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--metrics .*file/m.jsonl: cannot be written"):
        JsonLines(tmp_path / "file" / "m.jsonl")


def test_tensorboard_has_the_references_tags(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = tmp_path / run_name("mine", now=datetime(2024, 1, 2))
    board = TensorBoard(directory, means=Classification().means({}))
    log = RunLog(Classification(), say=lambda line: None, writers=(board,))
    said = {"sums": rows_of(4, 2).sums(), "samples": 4.0}
    log.window(epoch=7, batch=2, update=30, seconds=1.0, lr=0.1, bubble=0.1, memory_bytes=5, **said)
    log.epoch(epoch=7, update=30, sums=rows_of(4, 2).sums(), lr=0.1, seconds=1.0)
    log.validation(epoch=7, update=30, sums=rows_of(1).sums())
    log.close()
    events = EventAccumulator(str(directory))
    events.Reload()
    scalars = {tag: (point.step, point.value) for tag in events.Tags()["scalars"] for point in events.Scalars(tag)}
    assert scalars["Train/loss"] == (7, 3.0) and scalars["Validation/loss"] == (7, 1.0)
    assert scalars["Train/acc"] == scalars["Validation/acc"] == (7, 0.5)
    assert scalars["Performance/samples_per_s"] == (30, 4.0) and scalars["Performance/bubble"][0] == 30
    assert {"Performance/step_s", "Performance/memory_bytes", "Performance/lr", "Performance/acc"} < set(scalars)


def test_tensorboard_has_everything_that_is_said_of_a_bert_and_the_settings(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    criterion = BertPretraining()
    log = RunLog(criterion, say=lambda line: None, writers=(TensorBoard(tmp_path, means=criterion.means({})),))
    sums = {"lm": 40.0, "masked": 10.0, "ns": 2.0, "samples": 4.0, "correct": 1.0, "ns_correct": 1.0}
    log.settings({"adam_eps": 1e-7, "model": "bert-base"}, batches=0)
    log.epoch(epoch=1, update=30, sums=sums, lr=0.1, seconds=1.0)
    log.validation(epoch=1, update=30, sums=sums)
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for room in ("Train", "Validation"):
        for name, value in criterion.means(sums).items():
            (point,) = events.Scalars(f"{room}/{name}")
            assert (point.step, point.value) == (1, pytest.approx(value))
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| adam_eps | 1e-07 |" in text and "| model | bert-base |" in text


def test_the_histogram_of_groups_has_a_bar_a_size_however_often_there_were_groups(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.write("train", {"epoch": 3, "groups_of_2": 10**12, "groups_of_4": 3 * 10**12, "groups_of_8": 0})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    histogram = events.Histograms("Replicas/group_size")[0].histogram_value
    assert (histogram.min, histogram.max, histogram.num) == (2, 4, 4e12)
    assert sum(histogram.bucket) == 4e12 and histogram.sum == 14e12


def test_what_mixing_did_in_an_epoch_is_not_what_it_did_in_all() -> None:
    first = {"groups_of_2": 6, "groups_of_3": 2, "waited_s": 1.0, "mixed_bytes": 10.0, "distance": 0.5, "partner": 2.25}
    then = {"groups_of_2": 6, "groups_of_3": 4, "waited_s": 1.5, "mixed_bytes": 15.0, "distance": 0.1, "partner": 2.4}
    assert mixed_since({}, first) == first
    assert mixed_since(first, then) == {
        "groups_of_2": 0, "groups_of_3": 2, "waited_s": 0.5, "mixed_bytes": 5.0, "distance": 0.1, "partner": 3.0,
    }  # fmt: skip
    assert mixed_since(then, then)["partner"] == 0.0


def test_a_run_without_a_name_is_called_by_the_time() -> None:
    assert run_name("", now=datetime(2024, 1, 2, 3, 4, 5)) == "2024-01-02_03-04-05"
    assert run_name("mine", now=datetime(2024, 1, 2, 3, 4, 5)) == "mine"


def test_tensorboard_is_imported_only_when_it_is_used() -> None:
    code = "import sys, pipeline.report.run_log; print('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
