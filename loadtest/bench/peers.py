"""Others beside us: the same pings, the same rings, who was newly told compared pair by pair.

    ours, machine    decoded columns -> shard machine -> pushes                                    one core
    ours, flow       bytes of log entries -> Bytewax -> shard machine -> bytes of queue entries    one core
    bytewax          the flow anybody would write first: an item a ping, keyed by device, h3 and dicts
    valkey_geo       GEOADD of every ping, GEOSEARCH for every alert and second
    tile38           SET of every ping, one NEARBY ... FENCE for every alert
    numpy            every ping of a batch against every alert, as matrices
    numpy_h3         and the H3 cell of every device is kept, as we do

Alerts are published and every phone is seen once before the time runs; measured are their second pings. None of these
is late: not every peer knows what to do with those.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from geoindex.columns import E7
from loadtest.bench import peer_bytewax, peer_numpy, peer_ours, peer_tile38, peer_valkey
from loadtest.bench.brute_force import BruteForce, distance_km
from loadtest.bench.flow import pairs
from loadtest.bench.live import Told
from loadtest.bench.peer import PeerRun, Workload
from loadtest.bench.report import Report, Say
from loadtest.bench.sender import observed_now
from loadtest.bench.traffic import ALERT_COUNT, BATCH_PINGS, OFFLINE_MS, Traffic, active_alerts

Peer = Callable[[Workload], PeerRun | None]

PEERS: dict[str, Peer] = {
    "numpy": peer_numpy.run,
    "numpy_h3": peer_numpy.run_with_cells,
    "bytewax": peer_bytewax.run,
    "valkey_geo": peer_valkey.run,
    "tile38": peer_tile38.run,
}


def measure(devices: int, pings: int, repeats: int, say: Say, alert_count: int = ALERT_COUNT) -> Report:
    """`pings`: measured, at most one of each device. `repeats`: of ours and of the fast peers; slow ones run once."""
    if pings > devices:
        raise ValueError(f"pings: at most one of each of the {devices} devices, got {pings}")
    report = Report("peers")
    workload = _workload(devices, pings, repeats, alert_count)
    say(f"{devices:,} devices, {pings:,} pings, {len(workload.owed):,} newly told pairs owed")
    runs: dict[str, PeerRun] = {}
    _run_ours(report, workload, runs, say)
    for name, peer in PEERS.items():
        gc.collect()
        run = peer(workload)
        if run is None:
            report.notes.append(f"{name}: not there, not measured ({peer_tile38.ABSENT})")
            continue
        runs[name] = run
        say(run.line(name))
        _compare(report, workload, name, run)
    _run_ours(report, workload, runs, say)
    ratios = {
        name: runs[f"ours_{run.compared_with}"].pings_per_s / run.pings_per_s
        for name, run in runs.items()
        if run.compared_with
    }
    report.values = {
        "min_ratio": min(ratios.values()),
        "ratios": ratios,
        "pings_per_s": {name: run.pings_per_s for name, run in runs.items()},
        "cores": {name: run.cores for name, run in runs.items()},
        "pairs_owed": len(workload.owed),
        "pairs_matched": {name: len(run.told & workload.owed) for name, run in runs.items()},
        "pairs_differing": {name: len(run.told ^ workload.owed) for name, run in runs.items()},
        "devices": devices,
        "alerts": alert_count,
        "pings": pings,
        "batch_pings": BATCH_PINGS,
        "repeats": repeats,
    }
    report.notes.append("Every phone was seen twice where it was first, and so had settled, before the pings measured.")
    for name, run in runs.items():
        beside = f" Compared with our {run.compared_with}." if run.compared_with else ""
        report.notes.append(f"{name}: {run.words}{beside}")
    return report


def _run_ours(report: Report, workload: Workload, runs: dict[str, PeerRun], say: Say) -> None:
    """Ours, before the others and again after them: the slower one counts, in case the machine changed meanwhile."""
    for name, run in (("ours_machine", peer_ours.run_machine), ("ours_flow", peer_ours.run_flow)):
        gc.collect()
        ours = run(workload)
        say(ours.line(name))
        if ours.told != workload.owed:
            report.faults.append(f"{name}: told pairs differ from brute force: {_difference(workload, ours)}")
        if name not in runs or ours.pings_per_s < runs[name].pings_per_s:
            runs[name] = ours


def _workload(devices: int, pings: int, repeats: int, alert_count: int) -> Workload:
    traffic = Traffic(devices)
    alerts = active_alerts(traffic.world, alert_count, OFFLINE_MS)
    expected = BruteForce(alerts, devices)
    expected.publish()
    first = []
    for sent in traffic.first_sight(OFFLINE_MS):
        first.append(replace(sent, pings=observed_now(sent.pings, sent.at_ms)))
        expected.apply(first[-1])
    told_first = expected.told.copy()
    measured = []
    owed: set[Told] = set()
    for sent in traffic.batches(pings):
        measured.append(replace(sent, pings=observed_now(sent.pings, sent.at_ms)))
        owed.update(pairs(traffic.world, alerts, *expected.apply(measured[-1])))
    return Workload(traffic, alerts, first, measured, told_first, owed, repeats)


def _compare(report: Report, workload: Workload, name: str, run: PeerRun) -> None:
    """A peer may differ within its own rounding of distances, near a ring's edge, and nowhere else."""
    if run.told == workload.owed:
        return
    worst_m = _worst_m(workload, run.told ^ workload.owed)
    words = f"{_difference(workload, run)}, all within {worst_m:.2f} m of the ring's edge"
    if worst_m > run.edge_m:
        report.faults.append(f"{name}: {words}; its rounding explains {run.edge_m:g} m")
    else:
        report.notes.append(f"{name}: differs where it rounds: {words}")


def _difference(workload: Workload, run: PeerRun) -> str:
    return f"{len(workload.owed - run.told)} pairs missed, {len(run.told - workload.owed)} too many"


def _worst_m(workload: Workload, differing: set[Told]) -> float:
    """How far from the ring's edge the pairs are, at most, by the phones' measured pings; infinity for strangers."""
    alerts = {active.alert.alert_id: active for active in workload.alerts}
    places: dict[tuple[str, str], tuple[float, float]] = {}
    wanted = {(partner, device_id) for _, partner, device_id in differing}
    names = workload.traffic.world.partner_names
    for sent in workload.measured:
        for row, partner in enumerate(sent.pings.partner.tolist()):
            key = (names[partner], sent.pings.device_id(row))
            if key in wanted:
                places[key] = (sent.pings.lat_e7[row] / E7, sent.pings.lng_e7[row] / E7)
    worst_m = 0.0
    for alert_id, partner, device_id in differing:
        place = places.get((partner, device_id))
        if place is None:
            return float("inf")
        active = alerts[alert_id]
        away_km = distance_km(active.alert.lat, active.alert.lng, np.array([place[0]]), np.array([place[1]]))[0]
        worst_m = max(worst_m, abs(float(away_km) - active.ring_km) * 1000)
    return worst_m
