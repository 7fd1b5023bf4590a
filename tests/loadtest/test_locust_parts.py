"""Load tests without a load: plans, histograms, open-loop accounting, verdicts from canned figures, comparisons."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pytest
from gevent.event import Event
from gevent.queue import PriorityQueue
from geventhttpclient.response import HTTPSocketResponse

from geoindex.columns import PingBatch
from loadtest.load import onlookers
from loadtest.load.account import Account, no_audit
from loadtest.load.compare import compared, table
from loadtest.load.deployment import Deployment
from loadtest.load.feeder import BODIES, Feeder
from loadtest.load.frames import Request
from loadtest.load.histogram import Histogram, bound_ms, bucket_of
from loadtest.load.http import Refused
from loadtest.load.limits import read_thresholds
from loadtest.load.plan import END_PART, RatePlan, Stepping, actions_of, arrivals
from loadtest.load.probes import due_ms_of, probe_id
from loadtest.load.recorder import Recorder
from loadtest.load.report import write_report
from loadtest.load.scenarios import FORMATS, SCENARIOS, Stream, Wave, scenario_called
from loadtest.load.senders import GIVE_UP_S, LATE, Sender
from loadtest.load.sources import joined, one_ping, renamed
from loadtest.load.spec import RunSpec
from loadtest.load.steps import Stepper, busiest
from loadtest.load.traffic import Traffic, Turn
from loadtest.load.verdict import summarise
from loadtest.world import DEFAULT_PARTNERS

CLEAN = Account(
    dict.fromkeys(("missed", "extra", "duplicate", "unretracted", "out_of_order", "displaced", "undecodable"), 0),
    pushes=100,
    owed=100,
    pings=1_000,
    complete=True,
)
DEPLOYMENT = Deployment("http://127.0.0.1:1", {partner.name: "ty_key" for partner in DEFAULT_PARTNERS})


# ---- scenarios and plans


def test_every_scenario_of_the_list_is_there() -> None:
    assert list(SCENARIOS) == [
        *("steady", "rush-hour", "alert-storm", "big-city", "growth-at-the-hour", "slow-partner", "crash", "soak"),
    ]


def test_an_unknown_scenario_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"^scenario must be one of steady, rush-hour, .*, got 'storm'$"):
        scenario_called("storm")


def test_scenarios_use_every_way_to_send_pings_and_partners_of_the_world() -> None:
    for scenario in SCENARIOS.values():
        assert {stream.format for stream in scenario.streams} == set(FORMATS)
        assert {stream.partner for stream in scenario.streams} == {partner.name for partner in DEFAULT_PARTNERS}


def test_an_alert_storm_is_fifty_alerts_in_a_minute_however_long_the_run() -> None:
    for minutes in (2.0, 60.0):
        actions = RunSpec.of("alert-storm", minutes=minutes).actions()
        published = [action.due_s for action in actions if action.kind == "publish"]
        assert len(published) == 50
        assert max(published) - min(published) < 60


def test_half_of_a_wave_is_edited_and_all_is_closed_before_the_run_ends() -> None:
    actions = actions_of((Wave(10, 0.1, 0.5, edited=0.5, lasts=0.9),), 100.0, seed=3)
    kinds = [action.kind for action in actions]
    assert (kinds.count("publish"), kinds.count("edit"), kinds.count("close")) == (10, 5, 10)
    assert max(action.due_s for action in actions) <= END_PART * 100
    for number in range(10):
        own = [action for action in actions if action.number == number]
        assert [action.kind for action in own] in (["publish", "close"], ["publish", "edit", "close"])
        assert 10 <= own[0].due_s <= 60


def test_at_the_hour_every_child_has_been_missing_for_exactly_an_hour() -> None:
    spec = RunSpec.of("growth-at-the-hour", minutes=2)
    assert {action.missing_since_s for action in spec.actions()} == {0.6 * 120 - 3600}
    assert all(action.due_s < 0.6 * 120 for action in spec.actions() if action.kind == "publish")


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    first, again, other = (RunSpec.of("steady", seed=seed).actions() for seed in (1, 1, 2))
    assert first == again != other


def test_pings_of_a_rate_that_rises_are_the_area_under_its_line() -> None:
    plan = RatePlan(((0.0, 0.0), (10.0, 100.0), (20.0, 100.0)))
    assert [plan.rate_at(at) for at in (0.0, 5.0, 10.0, 15.0, 30.0)] == [0.0, 50.0, 100.0, 100.0, 100.0]
    assert [plan.pings_until(at) for at in (0.0, 5.0, 10.0, 20.0, 25.0)] == [0.0, 125.0, 500.0, 1500.0, 2000.0]


def test_a_staircase_rises_by_its_factor_and_holds_between() -> None:
    stepping = Stepping(100.0, factor=2.0, step_s=10.0, steps_max=3)
    plan = RatePlan.of_steps(stepping)
    assert [plan.rate_at(at) for at in (0.0, 9.9, 10.0, 19.9, 20.0, 29.0)] == [100, 100, 200, 200, 400, 400]
    assert plan.pings_until(30.0) == 7_000
    assert [stepping.step_at(at) for at in (0.0, 9.9, 10.0, 99.0)] == [0, 0, 1, 2]


@pytest.mark.parametrize("fields", [{"factor": 1.0}, {"from_per_s": 0.0}, {"step_s": 0.5}, {"steps_max": 0}])
def test_a_staircase_that_leads_nowhere_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^stepping: {next(iter(fields))} cannot be"):
        Stepping(**{"from_per_s": 1.0, **fields})


def test_arrivals_come_at_their_rate_and_not_evenly() -> None:
    moments = arrivals(random.Random(1), 50.0, 0.0, 100.0)
    assert 4_700 < len(moments) < 5_300
    gaps = np.diff(moments)
    assert 0.9 < float(gaps.std() / gaps.mean()) < 1.1  # of a Poisson process: 1


def test_a_run_travels_as_json() -> None:
    spec = RunSpec.of("crash", phones=10, minutes=0.5, stepping=Stepping(5.0))
    assert RunSpec.from_json(orjson.loads(orjson.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"phones": 0}, "phones must be at least 1, got 0"),
        ({"minutes": 0.01}, "seconds must be at least 2, got 0.6"),
        ({"warp": 0.0}, "warp must be above 0, got 0.0"),
    ],
)
def test_a_run_that_cannot_be_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$"):
        RunSpec.of("steady", **fields)


# ---- histograms


def test_a_histogram_tells_every_percentile_to_one_percent() -> None:
    values = np.random.default_rng(1).lognormal(3.0, 1.5, 5_000)
    histogram = Histogram()
    for value in values.tolist():
        histogram.add(value)
    for share in (0.01, 0.5, 0.9, 0.99, 0.999, 1.0):
        exact = float(np.sort(values)[int(np.ceil(share * len(values))) - 1])
        found = histogram.percentile_ms(share)
        assert found is not None
        assert exact <= found * (1 + 1e-6)
        assert found <= exact * 1.0101


def test_a_bucket_holds_what_is_above_the_last_ones_bound() -> None:
    for bucket in (0, 1, 2, 700, 1_500):
        assert bucket_of(bound_ms(bucket)) == bucket
        assert bucket_of(bound_ms(bucket) * 1.001) == bucket + 1


def test_nothing_has_no_percentiles() -> None:
    assert Histogram().percentile_ms(0.5) is None
    assert Histogram().summary_ms() == {}


# ---- what is recorded


def test_recorders_of_workers_add_up_to_one() -> None:
    chance = random.Random(4)
    alone, parts = Recorder(), [Recorder(), Recorder()]
    for number in range(500):
        name, at_s = chance.choice(["a", "b"]), chance.uniform(0, 10)
        latency_ms, failure = chance.expovariate(0.01), chance.choice([None, None, "503"])
        for recorder in (alone, parts[number % 2]):
            recorder.request(name, latency_ms, at_s, failure)
            recorder.count("pings", number, at_s)
            key = ("alert", "alert", number % 3)
            recorder.pushed(key, (number % 7, 0), number, 1000 + number)
    together = Recorder()
    for worker, part in enumerate(parts):
        together.merge(orjson.loads(orjson.dumps(part.take())), worker)
    summed, wanted = together.take(), alone.take()
    assert {kind: sorted(summed[kind]) for kind in summed} == {kind: sorted(wanted[kind]) for kind in wanted}


def test_a_fan_out_is_that_of_the_first_log_entry_of_its_shard() -> None:
    recorder = Recorder()
    key = ("a1", "alert", 0)
    recorder.pushed(key, (2_000, 0), 5, 9_000.0)  # caused by a later ping
    recorder.pushed(key, (1_000, 3), 10, 1_500.0)
    recorder.pushed(key, (1_000, 3), 20, 1_700.0)
    found = recorder.fan_outs[key]
    assert (found.cause, found.first_ms, found.last_ms, found.devices) == ((1_000, 3), 1_500.0, 1_700.0, 30)


def test_reasons_of_failures_are_bounded() -> None:
    recorder = Recorder()
    for number in range(1_000):
        recorder.request("a", 1.0, 0.0, f"reason {number}")
    assert len(recorder.failures["a"]) <= 51
    assert recorder.failures["a"].total() == 1_000


def test_a_probe_says_when_its_ping_was_due() -> None:
    assert due_ms_of(probe_id(1_764_000_000_123.4, 3, 17)) == 1_764_000_000_123
    assert due_ms_of("phone-1764000000123-1") is None
    assert due_ms_of("probe-") is None


# ---- open loop


class VirtualTraffic(Traffic):
    """A worker whose clock goes on only when somebody sleeps or a server works."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.deployment = DEPLOYMENT
        self.turns: PriorityQueue[Turn] = PriorityQueue()
        self.clock_s = 0.0
        self.waiting = self.on_way = self.senders = self._number = 0
        self.all_made = False
        self.ceased = Event()

    def now_s(self) -> float:
        return self.clock_s

    def sleep_until(self, at_s: float) -> None:
        self.clock_s = max(self.clock_s, at_s)

    def fire(self, kind: str, name: str, latency_ms: float, due_s: float, failure: Any = None, length: int = 0) -> None:
        self.recorder.request(f"{kind} {name}", latency_ms, due_s, None if failure is None else str(failure))


