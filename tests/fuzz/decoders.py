"""Fuzzing with coverage (atheris, libFuzzer): bodies of pings, compressed bodies, entries of logs and queues.

    make fuzz                                         10^7 inputs
    python -m tests.fuzz.decoders --runs 100000       fewer
    python -m tests.fuzz.decoders out/fuzz/crash-…    one input again, say that of a failure

The first byte of an input chooses the decoder. A decoder must raise nothing but what it says, and what it returns must
keep its promises: `TARGETS` says which. Kernels are compiled and so not seen by the coverage; whatever they do wrong is
seen by the checks.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import numpy as np
import zstandard

with atheris.instrument_imports(
    include=["gateway", "flows.wire", "flows.alert_json"],
    exclude=["gateway.ping_kernels", "gateway.datum_kernels", "flows.wire_kernels"],
):
    from flows import wire
    from gateway import compression, ping_bodies

from gateway.datum import Datum
from geoindex.columns import LAT_E7_MAX, LNG_E7_MAX, PingBatch, Push, pack_ids
from geoindex.entries import DEFAULT_SCHEDULE, Alert, AlertClose, AlertRevision, Settings, Tick

NOW_MS = 1_760_000_000_000
TERMS = ping_bodies.Terms(3, Datum.GCJ02, NOW_MS - 1_000_000, NOW_MS + 1_000_000)
ROOM = 1 << 16
OUT = Path("out/fuzz")
INPUT_BYTES_MAX = 2_048
RUNS_PER_PROCESS = 500_000
"""The hooks of atheris keep up to 3 KB for an input of JSON, for good; without them nothing is kept (*measured*)."""


# --- what must hold ---------------------------------------------------------------------------------------------------


def check_body(raw: bytes, format: ping_bodies.Format) -> None:
    """Every ping is accepted or refused, positions rise, what is accepted keeps rule 2, neighbours do not matter."""
    try:
        found = ping_bodies.read_pings(raw, format, TERMS)
    except (compression.MalformedBody, compression.BodyTooLarge):
        return
    pings = found.pings
    assert len(pings) + found.refused == found.received
    assert (np.diff(found.refused_positions) > 0).all()
    assert sum(found.refused_by_reason().values()) == found.refused
    sizes = np.diff(pings.id_end, prepend=np.uint32(0))
    assert ((sizes >= 1) & (sizes <= 64)).all()
    assert (np.abs(pings.lat_e7.astype(np.int64)) <= LAT_E7_MAX).all()
    assert (np.abs(pings.lng_e7.astype(np.int64)) <= LNG_E7_MAX).all()
    assert ((pings.observed_at_ms >= TERMS.oldest_ms) & (pings.observed_at_ms <= TERMS.newest_ms)).all()
    assert (pings.partner == TERMS.partner_index).all()
    for row in range(len(pings)):
        pings.device_id(row)  # UTF-8
    if format is not ping_bodies.Format.COLUMNS:
        spans = ping_bodies._lines(raw) if format is ping_bodies.Format.NDJSON else ping_bodies._elements(raw)
        slowly = ping_bodies._judged(ping_bodies._batch(ping_bodies._one_by_one(raw, *spans), TERMS), TERMS)
        assert same(slowly.pings, pings)
        assert np.array_equal(slowly.refused_positions, found.refused_positions)
        assert np.array_equal(slowly.refused_verdicts, found.refused_verdicts)


def same(one: PingBatch, other: PingBatch) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("partner", "id_bytes", "id_end", "lat_e7", "lng_e7", "observed_at_ms")
    )


def check_compressed(raw: bytes, encoding: compression.Encoding) -> None:
    """No more than there is room for, and what comes out is what another decoder makes of it."""
    try:
        content = compression.decompressed(raw, encoding, ROOM)
    except (compression.MalformedBody, compression.BodyTooLarge):
        return
    assert len(content) <= ROOM
    if encoding is compression.Encoding.GZIP:
        assert gzip.decompress(raw) == content
    else:
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
            assert reader.read() == content


def check_entry(raw: bytes, kind: bytes) -> None:
    """What was understood is written and read again as the same."""
    try:
        entry = wire.decode_entry(kind, raw)
    except wire.MalformedEntry:
        return
    if isinstance(entry, wire.PingColumns):
        batch, refused = wire.screen_pings(entry, 3)
        assert len(batch) + sum(refused.values()) == len(entry)
        again = wire.decode_pings(wire.encode_pings(batch))
        assert same(wire.batch_of(again), batch)
    else:
        assert wire.decode_entry(*wire.encode_entry(entry)) == entry


def check_push(raw: bytes) -> None:
    try:
        push = wire.decode_push(raw)
    except wire.MalformedEntry:
        return
    assert push.kind in ("alert", "update", "resolved")
    assert push.ring_km >= 0


TARGETS: tuple[Callable[[bytes], None], ...] = (
    lambda raw: check_body(raw, ping_bodies.Format.JSON),
    lambda raw: check_body(raw, ping_bodies.Format.NDJSON),
    lambda raw: check_body(raw, ping_bodies.Format.COLUMNS),
    lambda raw: check_compressed(raw, compression.Encoding.GZIP),
    lambda raw: check_compressed(raw, compression.Encoding.ZSTD),
    lambda raw: check_entry(raw, wire.SETTINGS),
    lambda raw: check_entry(raw, wire.PINGS),
    lambda raw: check_entry(raw, wire.PUBLISH),
    lambda raw: check_entry(raw, wire.UPDATE),
    lambda raw: check_entry(raw, wire.CLOSE),
    lambda raw: check_entry(raw, wire.TICK),
    check_push,
)


def one_input(data: bytes) -> None:
    """What libFuzzer calls."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


