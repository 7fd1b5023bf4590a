"""The audit log: every action of a desk and every refusal, in rows chained by hash.

    audit-log:{desk}    stream, never trimmed; row 17 has the id 17-0

    row 16  {..., "previous": hash of 15}  hash = SHA-256(row)   seal = HMAC(key file, hash)
                                             │
    row 17  {..., "previous": ───────────────┘

The row's number is the entry's id, so the server itself refuses a second row 17: of several gateways that append at
once one wins, and the others take the next number (compare-and-set, without a script or a second key).

What is changed shows (`verify`): an edited row has another hash; a deleted one leaves a gap; an exchanged or inserted
one breaks the chain. Whoever rewrites the whole chain would have to seal it, which needs the gateways' key file. Rows
cut off the end leave a chain that is whole: so each gateway keeps the newest number and hash that it has seen in a
file of its own (`HeadFile`), beside the server and not in it; the log may not be shorter than that.

An action that cannot be written here does not happen: its row is appended first, what came of it afterwards. Rows are
kept for ever, so what is forgotten one day must not be in them: no words about a child, no phone, no secret.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson
import redis

from flows.clock import CLOCK, Clock
from flows.log import LogId, parse_id
from flows.metrics import METRICS, Metrics
from gateway.keys import Sealer

logger = logging.getLogger(__name__)

AUDIT_LOG_KEY = "audit-log:{desk}"
GENESIS = "0" * 64
"""What the first row has as the hash of the one before it."""
DETAILS_BYTES_MAX = 2_048
TEXT_CHARACTERS_MAX = 256
READ_COUNT = 500
TAIL_MISSING = "audit-log.tail-missing"
"""Action of the row that a gateway writes when the log is shorter than it was."""

BEGUN, DONE, REFUSED, FAILED = "begun", "done", "refused", "failed"
"""Outcomes. An action has two rows: `begun`, and what came of it; a refusal has one."""

_SEAL_PURPOSE = b"tuanyuan audit log"
Entries = list[tuple[bytes, dict[bytes, bytes]]]
"""Of a stream, as the server gives them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `at_ms`: ms since 1970, by the gateway's clock."""

    number: int
    at_ms: int
    actor: str
    action: str
    target: str
    outcome: str
    details: dict[str, Any]
    previous: str
    hash: str
    seal: str

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Head:
    """The newest row: its number and hash."""

    number: int
    hash: str

    def __str__(self) -> str:
        return f"{self.number}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """`17:<64 hex digits>`. Raises ValueError."""
        number, _, hash_ = text.strip().partition(":")
        if not (number.isascii() and number.isdigit()) or len(hash_) != 64 or set(hash_) - set("0123456789abcdef"):
            raise ValueError(f"a head must be a row's number and hash, 17:<64 hex digits>, got {text.strip()[:80]!r}")
        return cls(int(number), hash_)


@dataclass(frozen=True, slots=True)
class Break:
    """A place where the log is not what was written."""

    number: int
    words: str


class HeadFile:
    """The newest head that any gateway on this machine has seen, outside the server. Only ever rises."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Head | None:
        """None if there is none yet. Raises ValueError for a file that holds something else; OSError."""
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return None
        return Head.parse(text) if text.strip() else None

    def raise_to(self, head: Head) -> None:
        """Keep this head, unless a later one is kept already. Raises OSError, ValueError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read().decode(errors="replace")
            kept = Head.parse(text) if text.strip() else None
            if kept is None or kept.number < head.number:
                # One write of nearly always the same length: no reader sees half of it.
                os.pwrite(descriptor, f"{head}\n".encode(), 0)


class AuditLog:
    """Appends rows. Thread-safe; any number of gateways may do so at once."""

    def __init__(
        self,
        client: redis.Redis,
        sealer: Sealer,
        head_file: HeadFile | None = None,
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
    ) -> None:
        self._client = client
        self._key = sealer.keys_for(_SEAL_PURPOSE)[0]
        self._head_file = head_file
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()
        self._head: Head | None = None
        self._next = 1
        self._file_failed = False

    def append(
        self, actor: str, action: str, target: str, outcome: str, details: Mapping[str, Any] | None = None
    ) -> Row:
        """Append one row; when it returns, the row is durable.

        `actor`: "officer:<name>" (`Caller.actor`); `action`: "alert.publish"; `target`: an alert's id, an account's
        name, a path; `outcome`: BEGUN, DONE, REFUSED or FAILED; `details`: few plain values,
        nothing of a child or phone.
        Raises redis.RedisError: then the row may be there or not, and what it is about must not happen.
        """
        with self._lock:
            while True:
                if self._head is None:
                    self._find_head()
                row = self._row(actor, action, target, outcome, dict(details or {}))
                if self._put(row):
                    return row
                self._head = None  # another gateway was faster: behind its row, then

    @contextlib.contextmanager
    def recording(
        self, actor: str, action: str, target: str, details: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """An action and its two rows: `begun` before it, then `done`, or `failed` if it raises.

        What is put into the yielded dict stands in the second row. Raises as `append`: then nothing was done.
        """
        self.append(actor, action, target, BEGUN, details)
        result: dict[str, Any] = {}
        try:
            yield result
        except BaseException as error:
            result.setdefault("error", type(error).__name__)
            with contextlib.suppress(redis.RedisError):  # what is away now was there for the first row, which says it
                self.append(actor, action, target, FAILED, result)
            raise
        self.append(actor, action, target, DONE, result)

    def _find_head(self) -> None:
        """Learn what stands at the end. A log that has become shorter is said so: in a row, in a line, and by an
        alarm that stays on.
        """
        kept = self._kept()  # first: what others append between these two lines is later than what was kept
        last, self._next = read_head(self._client)
        self._head = last
        if kept is None or (kept.number < last.number or kept == last):
            return
        words = (
            f"the audit log ends with row {last.number}, hash {last.hash[:12]}…; this machine has seen "
            f"row {kept.number}, hash {kept.hash[:12]}…: rows were taken away"
        )
        self._metrics.alarms.set("audit_log", words)
        self._next = max(self._next, kept.number + 1)
        details = {"seen": str(kept), "found": str(last)}
        self._put(self._row("gateway", TAIL_MISSING, AUDIT_LOG_KEY, FAILED, details))

    def _kept(self) -> Head | None:
        if self._head_file is None:
            return None
        try:
            return self._head_file.read()
        except (OSError, ValueError) as error:
            logger.error("the head of the audit log cannot be read from its file: %s", error)
            return None

    def _row(self, actor: str, action: str, target: str, outcome: str, details: dict[str, Any]) -> Row:
        assert self._head is not None
        number, at_ms, previous = self._next, round(self._clock.now_ms()), self._head.hash
        actor, action, target, outcome = (_short(text) for text in (actor, action, target, outcome))
        if len(orjson.dumps(details, default=str)) > DETAILS_BYTES_MAX:
            raise ValueError(f"details of an audit row must be below {DETAILS_BYTES_MAX} bytes")
        details = orjson.loads(orjson.dumps(details, default=str))
        hash_ = hashlib.sha256(_encoded(number, at_ms, actor, action, target, outcome, details, previous)).hexdigest()
        return Row(number, at_ms, actor, action, target, outcome, details, previous, hash_, _seal(self._key, hash_))

    def _put(self, row: Row) -> bool:
        """Whether the row was taken; not if its number is taken."""
        payload = _encoded(
            row.number, row.at_ms, row.actor, row.action, row.target, row.outcome, row.details, row.previous
        )
        try:
            self._client.xadd(AUDIT_LOG_KEY, {"row": payload, "hash": row.hash, "seal": row.seal}, id=f"{row.number}-0")
        except redis.OutOfMemoryError:
            raise
        except redis.ResponseError as error:
            if "equal or smaller" not in str(error):
                raise
            return False
        self._head, self._next = Head(row.number, row.hash), row.number + 1
        self._metrics.count("audit_rows_total")
        if self._head_file is not None:
            try:
                self._head_file.raise_to(self._head)
                self._file_failed = False
            except (OSError, ValueError) as error:
                if not self._file_failed:
                    logger.error("the head of the audit log cannot be kept in its file: %s", error)
                self._file_failed = True
        return True


def read_head(client: redis.Redis) -> tuple[Head, int]:
    """The newest row that is there, and the number that the next one must have: behind any that ever was."""
    try:
        info = client.xinfo_stream(AUDIT_LOG_KEY)
    except redis.ResponseError as error:
        if "no such key" in str(error):
            return Head(0, GENESIS), 1
        raise
    generated = parse_id(info["last-generated-id"])[0]
    last = info["last-entry"]
    if last is None:
        return Head(0, GENESIS), generated + 1
    entry_id, fields = last
    number = parse_id(entry_id)[0]
    return Head(number, fields.get(b"hash", b"").decode(errors="replace")), max(generated, number) + 1


def read_rows(client: redis.Redis, after: int = 0) -> Iterator[tuple[LogId, dict[bytes, bytes]]]:
    """Entries as they stand, behind a number, in order."""
    start = f"({after}-18446744073709551615"
    while entries := cast(Entries, client.xrange(AUDIT_LOG_KEY, start, count=READ_COUNT)):
        for raw_id, fields in entries:
            yield parse_id(raw_id), fields
        start = f"({entries[-1][0].decode()}"


def last_rows(client: redis.Redis, count: int) -> list[Row]:
    """The newest rows that can be read, the newest last."""
    entries = cast(Entries, client.xrevrange(AUDIT_LOG_KEY, count=count))
    rows = (parse_row(fields) for _, fields in reversed(entries))
    return [row for row in rows if row is not None]


def parse_row(fields: Mapping[bytes, bytes]) -> Row | None:
    """A row from its entry; None if that is none."""
    try:
        members = orjson.loads(fields[b"row"])
        return Row(
            members["number"],
            members["at_ms"],
            members["actor"],
            members["action"],
            members["target"],
            members["outcome"],
            members["details"],
            members["previous"],
            fields[b"hash"].decode(),
            fields[b"seal"].decode(),
        )
    except (KeyError, TypeError, ValueError):
        return None


def verify(
    entries: Iterable[tuple[LogId, Mapping[bytes, bytes]]],
    sealer: Sealer | None = None,
    heads: Iterable[Head] = (),
    last_number: int = 0,
) -> tuple[int, list[Break]]:
    """How many rows there are, and every place where they are not what was written.

    `sealer`: to check the seals as well; `heads`: what others have seen of this log; `last_number`: the highest number
    that the server ever gave out.
    """
    keys = sealer.keys_for(_SEAL_PURPOSE) if sealer is not None else []
    seen_heads = {head.number: head.hash for head in heads}
    breaks: list[Break] = []
    count, before = 0, Head(0, GENESIS)
    for (id_number, id_sequence), fields in entries:
        count += 1
        row = parse_row(fields)
        if row is None or set(fields) != {b"row", b"hash", b"seal"}:
            breaks.append(Break(id_number, "is no row of the audit log"))
            continue
        number = row.number
        if hashlib.sha256(fields[b"row"]).hexdigest() != row.hash:
            breaks.append(Break(number, "was edited: its hash is another one"))
        elif keys and not any(hmac.compare_digest(_seal(key, row.hash), row.seal) for key in keys):
            breaks.append(Break(number, "was not written by a gateway with this key file: its seal is wrong"))
        if (id_number, id_sequence) != (number, 0):
            breaks.append(Break(number, f"stands at {id_number}-{id_sequence}, where it was not written"))
        if number <= before.number:
            breaks.append(Break(number, f"stands behind row {before.number}: rows were reordered or inserted"))
        elif number > before.number + 1:
            gap = f"{before.number + 1} to {number - 1}" if number > before.number + 2 else f"{number - 1}"
            breaks.append(Break(number, f"follows row {before.number}: {gap} missing"))
        elif row.previous != before.hash:
            breaks.append(Break(number, f"does not follow row {before.number} as it is now: one was exchanged"))
        if row.action == TAIL_MISSING:
            breaks.append(Break(number, f"says that rows were missing when it was written: {row.details}"))
        if (wanted := seen_heads.pop(number, None)) is not None and wanted != row.hash:
            breaks.append(Break(number, "is another row than the one that was seen under this number"))
        before = Head(number, row.hash)
    for number in sorted(seen_heads):
        end = ": the end was cut off" if number > before.number else ""
        breaks.append(Break(number, f"was seen, and is missing{end}"))
    if last_number > before.number:
        breaks.append(Break(last_number, f"was written, and is missing: the log ends with row {before.number}"))
    return count, breaks


def _encoded(
    number: int,
    at_ms: int,
    actor: str,
    action: str,
    target: str,
    outcome: str,
    details: dict[str, Any],
    previous: str,
) -> bytes:
    members = {
        "number": number,
        "at_ms": at_ms,
        "actor": actor,
        "action": action,
        "target": target,
        "outcome": outcome,
        "details": details,
        "previous": previous,
    }
    return orjson.dumps(members)


def _seal(key: bytes, hash_: str) -> str:
    return hmac.digest(key, hash_.encode(), "sha256").hex()


def _short(text: str) -> str:
    text = text.encode(errors="replace").decode()
    return text if len(text) <= TEXT_CHARACTERS_MAX else f"{text[: TEXT_CHARACTERS_MAX - 1]}…"
