"""What an officer may not do is refused with 403, and every refusal is a row of the audit log."""

from __future__ import annotations

from typing import Any

from gateway.accounts import Caller
from gateway.audit_log import REFUSED
from gateway.errors import Problem
from gateway.identity import REFUSALS_BURST, REFUSALS_PER_S
from gateway.runtime import Gateway


def refuse(gateway: Gateway, caller: Caller[Any], action: str, target: str, reason: str, **details: Any) -> Problem:
    """Write the refusal down; returns the problem to raise.

    Raises Problem 429 if this key is refused all the time: rows are kept for ever; redis.RedisError.
    """
    gateway.buckets.check(f"refusals:{caller.actor}", "refusals", REFUSALS_PER_S, REFUSALS_BURST)
    gateway.audit.append(caller.actor, action, target, REFUSED, {"reason": reason, **details})
    return Problem(403, "not-for-you", reason)