# --- where it begins --------------------------------------------------------------------------------------------------


def seeds() -> list[bytes]:
    """A good input for every target, and a few that are nearly good."""
    ping: dict[str, Any] = {"device_id": "phone-1", "lat": 30.25, "lng": 120.13, "observed_at": NOW_MS}
    pings = [ping, ping | {"device_id": "乙", "observed_at": "2025-10-09T08:53:20Z"}, ping | {"lat": 95}, None]
    as_json = [json.dumps(one, ensure_ascii=False).encode() for one in pings]
    array, lines = b"[" + b",".join(as_json) + b"]", b"\n".join(as_json)
    ids = pack_ids(["phone-1", "phone-22"])
    two = np.array([1, 2])
    batch = PingBatch(
        two.astype(np.uint16), *ids, two.astype(np.int32), two.astype(np.int32), two.astype(np.int64) + NOW_MS
    )
    alert = Alert("a17", 1, 30.0, 120.0, NOW_MS, DEFAULT_SCHEDULE, NOW_MS + 1, "actual", ("amap",))
    entries: list[Any] = [
        Settings(3, ("amap", "baidu")),
        batch,
        AlertRevision("publish", alert, (1, 0)),
        AlertRevision("update", alert, (2, 0)),
        AlertClose("a17", 2, "found", (3, 0)),
        Tick(),
    ]
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    streamed = stream.compress(lines) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) + stream.flush()
    push = Push(0, "a17", 1, "alert", 100.0, NOW_MS, *ids)
    bodies = [
        array,
        lines,
        wire.encode_pings(batch),
        gzip.compress(lines, mtime=0),
        zstandard.ZstdCompressor().compress(lines),
        *(wire.encode_entry(entry)[1] for entry in entries),
        wire.encode_push(push),
    ]
    found = [bytes([target]) + body for target, body in enumerate(bodies)]
    found += [b"\x00" + as_json[0], b"\x00[{}]", b"\x01{}\n\n{}", b"\x04" + streamed, b"\x03" + bodies[3] * 2]
    return found


TOKENS = ('"device_id":', '"lat":', '"lng":', '"observed_at":', "1e400", "NaN", "},{", "null", "9223372036854775808")


def dictionary() -> str:
    """TOKENS as libFuzzer reads them: hexadecimal."""
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in token.encode()) + '"\n' for token in TOKENS)


def main() -> None:
    """Fuzz, or run the inputs that are named."""
    parser = argparse.ArgumentParser(description="Fuzz every decoder.", epilog="Failures are kept in out/fuzz.")
    parser.add_argument("--runs", type=int, default=10_000_000, help="inputs; default 10,000,000")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="folder of inputs to begin with, and to add to; default: none kept")
    parser.add_argument("inputs", nargs="*", type=Path, help="run these and end")
    options = parser.parse_args()
    for path in options.inputs:
        one_input(path.read_bytes())
    if options.inputs:
        return
    with tempfile.TemporaryDirectory(prefix="tuanyuan-fuzz-") as name:
        corpus = options.corpus or Path(name) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        if options.runs <= RUNS_PER_PROCESS:
            fuzz(corpus, Path(name), options.runs, options.seed)
        for number, start in enumerate(range(0, options.runs, RUNS_PER_PROCESS)):
            runs = min(RUNS_PER_PROCESS, options.runs - start)
            arguments = ["--runs", str(runs), "--seed", str(options.seed + number), "--corpus", str(corpus)]
            done = subprocess.run(
                [sys.executable, "-m", "tests.fuzz.decoders", *arguments],
                check=False,
                stderr=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{done.stderr[-6000:]}\nthe input is kept in {OUT}")
            summary = [line for line in done.stderr.splitlines() if line.startswith("#")][-1]
            print(f"{start + runs:,} of {options.runs:,} inputs: {summary}", flush=True)


def fuzz(corpus: Path, folder: Path, runs: int, seed: int) -> None:
    """In this process, which libFuzzer ends."""
    OUT.mkdir(parents=True, exist_ok=True)
    for number, good in enumerate(seeds()):
        one_input(good)  # compiles the kernels, and must be good
        (corpus / f"seed-{number}").write_bytes(good)
    words = folder / "words"
    words.write_text(dictionary())
    arguments = [
        sys.argv[0],
        f"-runs={runs}",
        f"-seed={seed}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-dict={words}",
        f"-artifact_prefix={OUT}/",
        "-timeout=20",
        "-rss_limit_mb=4096",
        str(corpus),
    ]
    atheris.Setup(arguments, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
