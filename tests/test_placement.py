"""Layouts: rows are stages, columns pipelines, and every mistake is one line with its remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.placement import Device, HostLimits, Placement, check, cpu, gpu, load_placement, rcpu, rgpu

ROOT = Path(__file__).resolve().parent.parent
TWO_HOSTS = {"w0": HostLimits(8, 8), "w1": HostLimits(8, 8)}
SHAPES = {  # name: (stages, pipelines)
    "device_local": (4, 1), "device_4dp": (1, 4), "device_8dp": (1, 8), "single": (1, 1),
    "pipe_4_4": (4, 4), "pipe_2_4": (4, 2), "pipe_8_2": (2, 8), "pipe_8_4": (4, 8), "pipe_16_4": (4, 16),
    "pipe_16_1": (1, 16), "local_1x1": (1, 1), "local_1x2": (1, 2), "local_2x1": (2, 1), "local_2x2": (2, 2),
    "local_4x1": (4, 1), "local_4x2": (4, 2), "two_hosts_2x2": (2, 2),
}  # fmt: skip


def layout(*rows: list[Device], name: str = "mine") -> Placement:
    return Placement(name, tuple(map(tuple, rows)))


def write(directory: Path, text: str, name: str = "device_list.py") -> Path:
    path = directory / name
    path.write_text("from pipeline.placement import cpu, gpu, rcpu, rgpu\n" + text)
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_every_layout_of_the_list_has_the_shape_in_its_name(name: str) -> None:
    placement = load_placement(name, directory=ROOT)
    assert (placement.num_stages, placement.num_pipelines) == SHAPES[name]
    assert len({worker.device for worker in placement.workers()}) == placement.size


def test_the_default_is_the_references_four_by_four() -> None:
    placement = load_placement(None, directory=ROOT)
    assert placement.name == "pipe_4_4"
    assert [str(worker.device) for worker in placement.workers()[4:8]] == ["w0:gpu4", "w0:gpu5", "w0:gpu6", "w0:gpu7"]
    check(placement, TWO_HOSTS)


def test_ranks_run_through_the_stages_of_one_pipeline_before_the_next() -> None:
    workers = layout([rcpu("a", 0), rcpu("b", 0)], [rcpu("b", 1), rcpu("a", 1)]).workers()
    assert [(w.rank, w.pipeline, w.stage, str(w.device)) for w in workers] == [
        (0, 0, 0, "a:cpu0"),
        (1, 0, 1, "b:cpu1"),
        (2, 1, 0, "b:cpu0"),
        (3, 1, 1, "a:cpu1"),
    ]
    assert [w.local_rank for w in workers] == [0, 0, 1, 1]


def test_equal_adjacent_rows_are_one_stage_and_others_are_not() -> None:
    a, b = [cpu(0)], [cpu(1)]
    assert layout(a, a, b).rows_per_stage == (2, 1)
    assert layout(a, b, a).num_stages == 3
    assert load_placement("pipe_8_2", directory=ROOT).rows_per_stage == (2, 2)


def test_a_layout_survives_its_json() -> None:
    placement = layout([gpu(0, shared=True), rgpu("node.with.dots", 1)], [gpu(0, shared=True), rcpu("fe80::1", 2)])
    again = Placement.from_json(placement.to_json())
    assert again == placement
    assert again.rows[0][0].shared


def test_one_cpu_may_hold_many_workers_but_a_gpu_must_say_so() -> None:
    assert layout([cpu(0), cpu(0)]).num_pipelines == 2
    assert layout([gpu(0, shared=True)], [cpu(0)], [gpu(0, shared=True)]).num_stages == 3
    with pytest.raises(UserError, match=r"localhost:gpu0 stands in 2 places; .*gpu\(0, shared=True\)"):
        layout([gpu(0), gpu(0)])
    with pytest.raises(UserError, match=r"rgpu\('w0', 3, shared=True\)"):
        layout([rgpu("w0", 3)], [rgpu("w0", 4)], [rgpu("w0", 3, shared=True)])


def test_unequal_rows_are_refused() -> None:
    with pytest.raises(UserError, match="mine: row 1 has 1 devices and row 0 has 2"):
        layout([cpu(0), cpu(1)], [cpu(2)])


def test_a_device_needs_a_number_and_a_host() -> None:
    with pytest.raises(UserError, match=r"expected a whole number from 0, as in gpu\(0\)"):
        gpu(-1)
    with pytest.raises(UserError, match="expected a host's name"):
        rgpu("", 1)


def test_localhost_is_the_only_host_of_a_cluster_whatever_its_name() -> None:
    placement = layout([cpu(0), cpu(1)])
    check(placement, {"node7.example.org": HostLimits(2)})
    assert placement.on_cluster(["node7.example.org"]).hosts == ("node7.example.org",)
    with pytest.raises(UserError, match="host localhost is not in the cluster file, which has w0, w1"):
        check(placement, TWO_HOSTS)


def test_an_unknown_host_is_answered_with_the_hosts_and_the_layouts_that_fit() -> None:
    placement = load_placement("pipe_4_4", directory=ROOT)
    with pytest.raises(UserError) as caught:
        check(placement, {"localhost": HostLimits(4)})
    text = str(caught.value)
    assert text.startswith("layout pipe_4_4: host w0 is not in the cluster file, which has localhost; ")
    assert "local_2x2" in text and "local_4x2" not in text and "pipe_2_4" not in text and "\n" not in text


def test_more_devices_than_workers_are_refused() -> None:
    with pytest.raises(UserError, match="needs 2 workers on w1, which has 1; give it workers: 2"):
        check(layout([rcpu("w1", 0), rcpu("w1", 1)]), {"w1": HostLimits(1)})


def test_a_gpu_beyond_the_hosts_is_refused_if_their_number_is_known() -> None:
    check(layout([rgpu("w0", 9)]), {"w0": HostLimits(1)})
    with pytest.raises(UserError, match=r"uses w0:gpu2, but the cluster file gives w0 gpus: 2 \(gpu0 to gpu1\)"):
        check(layout([rgpu("w0", 2)]), {"w0": HostLimits(1, 2)})


def test_another_file_may_be_named_and_may_import_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "base_row_of_test = [cpu(5)]", name="neighbour_of_test.py")
    file = write(tmp_path, "from neighbour_of_test import base_row_of_test\ntwo = [base_row_of_test]", name="my.py")
    assert str(load_placement(f"{file}:two", directory=ROOT).rows[0][0]) == "localhost:cpu5"
    assert load_placement("my.py:two", directory=tmp_path).name == "two"
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("text", "spec", "expected"),
    [
        ("a = [[cpu(0)]]\nb = 3", "c", r"--placement c: .*device_list.py has no c; it has a$"),
        ("a = [[cpu(0)]]\nb = 3", "b", r"b in .*device_list.py is no table of devices; write rows"),
        ("b = [cpu(0), cpu(1)]", "b", r"is no table of devices"),
        ("b = [", "b", r"device_list.py, line 2: SyntaxError: "),
        ("\nb = [[nix(0)]]", "b", r"device_list.py, line 3: NameError: name 'nix' is not defined"),
        ("b = [[gpu('x')]]", "b", r"device_list.py: device 'x' of localhost: expected a whole number"),
        ("b = [[gpu(0)]]", None, r"layout my_device: .* has no my_device; it has b"),
        ("b = [[gpu(0)]]", "other.py:b", r"--placement other.py:b: there is no file .*other.py; give --placement"),
        ("b = [[gpu(0)]]", "other.py", r"there is no file .*other.py"),
    ],
)
def test_a_wrong_name_or_file_is_one_line(tmp_path: Path, text: str, spec: str | None, expected: str) -> None:
    write(tmp_path, text)
    with pytest.raises(UserError, match=expected) as caught:
        load_placement(spec, directory=tmp_path)
    assert "\n" not in str(caught.value)


def test_reading_layouts_loads_no_torch() -> None:
    code = "import sys, device_list, pipeline.placement; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_stages_x_pipelines_is_a_layout_that_needs_no_file(tmp_path: Path) -> None:
    layout = load_placement("2x3", directory=tmp_path)
    assert (layout.name, layout.num_stages, layout.num_pipelines) == ("2x3", 2, 3)
    assert layout.rows == load_placement("local_2x3", directory=ROOT).rows
    for wrong in ("0x2", "2x", "x2", "2X2", "2x-1"):
        with pytest.raises(UserError, match=wrong):
            load_placement(wrong, directory=tmp_path)
