"""Profiles from text: what --hetero may say, on a command line and in files.

A profile is written as NAME:ARGUMENTS, several of them joined with "+":

    0.1                                         as the SDPipe reference: random:probability=0.1,seconds=0.1
    random:probability=0.2,seconds=0.05         a pause before that share of forwards and backwards
    slow:pipeline=3,factor=5                    always
    window:host=w1,factor=3,start=30,stop=90    for a while, in seconds since training began
    trace:speeds.csv                            speeds over time, from a file (`parse_trace`)
    link:stage=0,bandwidth=100Mbit              what each direction of a link carries
    busy.yml                                    a list of the same, also as slow: {stage: 1, factor: 2}

Each may name a pipeline, a stage and a host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, NamedTuple

from pipeline.core.outside import parse_yaml
from pipeline.core.units import bytes_per_second
from pipeline.errors import UserError
from pipeline.simulation.profile import Link, Pause, Profile, Rule, Slow, Trace, Whom

Read = Callable[[str], str]


def parse_profile(text: str, *, read: Read | None = None) -> Profile:
    """The profile that --hetero describes.

    Args:
        read: a file's name -> its text. Without it files are taken for good and left out: the words alone are checked.

    Raises:
        UserError: in one line, what was given, what is expected, what to write.
    """
    rules = [rule for part in text.split("+") for rule in _rules_of(part.strip(), read)]
    return Profile(
        pauses=tuple(rule for rule in rules if isinstance(rule, Pause)),
        slowdowns=tuple(rule for rule in rules if isinstance(rule, Slow | Trace)),
        links=tuple(rule for rule in rules if isinstance(rule, Link)),
    )


def _rules_of(part: str, read: Read | None) -> tuple[Rule, ...]:
    if part.endswith((".yml", ".yaml")) and part.partition(":")[0] not in _KINDS:
        return () if read is None else _rules_in(part, read)
    return _rules_of_entry(_written(part, part), read, folder=PurePath())


def _rules_in(file: str, read: Read) -> tuple[Rule, ...]:
    """The rules of a YAML file, whose own files lie beside it."""
    text = read(file)
    try:
        entries = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"--hetero {file}: {error}") from None
    if not isinstance(entries, list):
        raise UserError(f"--hetero {file}: expected a list of profiles, one per line, as in - slow:pipeline=3,factor=5")
    rules: list[Rule] = []
    for number, entry in enumerate(entries, 1):
        rules += _rules_of_entry(_listed(entry, f"{file}, entry {number}"), read, folder=PurePath(file).parent)
    return tuple(rules)


class _Entry(NamedTuple):
    """NAME:ARGUMENTS taken apart; `text` is what to call it in messages."""

    text: str
    name: str
    arguments: Mapping[str, str]


def _written(text: str, shown: str) -> _Entry:
    """An entry as it stands on a command line."""
    name, colon, rest = text.partition(":")
    if not colon and name not in _KINDS:
        if not _is_number(name):
            raise UserError(f"--hetero {shown}: neither seconds, as 0.1, nor slow:pipeline=3,factor=5, nor a FILE.yml")
        return _Entry(shown, "random", {"probability": "0.1", "seconds": name})
    words = [word.strip() for word in rest.split(",") if word.strip()]
    if name == "trace" and words and "=" not in words[0]:
        words[0] = f"file={words[0]}"
    for word in words:
        if "=" not in word:
            raise UserError(f"--hetero {shown}: {word!r} is no KEY=VALUE; {_example(name)}")
    return _Entry(
        shown, name.strip(), {key.strip(): value.strip() for key, _, value in (w.partition("=") for w in words)}
    )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _listed(entry: Any, shown: str) -> _Entry:
    """An entry as it stands in a file: the same text, or a mapping of the name to its arguments."""
    if isinstance(entry, str | int | float) and not isinstance(entry, bool):
        return _written(str(entry), f"{shown}: {entry}")
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, arguments),) = entry.items()
        if isinstance(arguments, dict):
            return _Entry(f"{shown}: {name}", str(name), {str(key): str(value) for key, value in arguments.items()})
    raise UserError(
        f"--hetero {shown}: expected slow:pipeline=3,factor=5, or slow: {{pipeline: 3, factor: 5}}; got {entry!r}"
    )


def _rules_of_entry(entry: _Entry, read: Read | None, *, folder: PurePath) -> tuple[Rule, ...]:
    kind = _KINDS.get(entry.name)
    if kind is None:
        raise UserError(
            f"--hetero {entry.text}: no profile is called {entry.name!r}; choose from {', '.join(sorted(_KINDS))}, "
            "or give seconds or a FILE.yml"
        )
    arguments = _Arguments(entry, kind)
    if entry.name != "trace":
        return (kind.make(arguments),)
    file = str(folder / arguments.given["file"])
    return () if read is None else parse_trace(read(file), file=file, whom=arguments.whom())


class _Arguments:
    """The arguments of an entry, checked when they are asked for."""

    def __init__(self, entry: _Entry, kind: _Kind) -> None:
        self.given, self._text, self._example = entry.arguments, entry.text, kind.example
        for key in kind.needs:
            if key not in self.given:
                raise self.complaint(f"{key} is missing")
        for key in self.given:
            if key not in (*kind.needs, *_SELECTORS):
                raise self.complaint(f"{key} means nothing to it")

    def complaint(self, what: str) -> UserError:
        return UserError(f"--hetero {self._text}: {what}; expected something like {self._example}")

    def whom(self) -> Whom:
        given = self.given
        return Whom(
            text=self._text, pipeline=self._whole("pipeline"), stage=self._whole("stage"), host=given.get("host")
        )

    def _whole(self, key: str) -> int | None:
        if key not in self.given:
            return None
        if not self.given[key].isdecimal():
            raise self.complaint(f"{key} is {self.given[key]!r}, not a whole number from 0")
        return int(self.given[key])

    def number(self, key: str, *, least: float = 0.0, most: float = math.inf) -> float:
        try:
            value = float(self.given[key])
        except ValueError:
            raise self.complaint(f"{key} is {self.given[key]!r}, not a number") from None
        if not (math.isfinite(value) and least <= value <= most):
            limits = f"{least:g} or more" if most == math.inf else f"a number from {least:g} to {most:g}"
            raise self.complaint(f"{key} is {value:g}, not {limits}")
        return value

    def rate(self) -> float:
        try:
            rate = bytes_per_second(self.given["bandwidth"])
        except ValueError:
            rate = 0.0
        if not 0 < rate < math.inf:
            raise self.complaint(f"bandwidth is {self.given['bandwidth']!r}, not a rate above 0")
        return rate


def _pause(a: _Arguments) -> Pause:
    return Pause(a.whom(), a.number("probability", most=1.0), a.number("seconds"))


def _slow(a: _Arguments) -> Slow:
    return Slow(a.whom(), a.number("factor", least=1.0))


def _window(a: _Arguments) -> Slow:
    start_s, stop_s = a.number("start"), a.number("stop")
    if stop_s <= start_s:
        raise a.complaint(f"it stops at {stop_s:g} and starts at {start_s:g}")
    return Slow(a.whom(), a.number("factor", least=1.0), start_s, stop_s)


def _link(a: _Arguments) -> Link:
    return Link(a.whom(), a.rate())


def _no_rule(a: _Arguments) -> Rule:
    raise AssertionError("a trace makes rules of its own, one per column")


class _Kind(NamedTuple):
    """A kind of profile: the rule made of its arguments, those it needs, and how it is written."""

    make: Callable[[_Arguments], Rule]
    needs: tuple[str, ...]
    example: str


_SELECTORS = ("pipeline", "stage", "host")
_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "random": _Kind(_pause, ("probability", "seconds"), "random:probability=0.1,seconds=0.1"),
        "slow": _Kind(_slow, ("factor",), "slow:pipeline=3,factor=5"),
        "window": _Kind(_window, ("factor", "start", "stop"), "window:host=w1,factor=3,start=30,stop=90"),
        "trace": _Kind(_no_rule, ("file",), "trace:FILE.csv"),
        "link": _Kind(_link, ("bandwidth",), "link:stage=0,bandwidth=100Mbit"),
    }
)


def _example(name: str) -> str:
    return f"expected something like {_KINDS[name].example if name in _KINDS else 'slow:pipeline=3,factor=5'}"


def parse_trace(text: str, *, file: str, whom: Whom) -> tuple[Trace, ...]:
    """The speeds of a CSV file, one trace per column after the first.

        time_s,pipeline=0,host=w1      or time_s,speed for everybody, or for those that the profile names
        0,1,0.5
        30,0.25,1                      a speed above 0, up to the full speed of 1, holds until the next line

    Raises:
        UserError: with the file and the line.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.split("#")[0].strip()]
    rows = [(number, [cell.strip() for cell in line.split("#")[0].split(",")]) for number, line in lines]
    if len(rows) < 2 or rows[0][1][0] != "time_s" or len(rows[0][1]) < 2:
        raise UserError(f"--hetero {file}: expected a line time_s,speed or time_s,pipeline=0,host=w1, then numbers")
    (_, header), *body = rows
    numbers = [_numbers(cells, len(header), f"{file}, line {number}") for number, cells in body]
    times = tuple(row[0] for row in numbers)
    for (before, after), (number, _) in zip(pairwise(times), body[1:], strict=True):
        if after <= before:
            raise UserError(f"--hetero {file}, line {number}: time {after:g} after {before:g}; sort the lines by time")
    columns = enumerate(header[1:], 1)
    return tuple(Trace(_column(name, whom, file), times, tuple(row[at] for row in numbers)) for at, name in columns)


