"""The command lines of train_resnet.py and train_bert.py: a table of options, and `Settings` made from them.

Names, types and help stand here; defaults and checks live in `pipeline.settings`. Nothing here imports torch.

    >>> parse_resnet(["--epochs", "3", "--pipeline", "1f1b"]).num_microbatches
    4
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from pipeline.errors import UserError
from pipeline.settings import (
    CHOICES,
    Settings,
    default_settings,
    option,
    parse_bandwidth,
    parse_betas,
    parse_milestones,
)

Convert = Callable[[str], Any]
BOTH = ("resnet", "bert")


class Flag(NamedTuple):
    """One option: the field of `Settings` it fills, its help, its type (None = a switch) and whose it is."""

    field: str
    help: str
    convert: Convert | None = str
    metavar: str | None = None
    tasks: tuple[str, ...] = BOTH


GROUPS: Mapping[str, tuple[Flag, ...]] = MappingProxyType(
    {
        "what is trained": (
            Flag("model", "resnet18, resnet34, resnet50, resnet101, resnet152", tasks=("resnet",)),
            Flag("model", "bert-base or bert-large", tasks=("bert",)),
            Flag("bert_config", "JSON text or file that replaces the model's configuration", tasks=("bert",)),
            Flag("sequence_length", "tokens per sequence", int, "N", ("bert",)),
            Flag("untied", "give the decoder weights of its own (the reference's form)", None, tasks=("bert",)),
            Flag(
                "vocab", "vocab.txt that the shards were made with: checked against the model", str, "FILE", ("bert",)
            ),
            Flag(
                "init",
                "weights to start from: safetensors, a torch state dict, or save_pretrained's folder",
                str,
                "FILE",
            ),
            Flag("init_partial", "heads of another size, or of another task, start afresh", None),
            Flag("dataset", "cifar10, cifar100, imagenet, imagefolder, digits or synthetic", tasks=("resnet",)),
            Flag("dataset", "wiki or synthetic", tasks=("bert",)),
            Flag("data", "folder of the data set", str, "DIR"),
            Flag("image_size", "side of the images in pixels (default: the data set's)", int, "N", ("resnet",)),
            Flag(
                "workers",
                "processes that read data, per reading rank (default: 2 for image folders, else 0)",
                int,
                "N",
            ),
            Flag("test_io", "1: only read, and print samples/s", int, "{0,1}"),
        ),
        "length": (
            Flag("epochs", "passes over the training data", int, "N"),
            Flag("batch_size", "samples per pipeline and batch", int, "N"),
            Flag("max_steps", "stop after so many updates", int, "N"),
            Flag("validate_every", "epochs between validations; 0: never", int, "N"),
            Flag("seed", "of weights, order, augmentation and dropout", int, "N"),
        ),
        "placement and cut": (
            Flag(
                "placement",
                "a layout of device_list.py, FILE.py:NAME, or SxP (default: my_device)",
                str,
                "NAME",
            ),
            Flag(
                "partition",
                "blocks per stage, as in 4,4,4,4 (default: the reference's, else balanced)",
                str,
                "A,B",
            ),
            Flag("profile", "measured cost of the blocks: read if it is there, else written", str, "FILE"),
            Flag("bandwidth", "between stages, for the balance: 12.3GB or 10Gbit", parse_bandwidth, "RATE"),
            Flag("backend", "what carries the tensors"),
            Flag("timeout", "seconds to wait for a peer (default: $HETURUN_TIMEOUT, else 300)", float, "S"),
        ),
        "schedule and arithmetic": (
            Flag("pipeline", "schedule"),
            Flag("microbatches", "parts of a batch for gpipe and 1f1b (default: 4)", int, "M"),
            Flag("accumulate", "batches per update", int, "K"),
            Flag("batchnorm", "running statistics: of each micro-batch, or of the whole batch"),
            Flag("amp", "mixed precision"),
            Flag("recompute", "keep a stage's inputs only, run its forward again at the backward", None),
            Flag("channels_last", "channels-last memory format", None, tasks=("resnet",)),
            Flag("compile", "torch.compile every stage", None),
            Flag("nan", "when three losses in a row are not finite: end the run, say so, or neither"),
        ),
        "optimiser": (
            Flag("optimizer", "update rule"),
            Flag("learning_rate", "after the warm-up", float, "X"),
            Flag("scale_lr", "multiply the rate with the batches of an update, or with their root"),
            Flag("momentum", "of sgd", float, "X"),
            Flag("nesterov", "Nesterov's momentum", None),
            Flag("adam_betas", "of adamw: how slowly its two moments forget", parse_betas, "B1,B2"),
            Flag("adam_eps", "of adamw: added to the root of the second moment", float, "X"),
            Flag("weight_decay", "L2 for sgd, decoupled for adamw", float, "X"),
            Flag("no_decay_norm_bias", "no weight decay on norms and biases", None),
            Flag("clip_grad_norm", "largest gradient norm over all stages", float, "X"),
            Flag("lr_schedule", "what the rate does after the warm-up"),
            Flag("warmup_epochs", "epochs of linear warm-up (default: ResNet 1)", float, "N"),
            Flag("warmup_steps", "updates of linear warm-up (default: BERT 2000)", int, "N"),
            Flag("lr_milestones", "epochs at which step acts (default: 1/2, 3/4)", parse_milestones, "A,B"),
            Flag("lr_factor", "what step multiplies with (default: 0.1)", float, "X"),
        ),
        "replicas": (
            Flag(
                "preduce", "partial reduce: average weights with whoever is ready (default: all-reduce gradients)", None
            ),
            Flag("adpsgd", "AD-PSGD: average pairwise in the background", None),
            Flag("adpsgd_matching", "partners: found while computing, or the reference's perfect matching per step"),
            Flag("local_sgd", "(post-)local SGD: average weights every --local-steps updates", None),
            Flag("local_steps", "updates between averages (H)", int, "H"),
            Flag("initial_steps", "updates before local SGD begins (S)", int, "S"),
            Flag("initial_step_method", "these: one pipeline's weights, or averaged every time"),
            Flag(
                "host_steps",
                "updates between averages inside a host; --local-steps then counts across hosts",
                int,
                "H1",
            ),
            Flag("outer", "outer optimiser of local SGD"),
            Flag("outer_momentum", "of the outer optimiser (default: slowmo 0.5, diloco 0.9)", float, "X"),
            Flag("outer_learning_rate", "of the outer optimiser (default: slowmo 1, diloco 0.7)", float, "X"),
            Flag("sync_momentum", "the optimiser's state at an average"),
            Flag("sync_buffers", "average BatchNorm's statistics as well", None),
            Flag("overlap_sync", "average during the next step and add the correction afterwards", None),
            Flag("max_group", "largest group of a partial reduce", int, "N"),
            Flag(
                "connect_within",
                "rounds after which groups must have connected all replicas (default: 10 each)",
                int,
                "N",
            ),
            Flag("wait", "how long a group waits: learnt from arrivals, or the reference's rule"),
            Flag("consensus_every", "log the distance between replicas every so many updates; 0: never", int, "N"),
        ),
        "uneven machines": (
            Flag("heartbeat_timeout", "seconds of silence after which a pipeline is lost", float, "S"),
            Flag("min_replicas", "fewest pipelines to go on with", int, "N"),
            Flag("hetero", "simulated stragglers: seconds, a profile as name:args, or FILE.yml", str, "PROFILE"),
            Flag("emulate", "wait instead of computing: FORWARD_MS,BACKWARD_MS[,PARAMETERS_MB]", str, "MS,MS[,MB]"),
        ),
        "what is left behind": (
            Flag("name", "of the run in TensorBoard (default: the time)"),
            Flag("runs", "folder of TensorBoard's runs", str, "DIR"),
            Flag("metrics", "JSON lines: one object per window, epoch and validation", str, "FILE"),
            Flag("out", "folder of the summary, timeline, loss curve and trace", str, "DIR"),
            Flag("trace_steps", "last updates shown in the timeline", int, "N"),
            Flag("disp_batches", "batches between speed lines", int, "N"),
            Flag("checkpoint", "folder of checkpoints, one per epoch", str, "DIR"),
            Flag("checkpoint_every", "also one every so many updates; 0: epochs only", int, "N"),
            Flag("keep", "checkpoints to keep", int, "K"),
            Flag("checkpoint_errors", "when one cannot be written: warn and try again at the next stop, or stop"),
            Flag("resume", "go on from the newest checkpoint in DIR (default: --checkpoint's)", str, "DIR"),
            Flag("export", "write the trained weights as safetensors", str, "FILE"),
        ),
    }
)


def parse_resnet(argv: Sequence[str]) -> Settings:
    """Settings of train_resnet.py; a mistake prints one line and exits with status 2."""
    return _parse(argv, make_parser("resnet"), task="resnet")


def parse_bert(argv: Sequence[str]) -> Settings:
    """Settings of train_bert.py; a mistake prints one line and exits with status 2."""
    return _parse(argv, make_parser("bert"), task="bert")


def make_parser(task: str) -> OneLineParser:
    """The parser of a task ("resnet" or "bert"), its options grouped as in `GROUPS`."""
    parser = OneLineParser(
        prog=f"train_{task}.py",
        description=f"Train a {'BERT' if task == 'bert' else 'ResNet'} over a device list.",
        allow_abbrev=False,
    )
    defaults = default_settings(task)
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            if task in flag.tasks:
                group.add_argument(option(flag.field), **_argument(flag, getattr(defaults, flag.field)))
    return parser


def flags_as_markdown() -> str:
    """Every option as the rows of a Markdown table: option, default (ResNet's / BERT's), meaning."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for flag in (flag for flags in GROUPS.values() for flag in flags):
        defaults = [_shown(getattr(default_settings(task), flag.field)) for task in flag.tasks]
        names = "" if flag.tasks == BOTH else f" ({flag.tasks[0]})"
        value = " / ".join(dict.fromkeys(word for word in defaults if word))
        choices = f": {', '.join(CHOICES[flag.field])}" if flag.field in CHOICES else ""
        rows.append(f"| `{option(flag.field)}`{names} | {value} | {flag.help}{choices} |")
    return "\n".join(rows)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose every complaint is one line, with the nearest option, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return parsed

    def _unknown(self, words: Sequence[str]) -> str:
        word = next((word for word in words if word.startswith("-")), words[0])
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(word.split("=")[0], known, n=1, cutoff=0.75)
        remedy = f"did you mean {near[0]}?" if near else "--help lists the options"
        return f"unknown {'option' if word.startswith('-') else 'argument'} {word}; {remedy}"


def _parse(argv: Sequence[str], parser: OneLineParser, *, task: str) -> Settings:
    given = vars(parser.parse_args(list(argv)))
    try:
        return Settings(task=task, **given)
    except UserError as error:
        parser.error(str(error))


def _argument(flag: Flag, default: Any) -> dict[str, Any]:
    shown = _shown(default)
    text = (flag.help + (f" (default: {shown})" if shown else "")).replace("%", "%%")
    if flag.convert is None:
        return {"action": "store_true", "default": default, "help": text}
    metavar = flag.metavar or ("{" + ",".join(CHOICES[flag.field]) + "}" if flag.field in CHOICES else "NAME")
    extra: dict[str, Any] = {"nargs": "?", "const": ""} if flag.field == "resume" else {}
    return {"type": _converter(flag.convert), "default": default, "help": text, "metavar": metavar, **extra}


def _converter(convert: Convert) -> Convert:
    """argparse hides the text of a ValueError but shows that of an ArgumentTypeError."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None
        except ValueError:
            kind = "a whole number" if convert is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None

    return converted


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool) or default == "":
        return ""
    if isinstance(default, tuple):
        return ",".join(map(_shown, default))
    return f"{default:g}" if isinstance(default, float) else str(default)