class StalledServer:
    """Takes 10 ms for an answer; once, five seconds. Stands in for a connection."""

    def __init__(self, traffic: VirtualTraffic, stalls_at_s: float) -> None:
        self._traffic, self._stalls_at_s = traffic, stalls_at_s
        self.served_ms: list[float] = []
        """What a closed loop would have measured: from sent to answered."""

    def ask(self, *_: object) -> None:
        stalls = self._traffic.clock_s >= self._stalls_at_s
        took_s = 5.0 if stalls else 0.01
        if stalls:
            self._stalls_at_s = float("inf")
        self._traffic.clock_s += took_s
        self.served_ms.append(took_s * 1000)


def request(due_s: float) -> Request:
    return Request(due_s, "amap", "json", None, 10, b"[]")


def test_a_server_that_stalls_shows_in_the_percentiles() -> None:
    """200 requests, due every 0.1 s; the one at 5.0 s is answered 5 s later, and 55 more have waited behind it.

    Request k behind it is sent at 10.0 + 0.01 (k - 1) s and answered 0.01 s later, due at 5 + 0.1 k: it took
    5,000 - 90 k ms, until k = 56 is on time again.
    """
    traffic = VirtualTraffic()
    sender = Sender(traffic)
    server = StalledServer(traffic, 4.999)
    sender._http = cast(Any, server)
    for number in range(200):
        traffic.put(request(round(0.1 * number, 3)), round(0.1 * number, 3))
    for _ in range(200):
        sender._next()
    expected = sorted([10.0] * 144 + [5000.0 - 90 * k for k in range(56)])
    found = traffic.recorder.between("POST /v1/pings [json]", 0, 100)
    assert len(found) == 200
    for share, rank in ((0.5, 100), (0.75, 150), (0.9, 180), (0.99, 198), (1.0, 200)):
        assert found.percentile_ms(share) == pytest.approx(expected[rank - 1], rel=0.011)
    assert [round(expected[rank - 1]) for rank in (100, 150, 180, 198)] == [10, 500, 3_200, 4_820]
    assert np.percentile(server.served_ms, 99) == pytest.approx(10.0)  # what coordinated omission would have reported
    assert traffic.recorder.between(LATE, 0, 100).percentile_ms(1.0) == bound_ms(0)  # nothing of it is the generator's
    assert traffic.recorder.counted("connections busy") == 55
    assert traffic.recorder.counted("pings accepted") == 2_000


