"""The command line is a contract: the reference's defaults, one-line errors, no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.cli import GROUPS, flags_as_markdown, make_parser, parse_bert, parse_resnet
from pipeline.errors import UserError
from pipeline.settings import CHOICES, Settings, default_settings, option, parse_bandwidth


def complaint(capsys: pytest.CaptureFixture[str], *argv: str, parse=parse_resnet) -> str:
    """What a wrong command line prints: exactly one line on stderr, with exit status 2."""
    with pytest.raises(SystemExit) as ended:
        parse(list(argv))
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


def test_an_empty_resnet_line_is_the_references() -> None:
    settings = parse_resnet([])
    assert settings == Settings()
    reference = {
        "epochs": 100,
        "batch_size": 128,
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "name": "",
        "momentum": 0.9,
    }
    reference |= {"dataset": "cifar100", "model": "resnet18", "pipeline": "pipedream", "optimizer": "sgd"}
    assert {name: getattr(settings, name) for name in reference} == reference
    assert settings.warmup_updates(390) == 390


def test_an_empty_bert_line_is_the_references() -> None:
    settings = parse_bert([])
    assert settings == default_settings("bert")
    reference = {
        "epochs": 100,
        "batch_size": 64,
        "learning_rate": 1e-4,
        "pipeline": "pipedream",
        "weight_decay": 0.01,
    }
    reference |= {
        "dataset": "wiki",
        "model": "bert-base",
        "optimizer": "adamw",
        "sequence_length": 128,
        "untied": False,
    }
    assert {name: getattr(settings, name) for name in reference} == reference
    assert settings.warmup_updates(100) == 2000


def test_the_papers_command_is_understood() -> None:
    line = "--batch-size 64 --model resnet50 --dataset imagenet --learning-rate 0.01 --epochs 1"
    settings = parse_resnet(line.split())
    assert (settings.batch_size, settings.model, settings.learning_rate) == (64, "resnet50", 0.01)


def test_every_field_has_an_option_and_every_option_a_field() -> None:
    fields = set(Settings.__dataclass_fields__) - {"task"}
    assert {flag.field for flags in GROUPS.values() for flag in flags} == fields


def test_every_option_reaches_its_field() -> None:
    line = """
        --pipeline gpipe --microbatches 8 --accumulate 2 --amp bf16 --recompute --channels-last --compile
        --clip-grad-norm 1.5 --batchnorm deferred --optimizer adamw --lr-schedule step --lr-milestones 3,6
        --lr-factor .5 --warmup-steps 7 --no-decay-norm-bias --max-steps 9 --seed 4 --checkpoint c
        --checkpoint-every 5 --keep 2 --resume --export m.safetensors --metrics m.jsonl --runs r --out o
        --trace-steps 3 --disp-batches 2 --test-io 1 --validate-every 0 --workers 0 --backend gloo
        --timeout 2.5 --placement x --partition 1,2 --profile p.json --bandwidth 10Gbit --data d
        --image-size 32
    """
    settings = parse_resnet(line.split())
    assert settings.lr_milestones == (3, 6) and settings.bandwidth == 1.25e9
    assert settings.resume == "" and settings.resume_directory == "c"
    assert settings.warmup_updates(100) == 7 and settings.compile and settings.validate_every == 0


def test_adamws_numbers_are_options_whose_defaults_are_the_references() -> None:
    assert (parse_bert([]).adam_betas, parse_bert([]).adam_eps) == ((0.9, 0.999), 1e-7)
    settings = parse_bert(["--adam-betas", "0.9,0.98", "--adam-eps", "1e-6"])
    assert (settings.adam_betas, settings.adam_eps) == ((0.9, 0.98), 1e-6)
    assert "| `--adam-betas` | 0.9,0.999 |" in flags_as_markdown()


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --microbatches?" in complaint(capsys, "--microbatch", "4")
    assert "did you mean --learning-rate?" in complaint(capsys, "--learning_rate=0.1")


def test_an_option_that_does_not_exist_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown option --preducee; did you mean --preduce?" in complaint(capsys, "--preducee")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--local-sgd --preduce", "--local-sgd and --preduce were both given; give one"),
        ("--overlap-sync", "--overlap-sync needs --preduce"),
        ("--local-steps 8", "--local-steps needs --local-sgd"),
        ("--min-replicas 2", "--min-replicas needs --preduce or --adpsgd or --local-sgd"),
        ("--local-sgd --outer-momentum 0.5", "--outer-momentum needs --outer slowmo or --outer diloco"),
        ("--local-sgd --local-steps 4 --host-steps 3", "give a divisor"),
        ("--preduce --max-group 1", "--max-group 1: expected 2 or more"),
        ("--preduce --amp fp16", "--amp fp16 with --preduce"),
        ("--adpsgd --sync-momentum average", "add --adpsgd-matching sync"),
        ("--hetero lots", "--hetero lots"),
        ("--emulate fast", "--emulate fast"),
    ],
)
def test_contradictory_options_of_replicas_are_refused(
    capsys: pytest.CaptureFixture[str], line: str, expected: str
) -> None:
    assert expected in complaint(capsys, *line.split())


def test_adpsgd_with_preduce_means_adpsgd() -> None:
    assert parse_resnet(["--preduce", "--adpsgd"]).synchroniser == "adpsgd"
    assert parse_resnet(["--preduce"]).synchroniser == "preduce"
    assert parse_resnet([]).synchroniser == "allreduce"


def test_options_of_bert_are_no_options_of_resnet(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_bert(["--untied"]).untied
    assert "unknown option --untied" in complaint(capsys, "--untied")
    assert "unknown option --channels-last" in complaint(capsys, "--channels-last", parse=parse_bert)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--pipeline hetpipe", "--pipeline hetpipe: choose from gpipe, 1f1b, pipedream, dp"),
        ("--epochs many", "argument --epochs: 'many' is not a whole number"),
        ("--epochs 0", "--epochs 0: expected 1 or more"),
        ("--learning-rate nan", "--learning-rate nan: expected a number above 0"),
        ("--learning-rate inf", "--learning-rate inf: expected a number above 0"),
        ("--momentum 1", "--momentum 1: expected a number from 0 to below 1"),
        ("--test-io 2", "--test-io 2: give 0"),
        ("--microbatches 4", "choose gpipe or 1f1b"),
        ("--pipeline gpipe --batch-size 2 --microbatches 3", "give fewer micro-batches"),
        ("--batchnorm deferred", "choose gpipe or 1f1b"),
        ("--optimizer adamw --nesterov", "--nesterov needs --optimizer sgd"),
        ("--optimizer adamw --adam-betas 0.9", "argument --adam-betas: expected two numbers divided by a comma"),
        ("--optimizer adamw --adam-betas 0.9,1", "--adam-betas 0.9,1: expected two numbers from 0 to below 1"),
        ("--optimizer adamw --adam-eps 0", "--adam-eps 0: expected a number above 0"),
        ("--adam-betas 0.9,0.98", "--adam-betas needs --optimizer adamw"),
        ("--adam-eps 1e-6", "--adam-eps needs --optimizer adamw"),
        ("--warmup-steps 1 --warmup-epochs 1", "give one"),
        ("--lr-milestones 3,6", "only step uses it"),
        ("--lr-schedule step --lr-milestones 6,3", "--lr-milestones 6,3: expected increasing epochs"),
        (
            "--lr-schedule step --lr-milestones a",
            "argument --lr-milestones: expected epochs divided by commas",
        ),
        ("--checkpoint-every 3", "--checkpoint-every needs --checkpoint DIR"),
        ("--resume", "--resume without a folder"),
        ("--bandwidth fast", "argument --bandwidth: expected bytes per second"),
        ("--bandwidth 0", "--bandwidth 0: expected a number above 0"),
        ("--batch-size", "expected one argument"),
        ("stray", "unknown argument stray; --help lists the options"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_remedy(
    capsys: pytest.CaptureFixture[str], line: str, expected: str
) -> None:
    assert expected in complaint(capsys, *line.split())


def test_settings_are_checked_and_frozen_without_the_command_line() -> None:
    with pytest.raises(UserError, match="--amp int8: choose from off, bf16, fp16"):
        Settings(amp="int8")
    with pytest.raises(AttributeError):
        Settings().epochs = 3  # type: ignore[misc]


def test_microbatches_default_to_four_where_a_batch_is_split() -> None:
    assert [Settings(pipeline=name).num_microbatches for name in CHOICES["pipeline"]] == [4, 4, 1, 1]
    assert Settings(pipeline="1f1b", batch_size=3).num_microbatches == 3


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("1e9", 1e9),
        ("12.3GB", 12.3e9),
        ("10Gbit", 1.25e9),
        ("500 MB/s", 5e8),
        ("1TB", 1e12),
        ("8kbit/s", 1e3),
    ],
)
def test_a_bandwidth_may_have_a_unit(text: str, bytes_per_s: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(bytes_per_s)


def test_help_shows_every_option_and_default() -> None:
    text = make_parser("resnet").format_help()
    assert "--batch-size N" in text and "(default: 128)" in text and "{gpipe,1f1b,pipedream,dp}" in text
    markdown = flags_as_markdown()
    assert all(f"`{option(flag.field)}`" in markdown for flags in GROUPS.values() for flag in flags)
    assert "| `--batch-size` | 128 / 64 | samples per pipeline and batch |" in markdown


def test_parsing_imports_no_torch() -> None:
    code = "import sys; from pipeline.cli import *; parse_resnet([]); parse_bert([]); "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
