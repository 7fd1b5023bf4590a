"""The master's work, or that of a Locust that runs alone: one run from its preparation to its report.

prepare -> fill -> begin ─────────── load ───────────> drain -> collect -> audit -> report -> exit code
                      watch, once a second; steps up, or ends at the first limit that breaks
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent
import orjson
from gevent.event import Event

from flows.log import LogId
from loadtest.load.account import Account, audit_of, no_audit
from loadtest.load.deployment import Deployment
from loadtest.load.limits import Limit, read_thresholds
from loadtest.load.recorder import Recorder
from loadtest.load.report import write_report
from loadtest.load.spec import RunSpec
from loadtest.load.steps import Stepper
from loadtest.load.verdict import summarise
from loadtest.load.watch import Sample, Watch
from loadtest.load.worker import BEGIN, CEASE, FINISH, PREPARE, SEEN

logger = logging.getLogger(__name__)
Say = Callable[[str], None]

FILL_TIMEOUT_S = 3600.0
WORKER_TIMEOUT_S = 30.0
"""A worker that has said nothing for so long is gone: it speaks every second."""
BEGIN_IN_S = 1.0
"""The beginning is said so long before it comes: every worker has heard of it by then."""
DRAIN_S_MAX = 300.0
"""What was let in has arrived by then, also after the step that was too much; else nobody could vouch for the rest."""
DRAIN_BLIND_S = 5.0
"""Without a look at the queues."""
SAMPLE_EVERY_S = 1.0
TELL_EVERY_S = 10.0
BEGUN_FILE, FAULTS_FILE, REPORT_FILE = "begun.json", "faults.json", "report.json"


class Conductor:
    """One run."""

    def __init__(
        self,
        environment: Any,
        spec: RunSpec,
        deployment: Deployment,
        deployment_path: Path | None,
        out: Path,
        compare: Path | None = None,
        audits: bool = True,
        say: Say = print,
    ) -> None:
        self._environment, self.spec, self._deployment = environment, spec, deployment
        self._out, self._compare, self._audits, self._say = out, compare, audits, say
        self._watch = Watch(deployment, deployment_path)
        self.recorder = Recorder()
        self.samples: list[Sample] = []
        self.finished = False
        """The report is written, or cannot be."""
        self.problem: str | None = None
        self.limits: list[Limit] = read_thresholds()[1]
        self._stepper = None if spec.stepping is None else Stepper(spec.stepping, self.limits)
        self._workers: dict[int, dict[str, Any]] = {}
        self._heard_s: dict[int, float] = {}
        self._count = 1
        self._begin_ms = 0.0
        self._stopped = Event()
        environment.runner.register_message(SEEN, self._seen)

    # ---- from outside

    def start(self) -> None:
        """The run, in a greenlet of its own."""
        self._environment.process_exit_code = 1  # until a report says otherwise
        self._greenlet = gevent.spawn(self._run)

    def stop(self, timeout_s: float = 600.0) -> None:
        """Somebody has had enough: drain, and make the report of what there is."""
        self._stopped.set()
        self._greenlet.join(timeout_s)

    def _seen(self, environment: Any, msg: Any, **_: object) -> None:
        seen = msg.data
        self._workers[seen["index"]] = seen
        self._heard_s[seen["index"]] = time.monotonic()
        self.recorder.merge(seen["record"], seen["index"])

    def _run(self) -> None:
        try:
            self._conduct()
        except Exception as problem:
            logger.exception("the run has failed")
            self.problem = f"{type(problem).__name__}: {problem}"
        finally:
            if self.problem is not None:
                self._say(f"FAILED: {self.problem}")
                self._environment.process_exit_code = 1
            self.finished = True

    # ---- the run

    def _conduct(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        self._prepare()
        self._begin()
        ended_s = self._load()
        drained_s = self._drain()
        self._collect()
        faults = self._faults()
        account = self._account()
        found = summarise(
            self.spec,
            self.recorder,
            self.samples,
            account,
            faults=faults,
            stepper=self._stepper,
            workers=self._count,
            filled=sum(seen["known"] for seen in self._workers.values()),
            load_s=ended_s,
            drain_s=drained_s,
            begin_ms=self._begin_ms,
            problem=self.problem,
        )
        self._environment.process_exit_code = write_report(found, self._out, self._compare, self._say)

    def _prepare(self) -> None:
        runner = self._environment.runner
        clients = sorted(getattr(runner, "clients", {}) or [None], key=str)
        self._count = len(clients)
        for index, client_id in enumerate(clients):
            fields = {
                "spec": self.spec.to_json(),
                "deployment": self._deployment.to_json(),
                "index": index,
                "count": self._count,
            }
            runner.send_message(PREPARE, fields, client_id)
        told_s, deadline_s = time.monotonic(), time.monotonic() + FILL_TIMEOUT_S
        while not self._all(lambda seen: bool(seen["filled"])):
            self._check_workers()
            if self._stopped.is_set():
                raise RuntimeError("stopped before the load began")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the deployment must know every phone within {FILL_TIMEOUT_S:.0f} s")
            if time.monotonic() - told_s > TELL_EVERY_S:
                told_s = time.monotonic()
                known = sum(seen["known"] for seen in self._workers.values())
                self._say(f"{known:,} of {self.spec.phones:,} phones are known ...")
            gevent.sleep(0.1)
        self._check_workers()
        known = sum(seen["known"] for seen in self._workers.values())
        self._say(f"{known:,} phones are known; waiting until the flow has caught up ...")
        self._wait_caught_up()

    def _wait_caught_up(self) -> None:
        deadline_s = time.monotonic() + FILL_TIMEOUT_S
        heads = self._watch.heads()
        while not self._watch.is_done(heads):
            if self._stopped.wait(0.2):
                return
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the flow must catch up within {FILL_TIMEOUT_S:.0f} s")

    def _begin(self) -> None:
        self._begin_ms = time.time() * 1000 + BEGIN_IN_S * 1000
        begun = {"begin_ms": self._begin_ms, "seconds": self.spec.seconds}
        (self._out / BEGUN_FILE).write_bytes(orjson.dumps(begun))
        self._tell_all(BEGIN, {"begin_ms": self._begin_ms})
        self._watch.sample()  # where rates begin
        self._say(f"The load begins: {self.spec.seconds:,.0f} s")

    def now_s(self) -> float:
        return time.time() - self._begin_ms / 1000

    def _load(self) -> float:
        """Until the plan is played, a limit broke, or somebody said stop; when that was."""
        next_s, told_s = 0.0, 0.0
        while (now_s := self.now_s()) < self.spec.seconds:
            if self._stopped.wait(max(0.0, next_s - now_s)):
                self._say("stopped; what there is goes into the report")
                break
            next_s = max(next_s + SAMPLE_EVERY_S, self.now_s())
            self._check_workers()
            if self.problem is not None:
                break
            self._sample()
            if self._stepper is not None and self._stepper.look(self.now_s(), self.recorder, self.samples):
                self._say(f"step {self._stepper.step + 1} broke: {self._stepper.words()}")
                break
            if self.now_s() - told_s >= TELL_EVERY_S:
                told_s = self.now_s()
                self._say(self._line())
        ended_s = max(0.0, min(self.now_s(), self.spec.seconds))
        if ended_s < self.spec.seconds:
            self._tell_all(CEASE, {})
        return ended_s

    def _sample(self) -> None:
        sample = self._watch.sample()
        self.samples.append({"at_s": round(self.now_s(), 2), **sample})

    def _line(self) -> str:
        sample = self.samples[-1] if self.samples else {}
        until_s = int(self.now_s()) - 2
        accepted = self.recorder.counted("pings accepted", until_s - 5, until_s) / 5
        words = [f"{self.now_s():5.0f} s: {accepted:,.0f} pings/s accepted"]
        if "lag_ms" in sample:
            words.append(f"lag {sample['lag_ms']:,.0f} ms")
        words.append(f"{self.recorder.counted('devices told'):,} devices told")
        if sample.get("cores"):
            words.append("cores " + " ".join(f"{role} {used:.2f}" for role, used in sample["cores"].items()))
        if self._stepper is not None:
            words.append(f"step {self._stepper.step + 1}: {self._stepper.rate:,.0f}/s")
        return ", ".join(words)

    def _drain(self) -> float:
        """Until everything on its way has arrived; how long that took. What has not is a problem of the run."""
        self._say("no more pings; waiting until everything has arrived ...")
        started_s = time.monotonic()
        heads: list[LogId] | None = None
        while not self.problem:
            gevent.sleep(SAMPLE_EVERY_S)
            self._sample()
            self._check_workers()
            waits_for = "requests that were due"
            if self._all(lambda seen: bool(seen["idle"])):
                heads = heads or self._watch.heads()  # of all that was sent; others may go on
                waits_for = self._missing(heads, started_s)
            if not waits_for:
                break
            if time.monotonic() - started_s > DRAIN_S_MAX:
                self.problem = f"not everything had arrived after {DRAIN_S_MAX:.0f} s: {waits_for}"
        return time.monotonic() - started_s

    def _missing(self, heads: list[LogId] | None, started_s: float) -> str:
        """What has not arrived yet, in words; empty: everything has."""
        if heads == []:  # nobody to ask
            return "pushes, maybe" if time.monotonic() - started_s < DRAIN_BLIND_S else ""
        if not self._watch.is_done(heads):
            return "the flow has not worked through what the logs held when the load ended"
        slow = set(self.spec.plays.slow_partners)
        unread = self.samples[-1].get("unread", {})
        names = [name for name in unread if unread[name] and name not in slow and name in self._deployment.partners]
        return f"pushes that their partners have not taken: {', '.join(names)}" if names else ""

    def _collect(self) -> None:
        self._tell_all(FINISH, {})
        deadline_s = time.monotonic() + WORKER_TIMEOUT_S
        while not self._all(lambda seen: bool(seen["last"])):
            if time.monotonic() > deadline_s:
                self.problem = self.problem or "a worker has not said its last: what it has seen is not all here"
                return
            gevent.sleep(0.05)

    def _account(self) -> Account:
        if not self._audits:
            return no_audit("it was not asked for (--no-audit)", is_wanted=True)
        if self._deployment.valkey is None:
            return no_audit("the deployment file names no valkey: nothing can be compared", is_wanted=False)
        self._say("asking the audit: who was owed what, and who was told ...")
        return audit_of(self._deployment.valkey, self._deployment.var)

    def _faults(self) -> list[dict[str, Any]]:
        """What was killed meanwhile, by whoever did it. Fewer than planned is a problem of the run."""
        wanted = self.spec.plays.kills
        if not wanted:
            return []
        try:
            found: list[dict[str, Any]] = orjson.loads((self._out / FAULTS_FILE).read_bytes())
        except (OSError, ValueError):
            found = []
        if len(found) < len(wanted) and not self._stopped.is_set():
            self.problem = self.problem or f"{len(wanted)} processes were to be killed, and {len(found)} were"
        return found

    # ---- workers

    def _all(self, holds: Callable[[dict[str, Any]], bool]) -> bool:
        return len(self._workers) >= self._count and all(map(holds, self._workers.values()))

    def _check_workers(self) -> None:
        for index, seen in self._workers.items():
            problem = seen["problem"]
            silent_s = time.monotonic() - self._heard_s[index]
            if problem is None and silent_s > WORKER_TIMEOUT_S:
                problem = f"has said nothing for {silent_s:.0f} s"
            if problem is not None and self.problem is None:
                self.problem = f"worker {index}: {problem}"
                if not self._begin_ms:
                    raise RuntimeError(self.problem)

    def _tell_all(self, kind: str, fields: dict[str, Any]) -> None:
        runner = self._environment.runner
        for client_id in sorted(getattr(runner, "clients", {}) or [None], key=str):
            runner.send_message(kind, fields, client_id)


def describe(spec: RunSpec, deployment: Deployment) -> str:
    """What a run is about to do, before it does it."""
    plays = spec.plays
    alerts = sum(wave.count for wave in plays.waves)
    length = f"{spec.seconds / 60:g} min" if spec.seconds >= 60 else f"{spec.seconds:g} s"
    lines = [f"{plays.name}: {plays.about}"]
    if spec.stepping is not None:
        steps = asdict(spec.stepping)
        lines.append(
            f"  stepping up from {steps['from_per_s']:,.0f} pings/s, times {steps['factor']:g} every "
            f"{steps['step_s']:g} s, until a limit breaks (at most {length})"
        )
    else:
        lines.append(f"  {spec.phones:,} phones, {spec.pings_per_s:,.0f} pings/s, {alerts} alerts, {length}")
    if spec.pings_file is not None:
        lines.append(f"  pings from {spec.pings_file}, {spec.warp:g} times as fast as recorded")
    where = "a system of its own on this machine" if deployment.is_local else deployment.gateway
    lines.append(f"  against {where}; partners: {', '.join(deployment.partners)}")
    for kill in plays.kills:
        lines.append(f"  kills {kill.role} {kill.at * spec.seconds:.0f} s into the load")
    lines.append("  then the audit: missed, extra, duplicate, unretracted; anything but zero fails the run")
    return "\n".join(lines)