def test_lateness_of_the_generator_is_told_apart() -> None:
    traffic = VirtualTraffic()
    sender = Sender(traffic)
    sender._http = cast(Any, StalledServer(traffic, float("inf")))
    traffic.put(request(1.0), 1.0)
    oversleeps = traffic.sleep_until
    traffic.sleep_until = lambda at_s: oversleeps(at_s + 0.3)  # type: ignore[method-assign]
    sender._next()
    assert traffic.recorder.between(LATE, 0, 9).percentile_ms(1.0) == pytest.approx(300.0, rel=0.011)
    assert traffic.recorder.between("POST /v1/pings [json]", 0, 9).percentile_ms(1.0) == pytest.approx(310.0, rel=0.011)


def test_a_request_that_is_refused_is_tried_again_and_counts_from_when_it_was_due() -> None:
    traffic = VirtualTraffic()
    sender = Sender(traffic)
    answers: list[Any] = [Refused(503, "busy", 2.0), Refused(429, "rate-limit", 1.0), None]

    class Server:
        def ask(self, *_: object) -> None:
            traffic.clock_s += 0.1
            if (answer := answers.pop(0)) is not None:
                raise answer

    sender._http = cast(Any, Server())
    traffic.put(request(1.0), 1.0)
    for _ in range(3):
        sender._next()
    name = "POST /v1/pings [json]"
    assert dict(traffic.recorder.failures[name]) == {"503 busy": 1, "429 rate-limit": 1}
    latency_ms = traffic.recorder.between(name, 0, 9).percentile_ms(1.0)
    assert latency_ms is not None
    assert 3_300 <= latency_ms < 3_950  # two pauses of 2 and 1 s, up to a fifth longer, and three answers
    assert (traffic.recorder.counted("pings accepted"), traffic.waiting, traffic.on_way) == (10, 0, 0)


