"""Simulated stragglers: profiles are laws about seconds, waiting is done on a made-up clock."""

from __future__ import annotations

import math
import pipes
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pipes import Job, run_threads, small_mlp
from typing import Any

import pytest
import torch

from pipeline.core.actions import Op
from pipeline.core.units import bytes_per_second
from pipeline.errors import UserError
from pipeline.placement import Place
from pipeline.settings import Settings
from pipeline.simulation.clocks import ExactClock
from pipeline.simulation.parse_profile import parse_profile, parse_trace
from pipeline.simulation.profile import Profile, Whom, check_places
from pipeline.simulation.read_profile import read_profile
from pipeline.simulation.straggler import Straggler, make_straggler, slowed
from pipeline.simulation.throttled import ThrottledTransport, throttled
from pipeline.stage.executor import Executor
from pipeline.transport.local import local_transports

ROOT = Path(__file__).resolve().parent.parent
HERE = Place(0, 0, "w0")
PLACES = tuple(Place(pipeline, stage, f"w{pipeline}") for pipeline in range(4) for stage in range(2))


def profile(text: str, **files: str) -> Profile:
    return parse_profile(text, read={name.replace("_", "."): text for name, text in files.items()}.__getitem__)


def pauses(text: str, where: Place, *, seed: int = 0, count: int = 2000) -> list[float]:
    made = profile(text)
    return [made.pause_before(where, m, op, seed) for m in range(count) for op in (Op.FORWARD, Op.BACKWARD)]


# --- pauses


def test_a_number_is_the_references_profile() -> None:
    assert pauses("0.3", HERE) == pauses("random:probability=0.1,seconds=0.3", HERE)
    drawn = pauses("0.3", HERE)
    assert set(drawn) == {0.0, 0.3}
    share = sum(map(bool, drawn)) / len(drawn)
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / len(drawn))


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_pauses_come_as_often_as_asked(probability: float) -> None:
    drawn = pauses(f"random:probability={probability},seconds=1", HERE)
    assert abs(sum(drawn) / len(drawn) - probability) <= 4 * math.sqrt(probability * (1 - probability) / len(drawn))


def test_pauses_depend_on_seed_place_and_op_and_on_nothing_else() -> None:
    assert pauses("0.1", HERE) == pauses("0.1", HERE._replace(host="elsewhere"))
    others = [pauses("0.1", HERE, seed=1), pauses("0.1", Place(1, 0, "w0")), pauses("0.1", Place(0, 1, "w0"))]
    assert all(other != pauses("0.1", HERE) for other in others)
    forwards, backwards = pauses("0.1", HERE)[::2], pauses("0.1", HERE)[1::2]
    assert forwards != backwards


def test_two_rules_draw_by_themselves_and_add_up() -> None:
    one, two = pauses("0.1", HERE), pauses("0.1+0.1", HERE)
    assert set(two) == {0.0, 0.1, 0.2}
    assert all(both >= alone for both, alone in zip(two, one, strict=True))


# --- factors


def stretch(text: str, where: Place, took_s: float = 1.0, now_s: float = 1.0, **files: str) -> float:
    return profile(text, **files).stretch(where, Op.FORWARD, took_s, now_s)


def test_a_slow_pipeline_lasts_factor_times_as_long() -> None:
    assert stretch("slow:pipeline=3,factor=5", Place(3, 1, "w0"), took_s=0.25) == 1.0
    assert stretch("slow:pipeline=3,factor=5", Place(2, 1, "w0")) == 0.0


def test_whatever_is_named_must_fit_and_factors_multiply() -> None:
    both = "slow:pipeline=1,stage=0,factor=2+slow:host=w1,factor=3"
    factors = {place: 1 + stretch(both, place) for place in PLACES}
    assert {place: factor for place, factor in factors.items() if factor > 1} == {PLACES[2]: 6.0, PLACES[3]: 3.0}


