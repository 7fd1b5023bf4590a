"""The audit at the end of a run: `tuanyuan audit`, which knows logs and queues and nothing of the load."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import orjson

from loadtest.load.processes import Process

AUDIT_TIMEOUT_S = 3600.0
KINDS = ("missed", "extra", "duplicate", "unretracted")
OTHERS = ("out_of_order", "displaced", "undecodable")
EXAMPLES_MAX = 20


@dataclass(frozen=True, slots=True)
class Account:
    """What the audit said."""

    counts: dict[str, int] = field(default_factory=dict)
    pushes: int = 0
    owed: int = 0
    pings: int = 0
    seconds: float = 0.0
    complete: bool = False
    """Everything that was owed could be worked out."""
    examples: tuple[str, ...] = ()
    skipped: str | None = None
    """Why there is none."""
    skip_is_wanted: bool = False
    """Somebody asked for a run without audit, and takes the consequences."""

    @property
    def clean(self) -> bool:
        return self.skipped is None and self.complete and not any(self.counts.values())

    @property
    def passes(self) -> bool:
        """Whether the run may pass: a skipped audit passes only if it was asked for."""
        return self.clean if self.skipped is None else self.skip_is_wanted

    def line(self) -> str:
        if self.skipped is not None:
            return f"THERE WAS NO AUDIT: {self.skipped}. Nobody knows whether somebody was missed."
        verdict = "verified" if self.clean else "NOT CLEAN" if self.complete else "NOT COMPLETE"
        always = ", ".join(f"{self.counts.get(kind, 0):,} {kind}" for kind in KINDS)
        rare = "".join(f", {self.counts[kind]:,} {kind.replace('_', ' ')}" for kind in OTHERS if self.counts.get(kind))
        return f"{verdict}: {self.pushes:,} pushes, {always}{rare} ({self.pings:,} pings in {self.seconds:.0f} s)"


def no_audit(reason: str, is_wanted: bool) -> Account:
    """A run that was not audited."""
    return Account(skipped=reason, skip_is_wanted=is_wanted)


def audit_of(valkey: str, var: str | None) -> Account:
    """Ask `tuanyuan audit`. `var`: where the flow's checkpoints are; needed once logs were trimmed."""
    command = [sys.executable, "-m", "tuanyuan.cli", "audit", "--json", "--valkey", valkey]
    if var is not None:
        command += ["--var", var]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Process(command, {1: out.fileno(), 2: err.fileno()})
        code = process.wait(AUDIT_TIMEOUT_S)
        process.end()
        if code is None:
            return no_audit(f"it took longer than {AUDIT_TIMEOUT_S:.0f} s", is_wanted=False)
        out.seek(0)
        err.seek(0)
        said, complaint = out.read(), err.read().decode(errors="replace").strip()
    try:
        found = orjson.loads(said)
    except orjson.JSONDecodeError:
        return no_audit(f"`tuanyuan audit` ended with {code}: {complaint[-500:]}", is_wanted=False)
    return account_of(found)


def account_of(found: dict[str, Any]) -> Account:
    """From the audit's JSON."""
    shards = found["shards"]
    examples = [
        f"{fault['fault']}: {fault['kind']} of {fault['alert_id']!r} to {fault['device_id']!r} of "
        f"{fault['partner']!r}, shard {fault['shard']}, entry {fault['entry']}"
        for fault in found["faults"][:EXAMPLES_MAX]
    ]
    return Account(
        {kind: int(found[kind]) for kind in (*KINDS, *OTHERS)},
        int(found["pushes"]),
        sum(int(shard["owed"]) for shard in shards),
        sum(int(shard["pings"]) for shard in shards),
        float(found["seconds"]),
        bool(found["complete"]),
        tuple(examples),
    )