def test_a_request_that_is_refused_for_good_is_given_up_at_once() -> None:
    traffic = VirtualTraffic()
    sender = Sender(traffic)

    class Server:
        def ask(self, *_: object) -> None:
            raise Refused(401, "unauthorized")

    sender._http = cast(Any, Server())
    traffic.put(request(1.0), 1.0)
    sender._next()
    assert list(traffic.recorder.failures["POST /v1/pings [json]"]) == [
        "401 unauthorized",
        "given up: 401 unauthorized",
    ]
    assert traffic.recorder.counted("pings accepted") == traffic.waiting == 0


def test_a_request_is_given_up_when_nobody_takes_it() -> None:
    traffic = VirtualTraffic()
    sender = Sender(traffic)

    class Server:
        def ask(self, *_: object) -> None:
            raise Refused(503, "busy", 10.0)

    sender._http = cast(Any, Server())
    traffic.put(request(1.0), 1.0)
    while traffic.waiting:
        sender._next()
    assert "given up: 503 busy" in traffic.recorder.failures["POST /v1/pings [json]"]
    assert traffic.recorder.counted("pings accepted") == 0
    assert traffic.clock_s <= 1.0 + GIVE_UP_S


# ---- requests made ahead


class FewPings:
    """Ten phones of two partners, each pinging when it is asked."""

    partner_names = ("amap", "zhifu")
    own_per_s = None

    def first_sight(self, now_ms: int) -> Any:
        return iter(())

    def pings(self, from_ms: int, until_ms: int, count: int) -> PingBatch:
        return joined([one_ping(row % 2, f"phone-{row % 10}", 30.0, 120.0, until_ms - 1) for row in range(count)])


def made(spec: RunSpec, deployment: Deployment = DEPLOYMENT) -> list[Request]:
    feeder = Feeder(spec, deployment, 0, 1, lambda _: None, FewPings())
    return [request for _, requests in feeder.slices(1_000_000.0) for request in requests]


def test_every_ping_of_the_plan_is_in_one_request_and_due_within_the_run() -> None:
    spec = RunSpec.of("steady", pings_per_s=200, minutes=0.1)
    requests = made(spec)
    probes = sum(request.body.count(b"probe-") for request in requests if request.encoding is None)
    assert 1_200 <= sum(request.pings for request in requests) <= 1_200 + 24
    assert probes > 0
    assert all(0 <= request.due_s <= 6.0 for request in requests)
    assert {request.partner for request in requests} == {"amap", "zhifu"}


def test_requests_come_at_moments_that_are_drawn_not_at_a_beat() -> None:
    due = [request.due_s for request in made(RunSpec.of("steady", pings_per_s=2_000, minutes=0.1))]
    gaps = np.diff([moment for moment in due if moment > 0.5])
    assert float(gaps.std() / gaps.mean()) > 0.5