def _numbers(cells: Sequence[str], count: int, where: str) -> tuple[float, ...]:
    try:
        time_s, *speeds = (float(cell) for cell in cells)
    except ValueError:
        raise UserError(f"--hetero {where}: {','.join(cells)} are not numbers") from None
    if len(cells) != count:
        raise UserError(f"--hetero {where}: {len(cells)} numbers under {count} names; give one for each")
    if not math.isfinite(time_s) or not all(0 < speed <= 1 for speed in speeds):
        raise UserError(f"--hetero {where}: speeds are above 0, up to 1; divide them all by that of the fastest")
    return (time_s, *speeds)


def _column(name: str, whom: Whom, file: str) -> Whom:
    """Whom a column concerns: those of the profile, and of them those that its name selects."""
    if name == "speed":
        return whom
    key, _, value = name.partition("=")
    text = f"{whom.text}, column {name}"
    if key == "host" and value:
        return Whom(text=text, pipeline=whom.pipeline, stage=whom.stage, host=value)
    if key == "pipeline" and value.isdecimal():
        return Whom(text=text, pipeline=int(value), stage=whom.stage, host=whom.host)
    if key == "stage" and value.isdecimal():
        return Whom(text=text, pipeline=whom.pipeline, stage=int(value), host=whom.host)
    raise UserError(f"--hetero {file}: column {name!r}; call it speed, pipeline=0, stage=0 or host=w1")