def test_a_window_holds_for_ops_that_begin_in_it() -> None:
    text = "window:host=w0,factor=3,start=30,stop=90"
    began = {29.9: 0.0, 30.0: 2.0, 89.9: 2.0, 90.0: 0.0}
    assert {at: stretch(text, HERE, now_s=at + 1.0) for at in began} == began


def test_a_trace_holds_until_its_next_line() -> None:
    speeds = "time_s,speed\n10,0.5\n20,0.25  # busy\n\n30,1\n"
    began = {0.0: 0.0, 10.0: 1.0, 19.0: 1.0, 20.0: 3.0, 35.0: 0.0}
    assert {at: stretch("trace:a.csv", HERE, now_s=at + 1.0, a_csv=speeds) for at in began} == began


def test_the_columns_of_a_trace_are_pipelines_stages_or_hosts() -> None:
    made = profile("trace:a.csv,stage=1", a_csv="time_s,pipeline=0,host=w2\n0,0.5,0.25\n")
    factors = {place: made.factor(place, 0.0) for place in PLACES}
    assert {place for place, factor in factors.items() if factor > 1} == {PLACES[1], PLACES[5]}
    assert factors[PLACES[1]] == 2.0 and factors[PLACES[5]] == 4.0


# --- links


def test_a_link_is_limited_in_both_directions_and_the_least_bandwidth_holds() -> None:
    row = [Place(0, stage, "w0") for stage in range(4)]
    edges = profile("link:stage=0,bandwidth=100Mbit+link:bandwidth=1GB/s").edges(row)
    assert edges[0, 1] == edges[1, 0] == edges[3, 0] == 12.5e6
    assert edges[1, 2] == edges[2, 3] == 1e9
    assert profile("slow:factor=2").edges(row) == {}


def test_the_link_of_a_host_is_where_its_tensors_leave_it() -> None:
    row = [Place(0, 0, "w0"), Place(0, 1, "w1"), Place(0, 2, "w1")]
    assert set(profile("link:host=w1,bandwidth=1e9").edges(row)) == {(0, 1), (1, 0), (0, 2), (2, 0)}


def test_rates_are_read_as_people_write_them() -> None:
    assert bytes_per_second("12.3GB") == 12.3e9 and bytes_per_second(" 10 Gbit/s ") == 1.25e9


# --- files and mistakes


def test_a_file_is_a_list_of_the_same() -> None:
    text = (
        "- 0.2\n- slow:stage=1,factor=2\n- window: {host: w1, factor: 3, start: 30, stop: 90}\n- trace: {file: t.csv}\n"
    )
    files = {"dir/p.yml": text, "dir/t.csv": "time_s,speed\n0,0.5\n"}
    made = parse_profile("dir/p.yml+link:bandwidth=1e6", read=files.__getitem__)
    assert [pause.seconds for pause in made.pauses] == [0.2] and len(made.links) == 1
    assert made.factor(Place(0, 1, "w1"), 40.0) == 2 * 3 * 2