def test_without_a_valkey_who_would_write_to_the_logs_sends_columns() -> None:
    formats = {request.partner: request.format for request in made(RunSpec.of("steady", pings_per_s=100, minutes=0.1))}
    assert formats == {"amap": "columns", "zhifu": "columns"}


def test_a_partner_without_a_key_has_no_part_in_the_load() -> None:
    deployment = Deployment("http://127.0.0.1:1", {"amap": "ty_key"})
    assert {request.partner for request in made(RunSpec.of("steady", pings_per_s=100, minutes=0.05), deployment)} == {
        "amap"
    }


def test_a_deployment_without_any_partner_of_the_world_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"must have a key for one of the world's partners \(amap, zhifu\), got others$"
    ):
        made(RunSpec.of("steady"), Deployment("http://127.0.0.1:1", {"others": "ty_key"}))


def test_pings_in_json_and_in_lines_are_what_the_gateway_reads() -> None:
    batch = joined([one_ping(0, "a", 30.25, 120.5, 7), one_ping(0, "b", -1.0, 2.0, 8)])
    rows = [
        {"device_id": "a", "lat": 30.25, "lng": 120.5, "observed_at": 7},
        {"device_id": "b", "lat": -1.0, "lng": 2.0, "observed_at": 8},
    ]
    assert orjson.loads(BODIES["json"](batch)) == rows
    assert [orjson.loads(line) for line in BODIES["ndjson"](batch).splitlines()] == rows


def test_partners_of_a_recording_take_names_that_the_deployment_knows() -> None:
    assert renamed(("default",), ("amap", "ditu")) == ("amap",)
    assert renamed(("ditu", "other"), ("amap", "ditu")) == ("ditu", "amap")
    with pytest.raises(ValueError, match=r"^a recording of 2 partners needs as many accounts, got 1: amap$"):
        renamed(("a", "b"), ("amap",))


def test_a_stream_is_known_by_its_format() -> None:
    assert Stream("amap", "log").encoding is None
    assert Request(0.0, "amap", "log", None, 1, b"").name == "append to log [amap]"


# ---- deployments


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ([], "must be a JSON object, got list"),
        (
            {"gateway": "localhost", "partners": {"a": "k"}},
            "gateway must be a url, http:// or https://, got 'localhost'",
        ),
        ({"gateway": "http://x", "partners": {}}, "partners must be an object of names and keys, got {}"),
        ({"gateway": "http://x", "partners": {"a": "k"}, "key": 1}, "there is no 'key'; there are datums, gateway, "),
    ],
)
def test_a_deployment_file_that_is_none_says_what_is_wrong(fields: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=r"^d\.json: ") as caught:
        Deployment.from_json(fields, "d.json")
    assert str(caught.value).startswith(f"d.json: {problem}")


def test_a_deployment_shows_no_key_and_its_file_is_its_owners_alone(tmp_path: Path) -> None:
    DEPLOYMENT.write(tmp_path / "d.json")
    assert "ty_key" not in repr(DEPLOYMENT)
    assert (tmp_path / "d.json").stat().st_mode & 0o077 == 0
    assert Deployment.read(tmp_path / "d.json") == DEPLOYMENT


# ---- verdicts


def canned(latency_ms: float = 20.0, account: Account = CLEAN, told: int = 2_500, **more: Any) -> dict[str, Any]:
    """A run of 20 s, a request each 0.1 s, two alerts, everything measured."""
    recorder = Recorder()
    for tenth in range(200):
        at_s = tenth / 10
        recorder.request("POST /v1/pings [json]", latency_ms, at_s)
        recorder.request(LATE, 1.0, at_s)
        recorder.request("E2E ping to push", 3 * latency_ms, at_s)
        recorder.count("pings due", 100, at_s)
        recorder.count("pings accepted", 100, at_s)
    recorder.count("devices told", told, 2.1)
    recorder.request("POST /v1/alerts", 50.0, 2.0)
    for number, alert_id in enumerate(("a1", "a2")):
        recorder.published[alert_id] = {"number": number, "due_ms": 2_000.0, "answered_ms": 2_050.0}
        recorder.pushed((alert_id, "alert", 0), (2_010, 0), 500, 2_100.0)
        recorder.pushed((alert_id, "alert", 1), (2_020, 0), 700, 2_400.0 + 100 * number)
    recorder.loads = [
        {"at_s": at, "cores": 0.2, "feeder_cores": 0.5, "rss": 1, "ahead_s": 3.0, "waiting": 0, "worker": 0}
        for at in range(20)
    ]
    samples = [
        {
            "at_s": float(at),
            "lag_ms": 12.0,
            "machine_cores": 1.5,
            "cores": {"flow": 0.3, "gateway": 0.4, "valkey": 0.1},
            "rss": {"flow": 10**8, "gateway": 10**8, "valkey": 10**7},
            "unread": {"amap": 3},
            "pending": {"amap": 1},
            "server_memory": 100,
            "server_memory_max": 1_000,
            "devices": 5_000,
            "alarms": [],
        }
        for at in range(21)
    ]
    spec = RunSpec.of(more.pop("scenario", "steady"), minutes=1 / 3)
    return summarise(spec, recorder, samples, account, **{"load_s": 20.0, **more})


