"""Who runs where: a table of devices, its stages and pipelines, and the rank of every worker.

    pipe_2_2 = [[rgpu("w0", 0), rgpu("w1", 0)],     row = stage, column = pipeline
                [rgpu("w0", 1), rgpu("w1", 1)]]

                   pipeline 0     pipeline 1        rank = pipeline * num_stages + stage
        stage 0    w0:gpu0  0     w1:gpu0  2
        stage 1    w0:gpu1  1     w1:gpu1  3

Equal adjacent rows are one stage that holds both rows' blocks.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.outside import parse_json
from pipeline.errors import UserError

LOCAL = "localhost"
DEFAULT_FILE = "device_list.py"
DEFAULT_NAME = "my_device"
_SHAPE = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})")  # stages x pipelines


class Place(NamedTuple):
    """A worker: where it stands in the layout, and the host it runs on."""

    pipeline: int
    stage: int
    host: str


@dataclass(frozen=True)
class Device:
    """A GPU or CPU of a host; `shared` says that several workers may use this GPU. `str` gives "w0:gpu3"."""

    host: str
    kind: str  # "gpu" or "cpu"
    index: int
    shared: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise UserError(f"device of host {self.host!r}: expected a host's name, as in rgpu('w0', 0)")
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise UserError(f"device {self.index!r} of {self.host}: expected a whole number from 0, as in gpu(0)")

    def __str__(self) -> str:
        return f"{self.host}:{self.kind}{self.index}"


def gpu(index: int, *, shared: bool = False) -> Device:
    """GPU `index` of the only host."""
    return Device(LOCAL, "gpu", index, shared)


def cpu(index: int) -> Device:
    """A CPU worker of the only host; any number of workers may have the same index."""
    return Device(LOCAL, "cpu", index)


def rgpu(host: str, index: int, *, shared: bool = False) -> Device:
    """GPU `index` of a host of the cluster file."""
    return Device(host, "gpu", index, shared)


def rcpu(host: str, index: int) -> Device:
    """A CPU worker of a host of the cluster file."""
    return Device(host, "cpu", index)


class Worker(NamedTuple):
    """One process of the job; `local_rank` counts the job's processes of the same host."""

    rank: int
    pipeline: int
    stage: int
    device: Device
    local_rank: int