@pytest.mark.parametrize("file", sorted((ROOT / "config" / "hetero").glob("*.yml")), ids=lambda path: path.name)
def test_the_examples_are_good_for_two_by_four(file: Path) -> None:
    check_places(read_profile(str(file)), PLACES if file.stem != "busy_host" else (*PLACES, Place(1, 2, "w0")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("often", "--hetero often: neither seconds, as 0.1, nor slow:pipeline=3,factor=5, nor a FILE.yml"),
        ("-1", "--hetero -1: seconds is -1, not 0 or more; expected something like random:probability=0.1,seconds=0.1"),
        ("slow", "--hetero slow: factor is missing; expected something like slow:pipeline=3,factor=5"),
        ("slow:factor=0.5", "factor is 0.5, not 1 or more"),
        ("slow:factor=nan", "factor is nan, not 1 or more"),
        ("slow:factor=2,pipe=3", "pipe means nothing to it"),
        ("slow:factor=2,pipeline=-1", "pipeline is '-1', not a whole number from 0"),
        ("slow:pipeline=3;factor=5", "pipeline=3;factor=5: factor is missing"),
        ("slow:5", "'5' is no KEY=VALUE"),
        ("slwo:factor=2", "no profile is called 'slwo'; choose from link, random, slow, trace, window"),
        ("random:probability=2,seconds=1", "probability is 2, not a number from 0 to 1"),
        ("window:factor=2,start=9,stop=3", "it stops at 3 and starts at 9"),
        ("link:bandwidth=fast", "bandwidth is 'fast', not a rate above 0"),
        ("link:bandwidth=0", "bandwidth is '0', not a rate above 0"),
        ("trace:", "file is missing; expected something like trace:FILE.csv"),
        ("0.1+", "--hetero : neither seconds"),
    ],
)
def test_a_mistake_is_told_in_one_line_when_settings_are_built(text: str, expected: str) -> None:
    with pytest.raises(UserError) as raised:
        Settings(hetero=text)
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_settings_read_no_files() -> None:
    assert Settings(hetero="nowhere.yml+trace:nowhere.csv").hetero


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slow:factor=2", "p.yml: expected a list of profiles"),
        ("- slow:factor=2\n- {slow: 3}", "p.yml, entry 2: expected slow:pipeline=3,factor=5"),
        ("- slow: {factor: 0}", "p.yml, entry 1: slow: factor is 0, not 1 or more"),
        ("- [", "p.yml: not YAML"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        profile("p.yml", p_yml=text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("speed\n1", "a.csv: expected a line time_s,speed"),
        ("time_s,speed\n0,2", "a.csv, line 2: speeds are above 0, up to 1"),
        ("time_s,speed\n0,0", "a.csv, line 2: speeds are above 0, up to 1"),
        ("time_s,speed\n0,1\n0,1", "a.csv, line 3: time 0 after 0; sort the lines by time"),
        ("time_s,speed\n0,1,1", "a.csv, line 2: 3 numbers under 2 names"),
        ("time_s,speed\n0,full", "a.csv, line 2: 0,full are not numbers"),
        ("time_s,worker=1\n0,1", "column 'worker=1'; call it speed"),
    ],
)
def test_a_mistake_in_a_trace_is_told_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_trace(text, file="a.csv", whom=Whom(text="trace:a.csv"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yml: No such file or directory; give a file"):
        read_profile(str(tmp_path / "nowhere.yml"))


@pytest.mark.parametrize("text", ["slow:pipeline=4,factor=2", "slow:host=w9,factor=2", "link:stage=2,bandwidth=1e6"])
def test_a_rule_that_concerns_nothing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"concerns nothing in this layout, which has pipelines 0 to 3, stages 0 to 1"):
        check_places(profile(text), PLACES)


def test_a_host_that_holds_a_whole_pipeline_has_no_link_to_limit() -> None:
    with pytest.raises(UserError, match="link:host=w1"):
        check_places(profile("link:host=w1,bandwidth=1e6"), PLACES)
    check_places(profile("slow:host=w1,factor=2+link:bandwidth=1e6+0.1"), PLACES)


# --- at work


@dataclass
class Watch:
    """A clock that goes on only when somebody waits or works, and says what happened when."""

    time_s: float = 100.0
    said: list[str] = field(default_factory=list)

    def now(self) -> float:
        return self.time_s

    def wait(self, seconds: float) -> None:
        self.said.append(f"wait {seconds:g}")
        self.time_s += seconds

    def work(self, name: str, seconds: float) -> Callable[[int], None]:
        def act(microbatch: int) -> None:
            self.said.append(f"{name}{microbatch}")
            self.time_s += seconds

        return act

    def say(self, what: str) -> Callable[[], None]:
        return lambda: self.said.append(what)


def handlers_of(watch: Watch, text: str, **options: Any) -> dict[Op, Callable[[int], object]]:
    straggler = Straggler(profile(text), HERE, seed=0, clock=watch, **options)
    work = {op: watch.work(op.value, 2.0) for op in (Op.FORWARD, Op.BACKWARD, Op.SEND_ACTIVATION, Op.UPDATE)}
    return slowed(work, straggler)


def test_forwards_and_backwards_are_slowed_and_nothing_else() -> None:
    watch = Watch()
    handlers = handlers_of(watch, "slow:factor=2.5+random:probability=1,seconds=7")
    for op in (Op.FORWARD, Op.SEND_ACTIVATION, Op.BACKWARD, Op.UPDATE):
        handlers[op](4)
    assert watch.said == ["wait 7", "F4", "wait 3", "SA4", "wait 7", "B4", "wait 3", "U4"]


def test_times_count_from_the_first_op() -> None:
    watch = Watch()
    handlers = handlers_of(watch, "window:factor=2,start=3,stop=5")
    for microbatch in range(4):  # they begin at 0, 2, 4 and, the third one slowed, 8
        handlers[Op.FORWARD](microbatch)
    assert watch.said == ["F0", "F1", "F2", "wait 2", "F3"]


def test_a_device_is_waited_for_and_what_is_ready_leaves_before_a_pause() -> None:
    watch = Watch()
    options = {"synchronize": watch.say("settle"), "release": watch.say("release")}
    handlers_of(watch, "random:probability=1,seconds=7", **options)[Op.FORWARD](0)
    assert watch.said == ["settle", "release", "wait 7", "F0"]
    watch.said.clear()
    handlers_of(watch, "slow:factor=2", **options)[Op.FORWARD](1)
    assert watch.said == ["settle", "F1", "settle", "wait 2"]


def test_a_worker_that_the_profile_leaves_alone_has_no_straggler() -> None:
    made, cpu = profile("slow:pipeline=3,factor=2+link:bandwidth=1e6"), torch.device("cpu")
    assert make_straggler(made, HERE, seed=0, device=cpu) is None
    assert make_straggler(made, Place(3, 0, "w0"), seed=0, device=cpu) is not None


def test_an_exact_clock_is_never_early_and_hardly_late() -> None:
    clock, late = ExactClock(), []
    for _ in range(20):
        moment = clock.now() + 0.002
        clock.wait_until(moment)
        late.append(clock.now() - moment)
    assert min(late) >= 0
    assert sorted(late)[10] < 0.002, "the median; a busy machine may be late now and then"
    clock.wait_until(moment)  # past: at once


def test_slowing_down_changes_nothing_but_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(model=small_mlp(), counts=(4, 4), schedule="1f1b", microbatches=2)
    _, plain = run_threads(job, local_transports(2, timeout_s=60))
    watch = Watch()
    straggler = Straggler(profile("random:probability=0.5,seconds=1+slow:factor=3"), HERE, seed=0, clock=watch)
    monkeypatch.setattr(pipes, "Executor", partial(Executor, wrap=partial(slowed, straggler=straggler)))
    _, slow = run_threads(job, local_transports(2, timeout_s=60))
    assert watch.said.count("wait 1") > 0
    assert plain.keys() == slow.keys() and all(torch.equal(plain[name], slow[name]) for name in plain)


# --- links at work


class Air:
    """A clock in nanoseconds whose waits are written down; work on it is done by `passes`."""

    def __init__(self) -> None:
        self.time_ns = 5_000_000_000
        self.waited: list[float] = []

    def now_ns(self) -> int:
        return self.time_ns

    def wait(self, seconds: float) -> None:
        self.waited.append(round(seconds, 6))
        self.passes(seconds)

    def passes(self, seconds: float) -> None:
        self.time_ns += round(seconds * 1e9)


def limited_pair(limits: dict[tuple[int, int], float], air: Air) -> list[ThrottledTransport]:
    return [
        ThrottledTransport(inner, stage=stage, limits=limits, now_ns=air.now_ns, wait=air.wait)
        for stage, inner in enumerate(local_transports(2, timeout_s=10))
    ]


KILOBYTE = (torch.arange(250, dtype=torch.float32),)  # 1000 bytes


def test_messages_leave_one_after_another_while_the_sender_goes_on() -> None:
    air = Air()
    first, second = limited_pair({(0, 1): 1e3}, air)
    for microbatch in range(3):
        first.send(1, "A", microbatch, KILOBYTE)
    assert air.waited == [], "sending does not wait"
    assert first.bytes_sent == 3000, "without the stamps"
    air.passes(0.25)
    assert torch.equal(second.recv(0, "A", 0)[0], KILOBYTE[0])
    air.passes(0.5)
    second.recv(0, "A", 1)
    air.passes(1.5)
    second.recv(0, "A", 2)
    assert air.waited == [0.75, 0.5]


def test_the_other_direction_and_other_links_are_free() -> None:
    air = Air()
    first, second = limited_pair({(0, 1): 1e3}, air)
    second.send(0, "G", 0, KILOBYTE)
    assert len(first.recv(1, "G", 0)) == 1 and air.waited == []


def test_all_channels_of_a_link_share_it_and_an_idle_link_saves_nothing_up() -> None:
    air = Air()
    first, second = limited_pair({(0, 1): 1e3}, air)
    air.passes(60)
    first.send(1, "A", 0, KILOBYTE)
    first.send(1, "N", 0, KILOBYTE)
    first.send(1, "A", 1, ())
    second.recv(0, "N", 0)
    second.recv(0, "A", 0)
    assert second.recv(0, "A", 1) == () and air.waited == [2.0]


def test_flush_waits_until_the_link_is_free() -> None:
    air = Air()
    first, _ = limited_pair({(0, 1): 1e3}, air)
    first.flush()
    first.send(1, "A", 0, KILOBYTE)
    air.passes(0.25)
    first.flush()
    first.close()
    assert air.waited == [0.75]


def test_a_validation_is_not_slowed() -> None:
    air = Air()
    first, second = limited_pair({(0, 1): 1e3}, air)
    first.limited = second.limited = False
    first.send(1, "A", 0, KILOBYTE)
    second.recv(0, "A", 0)
    first.flush()
    assert air.waited == []


def test_a_clock_that_is_an_hour_ahead_delays_no_longer_than_the_way() -> None:
    air, ahead = Air(), Air()
    ahead.passes(3600)
    ends = local_transports(2, timeout_s=10)
    first, second = (
        ThrottledTransport(ends[stage], stage=stage, limits={(0, 1): 1e3}, now_ns=clock.now_ns, wait=clock.wait)
        for stage, clock in enumerate((ahead, air))
    )
    first.send(1, "A", 0, KILOBYTE)
    second.recv(0, "A", 0)
    assert air.waited == [1.0]


def test_only_limited_stages_are_wrapped() -> None:
    row = [Place(0, stage, f"w{stage}") for stage in range(3)]
    ends = local_transports(3)
    made = profile("link:host=w0,stage=0,bandwidth=1e6")
    assert isinstance(throttled(ends[0], made, row, stage=0), ThrottledTransport)
    assert throttled(ends[1], profile("slow:factor=2"), row, stage=1) is ends[1]


def test_training_over_a_throttled_link_is_training() -> None:
    job = Job(model=small_mlp(), counts=(4, 4), schedule="pipedream")
    _, plain = run_threads(job, local_transports(2, timeout_s=60))
    limits = {(0, 1): 1e5, (1, 0): 1e5}  # 384 bytes a message: 4 ms
    ends = [ThrottledTransport(end, stage=s, limits=limits) for s, end in enumerate(local_transports(2, timeout_s=60))]
    _, slow = run_threads(job, ends)
    assert all(torch.equal(plain[name], slow[name]) for name in plain)