def test_a_clean_run_passes_with_these_figures() -> None:
    found = canned()
    values = found["values"]
    assert found["passed"]
    assert found["generator_saturated"] == []
    assert {name: values[name] for name in ("pings_due_per_s", "pings_per_s", "alerts", "refused_share")} == {
        "pings_due_per_s": 1_000.0,
        "pings_per_s": 1_000.0,
        "alerts": 2.0,
        "refused_share": 0.0,
    }
    for name, wanted in (
        ("ping_request_p99_ms", 20.0),
        ("ping_to_push_p50_ms", 60.0),
        ("alert_first_push_max_ms", 100.0),
        ("alert_last_push_p50_ms", 400.0),
        ("alert_last_push_max_ms", 500.0),
        ("lag_max_ms", 12.0),
        ("server_memory_share", 0.1),
        ("generator_cores", 0.2),
        ("feeder_cores", 0.5),
        ("flow_cores", 0.3),
    ):
        assert values[name] == pytest.approx(wanted, rel=0.011), name
    assert [alert["devices"] for alert in found["alerts"]] == [1_200, 1_200]


def test_a_threshold_that_is_missed_fails_the_run_and_gives_its_reason(tmp_path: Path) -> None:
    said: list[str] = []
    found = canned(latency_ms=1_500.0)
    missed = {verdict["name"] for verdict in found["thresholds"] if verdict["verdict"] == "missed"}
    assert missed == {"ping_request_p99_ms", "ping_to_push_p99_ms"}
    assert write_report(found, tmp_path, None, said.append) == 1
    assert "MISSED ping_request_p99_ms: 1,5" in said[0]
    assert "Answered means on disk." in said[0]
    html = (tmp_path / "report.html").read_text()
    assert "Not passed" in html
    assert "Answered means on disk." in html


def test_a_report_is_one_file_that_asks_nobody_for_anything(tmp_path: Path) -> None:
    said: list[str] = []
    assert write_report(canned(), tmp_path, None, said.append) == 0
    html = (tmp_path / "report.html").read_text()
    assert 'src="data:image/png;base64,' in html
    for outside in ("http://", "https://", "<script", "<link"):
        assert outside not in html
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert {"throughput.png", "latency.png", "lag.png", "queues.png", "memory.png", "cpu.png", "alerts.png"} <= drawn
    assert orjson.loads((tmp_path / "report.json").read_bytes())["passed"] is True


@pytest.mark.parametrize("kind", ["missed", "extra", "duplicate", "unretracted", "out_of_order", "displaced"])
def test_any_fault_of_the_audit_fails_the_run(kind: str, tmp_path: Path) -> None:
    account = Account({**CLEAN.counts, kind: 1}, pushes=100, complete=True)
    found = canned(account=account)
    assert not found["passed"]
    assert write_report(found, tmp_path, None, lambda _: None) == 1


def test_an_audit_that_could_not_look_at_everything_fails_the_run() -> None:
    assert not canned(account=Account(CLEAN.counts, pushes=100, complete=False))["passed"]


def test_a_run_without_audit_fails_loudly_unless_it_was_asked_for() -> None:
    found = canned(account=no_audit("the server is away", is_wanted=False))
    assert not found["passed"]
    assert found["audit"]["line"].startswith("THERE WAS NO AUDIT: the server is away.")
    assert canned(account=no_audit("as asked", is_wanted=True))["passed"]


