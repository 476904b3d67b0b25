"""Losses taken in parts: summed over the micro-batches of a batch they are the loss of the whole batch.

    counts = criterion.count(targets of the whole batch)
    loss(batch) = sum over micro-batches of criterion(outputs, targets, counts)[0]

An ordinary mean cannot do that: micro-batches may differ in size (the last, short batch) and in how many of
their tokens are masked. So the normalisers are counted over the batch before it is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.layered import Tensors

Sums = dict[str, Tensor]
EVAL = "{epoch} EVAL  loss {loss:.4f} acc {acc:.4f}"  # the reference's line after a validation


class Wording(NamedTuple):
    """The log lines of a task, as templates of its means: at the end of an epoch, after a validation, of a window."""

    train: str  # also {epoch}, {lr}, {seconds}
    validation: str  # also {epoch}
    window: str  # what stands after the speed


class Criterion(Protocol):
    """A loss over a batch in parts, the sums from which the metrics of an epoch follow, and what is said of them.

    names: of the sums, "samples" among them. uneven: whether batches of equally many samples may have different counts.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def uneven(self) -> bool: ...
    @property
    def wording(self) -> Wording: ...

    def count(self, targets: Tensors) -> Tensors:
        """The normalisers of a WHOLE batch, as 0-dimensional float tensors on the targets' device."""

    def __call__(self, outputs: Tensors, targets: Tensors, counts: Tensors) -> tuple[Tensor, Sums]:
        """This micro-batch's share of the batch's loss (float32), and detached sums to be added up by key."""

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of everything added up: 'loss' and what else is logged; of no samples they are not a number."""


class Classification:
    """Softmax cross entropy, averaged over the batch's samples.

    outputs: (scores (batch, classes),); targets: (class numbers (batch,),).
    sums: loss (summed over samples), samples, correct, and correct5 ... for each k of top_k beyond 1.
    """

    def __init__(self, *, label_smoothing: float = 0.0, top_k: tuple[int, ...] = (1,)) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label smoothing {label_smoothing} is outside 0 <= x < 1")
        if any(k < 1 for k in top_k):
            raise ValueError(f"top-k needs k >= 1; got {top_k}")
        self.label_smoothing = label_smoothing
        self.top_k = tuple(k for k in top_k if k > 1)
        self.names = ("loss", "samples", "correct", *(f"correct{k}" for k in self.top_k))
        self.uneven = False
        self.wording = Wording(  # the reference's, and MXNet's Speedometer's
            "{epoch} TRAIN loss {loss:.4f} acc {acc:.4f} lr {lr:.2e}, time {seconds:.4f}", EVAL, "accuracy={acc:f}"
        )

    def count(self, targets: Tensors) -> Tensors:
        return (_number_of(targets[0]),)

    def __call__(self, outputs: Tensors, targets: Tensors, counts: Tensors) -> tuple[Tensor, Sums]:
        (scores, *_), (labels, *_) = outputs, targets  # the loss stays in float32 whatever autocast made of the scores
        total = F.cross_entropy(scores.float(), labels, reduction="sum", label_smoothing=self.label_smoothing)
        with torch.no_grad():
            sums = {
                "loss": total.detach(),
                "samples": _number_of(labels),
                "correct": (scores.argmax(1) == labels).sum(),
            }
            for k in self.top_k:
                best = scores.topk(min(k, scores.shape[1]), dim=1).indices  # (batch, k)
                sums[f"correct{k}"] = (best == labels[:, None]).any(1).sum()
        return total / counts[0], sums

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        samples = sums.get("samples", 0.0)
        result = {"loss": per(sums, "loss", samples), "acc": per(sums, "correct", samples)}
        return result | {f"acc{k}": per(sums, f"correct{k}", samples) for k in self.top_k}


class BertPretraining:
    """Masked language model plus next sentence (Devlin et al. 2018, arXiv:1810.04805).

    loss = sum of token cross entropies / masked tokens of the batch + sentence cross entropies / batch.
    outputs: (prediction scores (batch, seq, vocab), sentence scores (batch, 2));
    targets: (token ids (batch, seq), `ignore` where nothing was masked; next sentence (batch,), 0 = follows).
    sums: lm (over tokens), masked, ns (over sequences), samples, correct (masked tokens) and ns_correct.
    """

    def __init__(self, *, ignore: int = -1) -> None:
        self.ignore = ignore
        self.names = ("samples", "lm", "masked", "correct", "ns", "ns_correct")
        self.uneven = True
        self.wording = Wording(  # the reference's; the two blanks after the loss are its own
            "{epoch} TRAIN loss {loss:.4f}  lm {lm:.4e} ns {ns:.4e} lr {lr:.4e}, time {seconds:.4f}",
            EVAL,
            "loss={loss:f}",
        )

    def count(self, targets: Tensors) -> Tensors:
        """(masked tokens, at least 1 so that a batch without any costs nothing; sequences)."""
        return self._masked(targets[0]).clamp(min=1), _number_of(targets[1])

    def _masked(self, labels: Tensor) -> Tensor:
        return (labels != self.ignore).sum().float()

    def __call__(self, outputs: Tensors, targets: Tensors, counts: Tensors) -> tuple[Tensor, Sums]:
        (scores, sentence, *_), (labels, follows, *_), (masked, samples) = outputs, targets, counts
        scores, labels = scores.flatten(0, -2), labels.flatten()  # (batch * seq, vocab), (batch * seq,)
        follows = follows.flatten()
        lm = F.cross_entropy(scores.float(), labels, reduction="sum", ignore_index=self.ignore)
        nsp = F.cross_entropy(sentence.float(), follows, reduction="sum")
        loss = lm / masked + nsp / samples
        with torch.no_grad():
            sums = {
                "samples": _number_of(follows),
                "lm": lm.detach(),
                "masked": self._masked(labels),
                "correct": (scores.argmax(1) == labels).sum(),  # `ignore` is never an argmax
                "ns": nsp.detach(),
                "ns_correct": (sentence.argmax(1) == follows).sum(),
            }
        return loss, sums

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        samples = sums.get("samples", 0.0)
        masked = max(sums.get("masked", 0.0), 1.0) if samples else 0.0  # where nothing was masked, it costs nothing
        lm, ns = per(sums, "lm", masked), per(sums, "ns", samples)
        hits = {"acc": per(sums, "correct", masked), "ns_acc": per(sums, "ns_correct", samples)}
        return {"loss": lm + ns, "lm": lm, "ns": ns, **hits}


def per(sums: Mapping[str, float], name: str, count: float) -> float:
    """A sum over a count; of nothing it is not a number."""
    return sums[name] / count if count else math.nan


def _number_of(labels: Tensor) -> Tensor:
    return torch.full((), float(labels.numel()), device=labels.device)


CRITERIA: dict[str, Callable[..., Criterion]] = {"classification": Classification, "bert": BertPretraining}