@dataclass(frozen=True)
class Placement:
    """A table of devices under a name: `rows` as written, one per stage or several equal ones; columns are pipelines.

    `siblings` are the other layouts of the same file, so that an error can name one that fits.

    Raises:
        UserError: no rows, rows of unequal length, or one GPU for two workers that does not say `shared=True`.
    """

    name: str
    rows: tuple[tuple[Device, ...], ...]
    siblings: tuple[Placement, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_shape(self)
        _check_shared(self)

    @property
    def stages(self) -> tuple[tuple[Device, ...], ...]:
        """The rows after merging equal adjacent ones."""
        return tuple(row for row, _ in groupby(self.rows))

    @property
    def rows_per_stage(self) -> tuple[int, ...]:
        """How many of the written rows each stage stands for."""
        return tuple(len(list(same)) for _, same in groupby(self.rows))

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_pipelines(self) -> int:
        return len(self.rows[0])

    @property
    def size(self) -> int:
        """Workers of the whole job."""
        return self.num_stages * self.num_pipelines

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every host, in the order of first mention."""
        return tuple(dict.fromkeys(device.host for row in self.rows for device in row))

    def workers(self) -> tuple[Worker, ...]:
        """Every worker in the order of ranks: the stages of pipeline 0, then of pipeline 1, ..."""
        stages, seen = self.stages, Counter[str]()
        workers: list[Worker] = []
        for pipeline in range(self.num_pipelines):
            for stage, row in enumerate(stages):
                device = row[pipeline]
                workers.append(Worker(len(workers), pipeline, stage, device, seen[device.host]))
                seen[device.host] += 1
        return tuple(workers)

    def on_cluster(self, hosts: Sequence[str]) -> Placement:
        """The same layout with `localhost` replaced by the name of a cluster's only host."""
        if len(hosts) != 1 or LOCAL not in self.hosts:
            return self
        rows = tuple(tuple(replace(d, host=hosts[0]) if d.host == LOCAL else d for d in row) for row in self.rows)
        return replace(self, rows=rows)

    def to_json(self) -> str:
        rows = [[[d.host, d.kind, d.index, d.shared] for d in row] for row in self.rows]
        return json.dumps({"name": self.name, "rows": rows})

    @staticmethod
    def from_json(text: str) -> Placement:
        """The inverse of `to_json`; raises `ValueError` for other text."""
        values = parse_json(text)
        return Placement(values["name"], tuple(tuple(Device(*device) for device in row) for row in values["rows"]))


class HostLimits(NamedTuple):
    """What a cluster file allows on a host; `gpus` None = not told."""

    workers: int
    gpus: int | None = None


def load_placement(spec: str | None, *, directory: Path) -> Placement:
    """The layout that `--placement` names.

    Args:
        spec: None (`my_device` of device_list.py), NAME (of device_list.py), FILE.py:NAME or FILE.py (its `my_device`);
            or 2x3, which needs no file: 2 stages x 3 pipelines on this machine's CPUs.
        directory: where device_list.py lies; FILE.py is looked for here if it is not in the current directory.

    Raises:
        UserError: no such file, no such name in it, an error in its Python, or a name that is no table of devices.
    """
    shape = _SHAPE.fullmatch(spec or "")
    if shape is not None:
        return grid(int(shape[1]), int(shape[2]))
    path, name = _locate(spec, directory)
    tables = _run(path)
    given = f"--placement {spec}" if spec else f"layout {name}"
    layouts = {key: value for key, value in tables.items() if not key.startswith("_") and _is_table(value)}
    if name not in tables:
        raise UserError(f"{given}: {path} has no {name}; it has {', '.join(layouts) or 'no layouts'}")
    if not _is_table(tables[name]):
        raise UserError(f"{given}: {name} in {path} is no table of devices; write rows of devices, as in [[gpu(0)]]")
    own = next((key for key, value in layouts.items() if value is tables[name]), name)
    siblings = tuple(_valid(key, table) for key, table in layouts.items() if key not in (own, name, DEFAULT_NAME))
    return Placement(own, _as_rows(tables[name]), tuple(layout for layout in siblings if layout is not None))


def grid(stages: int, pipelines: int, device: Callable[[int], Device] = cpu) -> Placement:
    """The layout "2x3": so many stages and pipelines on this machine, the stages of a pipeline side by side."""
    rows = tuple(tuple(device(stages * pipeline + stage) for pipeline in range(pipelines)) for stage in range(stages))
    return Placement(f"{stages}x{pipelines}", rows)


def check(placement: Placement, hosts: Mapping[str, HostLimits]) -> None:
    """Raises `UserError`, in one line, if the cluster's hosts cannot hold the layout."""
    complaint = _misfit(placement, hosts)
    if complaint is None:
        return
    fitting = [layout.name for layout in placement.siblings if _misfit(layout, hosts) is None]
    choose = f", or --placement with one that fits: {', '.join(fitting)}" if fitting else ""
    raise UserError(f"layout {placement.name}: {complaint}{choose}")


def _misfit(placement: Placement, hosts: Mapping[str, HostLimits]) -> str | None:
    """Why the hosts cannot hold the layout, or None."""
    placement = placement.on_cluster(tuple(hosts))
    unknown = [host for host in placement.hosts if host not in hosts]
    if unknown:
        return f"host {unknown[0]} is not in the cluster file, which has {', '.join(hosts)}; add it there"
    needed = Counter(worker.device.host for worker in placement.workers())
    for host, number in needed.items():
        if number > hosts[host].workers:
            return f"needs {number} workers on {host}, which has {hosts[host].workers}; give it workers: {number}"
    return _missing_gpu(placement, hosts)


def _missing_gpu(placement: Placement, hosts: Mapping[str, HostLimits]) -> str | None:
    for device in (device for row in placement.rows for device in row):
        gpus = hosts[device.host].gpus
        if device.kind == "gpu" and gpus is not None and device.index >= gpus:
            have = f"gpus: {gpus} (gpu0 to gpu{gpus - 1})" if gpus else "gpus: 0"
            return f"uses {device}, but the cluster file gives {device.host} {have}; correct one of them"
    return None


def _check_shape(placement: Placement) -> None:
    if not placement.rows or not placement.rows[0]:
        raise UserError(f"layout {placement.name} is empty; write rows of devices, as in [[gpu(0)]]")
    first = len(placement.rows[0])
    for number, row in enumerate(placement.rows):
        if len(row) != first:
            raise UserError(
                f"layout {placement.name}: row {number} has {len(row)} devices and row 0 has {first}; "
                "a row is a stage and needs one device for every pipeline"
            )


def _check_shared(placement: Placement) -> None:
    devices = [device for row in placement.stages for device in row if device.kind == "gpu"]
    uses = Counter(devices)
    for device in devices:
        if uses[device] > 1 and not device.shared:
            call = f"gpu({device.index}" if device.host == LOCAL else f"rgpu({device.host!r}, {device.index}"
            raise UserError(
                f"layout {placement.name}: {device} stands in {uses[device]} places; "
                f"if workers are to share it, write {call}, shared=True) in all of them"
            )


def _locate(spec: str | None, directory: Path) -> tuple[Path, str]:
    """The file and the name in it."""
    if spec is None:
        file, name = DEFAULT_FILE, DEFAULT_NAME
    elif spec.endswith(".py"):
        file, name = spec, DEFAULT_NAME
    elif ":" in spec:
        file, _, name = spec.rpartition(":")
    else:
        file, name = DEFAULT_FILE, spec
    here, there = Path(file), directory / file
    path = here if spec and file in spec and here.is_file() else there
    if not path.is_file():
        given = f"--placement {spec}" if spec else "no --placement"
        raise UserError(f"{given}: there is no file {path}; give --placement FILE.py:NAME")
    return path, name


def _run(path: Path) -> dict[str, Any]:
    """The names that a Python file defines."""
    try:
        with _importing_from(path.parent):
            return runpy.run_path(str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        line = _line_in(path, error)
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{path}{line}: {type(error).__name__}: {' '.join(message.split())}") from error


@contextmanager
def _importing_from(directory: Path) -> Iterator[None]:
    """A file of layouts may import its neighbours."""
    before = list(sys.path)
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path[:] = before


def _line_in(path: Path, error: Exception) -> str:
    """ ", line 7", if the error arose in that file."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines, step = [], error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            lines.append(step.tb_lineno)
        step = step.tb_next
    return f", line {lines[-1]}" if lines else ""


def _is_table(value: object) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(row, list | tuple) and row and all(isinstance(d, Device) for d in row) for row in value)


def _as_rows(table: Sequence[Sequence[Device]]) -> tuple[tuple[Device, ...], ...]:
    return tuple(tuple(row) for row in table)


def _valid(name: str, table: Sequence[Sequence[Device]]) -> Placement | None:
    """A layout to recommend, or None for one that is itself wrong."""
    try:
        return Placement(name, _as_rows(table))
    except UserError:
        return None