def test_a_run_that_broke_off_fails() -> None:
    assert not canned(problem="worker 0: gone")["passed"]


def test_a_threshold_of_one_scenario_does_not_judge_another() -> None:
    names = {verdict["name"] for verdict in canned(scenario="crash")["thresholds"]}
    assert "recovery_max_s" in names
    assert "ping_to_push_p99_ms" not in names


def test_recovery_counts_from_the_kill_until_the_flow_has_caught_up() -> None:
    found = canned(scenario="crash", faults=[{"role": "flow", "at_s": 5.2, "took_s": 3.0}])
    assert found["values"]["recovery_max_s"] == pytest.approx(9.0 - 5.2)


def test_a_crash_without_recovery_misses_its_threshold() -> None:
    found = canned(scenario="crash", faults=[{"role": "flow", "at_s": 19.0, "took_s": 60.0}])
    (verdict,) = [one for one in found["thresholds"] if one["name"] == "recovery_max_s"]
    assert verdict["verdict"] == "missed"
    assert not found["passed"]


def test_a_generator_that_was_late_says_so_and_the_run_does_not_pass() -> None:
    recorder_late = canned()
    assert recorder_late["values"]["generator_late_p99_ms"] == pytest.approx(1.0, rel=0.011)
    recorder = Recorder()
    for at in range(20):
        recorder.request(LATE, 400.0, float(at))
    found = summarise(RunSpec.of("steady", minutes=1 / 3), recorder, [], CLEAN, load_s=20.0)
    assert found["generator_saturated"] == ["1 % of the sends were late by 400 ms or more"]
    assert not found["passed"]


def test_every_threshold_has_its_reason_and_looks_at_something_that_is_measured() -> None:
    thresholds, limits = read_thresholds()
    assert all(len(threshold.reason) > 20 for threshold in thresholds)
    assert [limit.name for limit in limits] == [
        *("lag_ms", "behind_s", "request_p99_ms", "refused_share", "server_memory_share", "generator_late_ms"),
    ]
    measured = (
        canned()["values"].keys()
        | canned(scenario="crash", faults=[{"role": "flow", "at_s": 5.0, "took_s": 3.0}])["values"].keys()
    )
    rare = {"hour_to_push_p99_ms", "memory_growth_share_per_h"}
    assert {threshold.name for threshold in thresholds} - measured == rare


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[[threshold]]\nname = "a"\nat_most = 1', "a: a threshold says its reason"),
        ('[[threshold]]\nname = "a"\nreason = "b"', "a: either at_most or at_least, and not both"),
        ('[[threshold]]\nname = "a"\nreason = "b"\nabove = 1', "a: "),
        ("[[threshold", ""),
    ],
)
def test_thresholds_that_are_none_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "thresholds.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match="thresholds") as caught:
        read_thresholds(path)
    assert str(caught.value).startswith(f"{path}: {problem}")


# ---- stepping


def stepped(lag_ms: float, behind: int = 0) -> Stepper:
    """Two steps of 10 s; in the second the flow has this lag, and so many pings are not accepted."""
    stepper = Stepper(Stepping(1_000.0, 2.0, 10.0, 5), read_thresholds()[1])
    recorder, samples = Recorder(), []
    for second in range(20):
        rate = 1_000 if second < 10 else 2_000
        recorder.count("pings due", rate, second)
        recorder.count("pings accepted", rate - (behind if second >= 10 else 0), second)
        recorder.request("POST /v1/pings [json]", 30.0, second)
        recorder.request(LATE, 2.0, second)
        samples.append(
            {
                "at_s": float(second),
                "lag_ms": lag_ms if second >= 10 else 5.0,
                "machine_cores": 1.0,
                "cores": {"flow": 0.99 if second >= 10 else 0.4, "gateway": 0.5},
                "server_memory": 1,
                "server_memory_max": 10,
            }
        )
        if stepper.look(float(second), recorder, samples):
            break
    return stepper


def test_the_step_that_breaks_names_what_gave_way_first_and_who_was_busy() -> None:
    found = stepped(lag_ms=3_000.0).to_json()
    assert (found["held_per_s"], found["broken_per_s"]) == (1_000.0, 2_000.0)
    assert found["gave_way"] == "the flow: it does not keep up with its logs (lag_ms 3,000, limit 2,000)"
    assert found["busiest"] == "no core to spare: flow (0.99 of a core)"


