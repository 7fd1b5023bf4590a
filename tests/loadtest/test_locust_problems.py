"""A run that has not shown what it should must not pass: each way in which one can break, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gevent
import pytest
from gevent.event import Event
from gevent.queue import PriorityQueue

from loadtest.load import conductor as conducting
from loadtest.load import officers as desk
from loadtest.load.conductor import Conductor
from loadtest.load.deployment import Deployment
from loadtest.load.frames import Request
from loadtest.load.http import Refused
from loadtest.load.recorder import Recorder
from loadtest.load.senders import reserve
from loadtest.load.spec import RunSpec
from loadtest.load.traffic import Traffic
from loadtest.load.watch import Watch

DEPLOYMENT = Deployment("http://127.0.0.1:1", {"amap": "k"}, officer="o")


class Clock:
    """Time that goes on when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s

    def sleep(self, seconds: float = 0.0) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(conducting, "time", clock)
    monkeypatch.setattr(conducting, "gevent", SimpleNamespace(sleep=clock.sleep, spawn=gevent.spawn))
    return clock


def conductor(tmp_path: Path, scenario: str = "steady", heads: Any = (), done: bool = True) -> Conductor:
    """A conductor of one worker, whose deployment has logs that end there."""
    runner = SimpleNamespace(register_message=lambda *_: None, send_message=lambda *_: None)
    environment = SimpleNamespace(runner=runner, process_exit_code=None)
    found = Conductor(environment, RunSpec.of(scenario, minutes=1), DEPLOYMENT, None, tmp_path, say=lambda _: None)
    watch = SimpleNamespace(
        heads=lambda: list(heads), is_done=lambda _: done, sample=lambda: {"machine_cores": 0.1, "unread": {}}
    )
    found._watch = cast(Watch, watch)
    found._begin_ms = 1.0
    return found


def says(conductor: Conductor, **fields: Any) -> None:
    """The worker says something."""
    seen = {"index": 0, "record": Recorder().take(), "filled": True, "known": 1, "idle": True, "problem": None}
    conductor._seen(None, SimpleNamespace(data=seen | {"last": False} | fields))


def test_a_run_whose_pushes_have_all_arrived_has_no_problem(tmp_path: Path, clock: Clock) -> None:
    run = conductor(tmp_path, heads=[(5, 0)])
    says(run)
    run._drain()
    assert run.problem is None


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers may be silent."""
    monkeypatch.setattr(conducting, "WORKER_TIMEOUT_S", float("inf"))


def test_a_flow_that_does_not_get_on_is_a_problem(tmp_path: Path, clock: Clock, patience: None) -> None:
    run = conductor(tmp_path, heads=[(5, 0)], done=False)
    says(run)
    assert run._drain() > conducting.DRAIN_S_MAX
    assert run.problem is not None
    assert run.problem.endswith("the flow has not worked through what the logs held when the load ended")


def test_requests_that_never_end_are_a_problem(tmp_path: Path, clock: Clock, patience: None) -> None:
    run = conductor(tmp_path)
    says(run, idle=False)
    run._drain()
    assert run.problem is not None
    assert run.problem.endswith(": requests that were due")


def test_a_worker_that_falls_silent_is_a_problem(tmp_path: Path, clock: Clock) -> None:
    run = conductor(tmp_path, heads=[(5, 0)], done=False)
    says(run)
    run._drain()
    assert run.problem == "worker 0: has said nothing for 31 s"


def test_a_worker_that_does_not_say_its_last_is_a_problem(tmp_path: Path, clock: Clock) -> None:
    run = conductor(tmp_path)
    says(run)
    run._collect()
    assert run.problem == "a worker has not said its last: what it has seen is not all here"


def test_a_crash_that_killed_less_than_it_should_is_a_problem(tmp_path: Path) -> None:
    run = conductor(tmp_path, "crash")
    assert run._faults() == []
    assert run.problem == "3 processes were to be killed, and 0 were"


def test_a_run_counts_as_failed_until_its_report_says_otherwise(tmp_path: Path) -> None:
    run = conductor(tmp_path)
    run._run = lambda: None  # type: ignore[method-assign]
    run.start()
    assert run._environment.process_exit_code == 1


# ---- what happens in a worker


class Worked(Traffic):
    """A worker without a feeder."""

    def __init__(self) -> None:
        self.recorder, self.deployment, self.problem = Recorder(), DEPLOYMENT, None
        self.spec = RunSpec.of("steady", minutes=1)
        self.begun, self.ended, self.ceased = Event(), Event(), Event()
        self.begin_ms, self.senders, self.environment = 0.0, 0, None
        self.begun.set()

    def fire(self, *_: Any) -> None:
        pass


def test_a_user_that_fails_fails_the_run() -> None:
    traffic = Worked()

    def part(_: Traffic) -> None:
        raise AssertionError("no such answer")

    traffic.play("AlertOfficers", part)
    assert traffic.problem == "AlertOfficers: AssertionError('no such answer')"


def test_a_sender_in_reserve_that_fails_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Worked()
    monkeypatch.setattr("loadtest.load.senders.Sender.run", lambda _: (_ for _ in ()).throw(KeyError("amap")))
    reserve(traffic)
    gevent.sleep(0)
    gevent.sleep(0)
    assert traffic.problem == "a sender: KeyError('amap')"


def test_what_the_feeder_says_and_nobody_understands_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Worked()
    traffic.all_made, traffic.filled = False, Event()
    traffic._peer = cast(Any, None)
    monkeypatch.setattr("loadtest.load.traffic.receive", lambda _: {"what": 1})
    traffic._listen()
    assert traffic.problem == "what the feeder says is not understood: KeyError('known')"


def test_an_action_that_the_desk_refuses_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Desk:
        def __init__(self, *_: object) -> None:
            pass

        def ask(self, *_: object) -> None:
            raise Refused(403, "not-for-you")

        def close(self) -> None:
            pass

    monkeypatch.setattr(desk, "Connection", Desk)
    traffic = Worked()
    assert desk.Officers(traffic)._ask("POST", "/v1/alerts", "/v1/alerts", {}, 1.0, (201,)) is None
    assert traffic.recorder.counted("actions not taken") == 1


def test_requests_that_are_dropped_when_a_run_is_broken_off_were_not_due() -> None:
    traffic = Worked()
    traffic.turns, traffic.waiting, traffic._number = PriorityQueue(), 0, 0
    request = Request(1.0, "amap", "json", None, 10, b"[]")
    traffic.recorder.count("pings due", 20, 1.0)
    traffic.put(request, 1.0)
    traffic.cease()
    traffic.put(request, 2.0, tries=1)
    assert traffic.recorder.counted("pings due") == 0
