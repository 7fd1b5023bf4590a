"""What Locust is told: users, the shape of the load, options, who conducts a run. `loadtest/locustfile.py` is its face.

A user is a *connection* or a program, not a phone: columns are made elsewhere (`loadtest.load.feeder`). How many there
are is the scenario's; the rate is the plan's. So Locust's own numbers of users and spawn rate do not apply.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, cast

import gevent
from locust import LoadTestShape, User, events, task
from locust.runners import MasterRunner, WorkerRunner

from loadtest.load.conductor import Conductor, describe
from loadtest.load.officers import Officers
from loadtest.load.onlookers import MapApp, Operator
from loadtest.load.options import add_locust_options, deployment_of, spec_of
from loadtest.load.readers import read_all
from loadtest.load.scenarios import Scenario, scenario_called
from loadtest.load.senders import Sender
from loadtest.load.worker import Worker

logger = logging.getLogger(__name__)

STATE: dict[str, Any] = {"worker": None, "conductor": None, "number": 0}
"""Of this process: `Worker` where there are users, `Conductor` where a run is conducted, users so far."""


def _number() -> int:
    STATE["number"] += 1
    return int(STATE["number"])


class _RunUser(User):
    """Waits for the run that begins, plays its part, and rests until Locust ends it."""

    abstract = True

    @task
    def play(self) -> None:
        traffic = STATE["worker"].wait()
        traffic.play(type(self).__name__, self.part)
        traffic.ended.wait()
        while True:  # until Locust ends it
            gevent.sleep(3600)

    def part(self, traffic: Any) -> None:
        raise NotImplementedError


class PartnerSender(_RunUser):
    """A connection on which partners send pings: to the gateway, or to the logs."""

    def part(self, traffic: Any) -> None:
        Sender(traffic).run()


class PartnerReaders(_RunUser):
    """One program for each partner that takes pushes and acknowledges them."""

    def part(self, traffic: Any) -> None:
        read_all(traffic, _number())


class AlertOfficers(_RunUser):
    """Everybody at the desk: publishes, edits, closes."""

    def part(self, traffic: Any) -> None:
        if traffic.deployment.officer is None:
            logger.warning("the deployment file names no officer: no alerts, nobody is told anything")
        else:
            Officers(traffic).run()


class PageOperator(_RunUser):
    """An operator with the live view open."""

    def part(self, traffic: Any) -> None:
        Operator(traffic, _number()).run()


class FeedReader(_RunUser):
    """A map app that polls the public feeds."""

    def part(self, traffic: Any) -> None:
        MapApp(traffic, _number()).run()


def user_counts(scenario: Scenario, workers: int) -> dict[type[User], int]:
    """How many of each, over all workers."""
    return {
        PartnerSender: scenario.connections * workers,
        PartnerReaders: 1,
        AlertOfficers: 1,
        PageOperator: scenario.operators,
        FeedReader: scenario.map_apps,
    }


class ScenarioShape(LoadTestShape):
    """All users at once, until the report of the run is written."""

    def tick(self) -> tuple[int, float] | None:
        conductor = STATE["conductor"]
        if conductor is not None and conductor.finished:
            return None
        total = sum(user.fixed_count for user in user_counts(scenario_called("steady"), 1))
        return total, float(total)


def _options(parser: Any, **_: object) -> None:
    add_locust_options(parser)


def _init(environment: Any, runner: Any, **_: object) -> None:
    """Before any run: users' numbers, and the worker's listeners."""
    _count_users(environment)
    if not isinstance(runner, MasterRunner):
        STATE["worker"] = Worker(environment)


def _count_users(environment: Any) -> None:
    workers = 1
    if isinstance(environment.runner, MasterRunner):
        workers = max(environment.runner.worker_count, environment.parsed_options.expect_workers or 1)
    scenario = scenario_called(environment.parsed_options.scenario)
    for user, count in user_counts(scenario, workers).items():
        user.fixed_count = count


def _test_start(environment: Any, **_: object) -> None:
    if isinstance(environment.runner, WorkerRunner):
        return
    options = environment.parsed_options
    try:
        spec = spec_of(options, options.scenario)
        deployment, path = deployment_of(options)
    except ValueError as problem:
        _say(f"cannot begin: {problem}")
        environment.process_exit_code = 2
        STATE["conductor"] = _Refused()
        return
    if not os.environ.get("TUANYUAN_LOADTEST_TOLD"):  # whoever started this has said it already
        _say(describe(spec, deployment))
    conductor = Conductor(
        environment,
        spec,
        deployment,
        path,
        Path(options.out),
        None if options.compare is None else Path(options.compare),
        not options.no_audit,
        _say,
    )
    STATE["conductor"] = conductor
    conductor.start()


def _test_stopping(environment: Any, **_: object) -> None:
    """Somebody stops the run early: its report is made while there are users to drain the queues."""
    conductor = STATE["conductor"]
    if conductor is not None and not conductor.finished:
        conductor.stop()


def _test_stop(environment: Any, **_: object) -> None:
    STATE["conductor"] = None  # the next run, if there is one, has its own
    if STATE["worker"] is not None:
        STATE["worker"].end()


def _quitting(environment: Any, **_: object) -> None:
    if STATE["worker"] is not None:
        STATE["worker"].end()


class _Refused:
    """In a conductor's place: there is nothing to run."""

    finished = True

    def stop(self) -> None:
        pass


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


for _hook, _listener in (
    (events.init_command_line_parser, _options),
    (events.init, _init),
    (events.test_start, _test_start),
    (events.test_stopping, _test_stopping),
    (events.test_stop, _test_stop),
    (events.quitting, _quitting),
):
    cast(Any, _hook).add_listener(_listener)