def test_a_machine_without_a_core_to_spare_is_named_with_the_generators_part() -> None:
    cores = {"flow": 0.3, "gateway": 0.6, "generator": 0.1, "feeder": 0.6, "machine": 1.9}
    words = busiest(cores, machine_cores=2)
    assert words == (
        "busiest: gateway 0.60 cores, feeder 0.60 cores, flow 0.30 cores; "
        "1.9 of the machine's 2 cores in use, 0.7 of them by the generator"
    )


def test_requests_that_never_come_back_break_a_step_though_no_latency_is_known() -> None:
    found = stepped(lag_ms=5.0, behind=2_000).to_json()
    assert found["gave_way"].startswith("the way in: requests wait for gateway or Valkey (behind_s ")


def test_steps_that_all_hold_have_no_limit() -> None:
    stepper = stepped(lag_ms=5.0)
    stepper.finish()
    found = stepper.to_json()
    assert (found["held_per_s"], found["broken_per_s"], found["gave_way"]) == (2_000.0, None, "nothing gave way")


def test_a_run_that_told_nobody_fails() -> None:
    found = canned(told=0)
    assert [row["name"] for row in found["thresholds"] if row["verdict"] == "missed"] == ["devices_told"]
    assert not found["passed"]


def test_a_step_that_was_not_played_to_its_end_has_not_held() -> None:
    found = canned(stepper=stepped(lag_ms=0.0), load_s=10.0)
    assert found["values"]["held_pings_per_s"] == 1_000.0


def test_a_stepping_run_passes_when_something_gave_way_and_nobody_was_missed(tmp_path: Path) -> None:
    found = canned(latency_ms=5_000.0, stepper=stepped(lag_ms=3_000.0))
    assert found["passed"]
    assert found["values"]["held_pings_per_s"] == 1_000.0
    said: list[str] = []
    assert write_report(found, tmp_path, None, said.append) == 0
    assert "limit: 1,000 pings/s held" in said[0]
    assert "at 2,000 pings/s gave way first: the flow: it does not keep up with its logs" in said[0]
    assert (tmp_path / "steps.png").exists()


# ---- two runs


def test_two_runs_are_compared_value_by_value() -> None:
    old, new = canned(latency_ms=20.0), canned(latency_ms=40.0)
    found = compared(new, old)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["ping_request_p99_ms"]["mark"] == "worse"
    assert rows["ping_request_p99_ms"]["change"] == pytest.approx(1.0, abs=0.03)
    assert rows["pings_per_s"]["mark"] == ""
    assert found["differs"] == []
    assert "worse" in table(found)
    faster = {row["name"]: row for row in compared(old, new)["rows"]}
    assert faster["ping_request_p99_ms"]["mark"] == "better"


def test_a_comparison_says_what_is_not_the_same() -> None:
    other = canned(scenario="rush-hour")
    differs = compared(canned(), other)["differs"]
    assert differs[0] == "scenario: rush-hour then, steady now"


def test_compare_shows_in_terminal_and_report(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_bytes(orjson.dumps(canned()))
    said: list[str] = []
    write_report(canned(latency_ms=100.0), tmp_path / "new", old, said.append)
    assert any("ping_request_p99_ms" in words and "worse" in words for words in said[1:])
    assert "Compared with an earlier run" in (tmp_path / "new" / "report.html").read_text()


def test_a_file_that_is_no_report_is_named_and_the_run_counts_all_the_same(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("{}")
    said: list[str] = []
    assert write_report(canned(), tmp_path / "new", old, said.append) == 0
    assert said[0] == f"nothing to compare with: {old}: must be a report of a load test, with scenario and values"


def test_an_event_of_the_live_stream_is_there_before_the_next_one() -> None:
    class Socket:
        def __init__(self) -> None:
            body = b"event: hello\ndata: {}\n\n"
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.sent = [head, b"%x\r\n%b\r\n" % (len(body), body), b"0\r\n\r\n"]

        def recv(self, _length: int) -> bytes:
            return self.sent.pop(0)

        def release_socket(self, _socket: object) -> None:
            pass

    socket = Socket()
    stream = onlookers.events(HTTPSocketResponse(socket))
    assert next(stream) == b"event: hello\ndata: {}\n\n"
    assert socket.sent == [b"0\r\n\r\n"]
    assert list(stream) == []
