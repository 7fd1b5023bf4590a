"""Alerts as they are read: by officers with everything, by the world without what is nobody's business.

DeskAlert (flows.desk) ─┐                    ┌─> AlertDetails    officers of the jurisdiction
Case (gateway.cases) ───┼─> at this moment ──┤
tallies, handed over ───┘                    └─> PublicAlert     public page, feeds, CAP; nothing of it once it ended
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
import redis

from flows.desk import ALERT_IDS_KEY, DeskAlert
from flows.log import push_key
from flows.tallies import read_tallies
from gateway.alert_models import (
    AlertDetails,
    AlertSummary,
    Category,
    Child,
    Location,
    Outcome,
    PartnerFigures,
    Ring,
)
from gateway.cases import Case, ChildWords, Words, read_case, read_cases
from gateway.desk_service import page_url
from gateway.handover import GROUP, handed_over
from gateway.phone_counts import shown_count
from gateway.runtime import Gateway
from geoindex.entries import AUTO_CLOSE_MS, HOUR_MS
from geoindex.rings import growth_times_ms, radius_km

ENDED_SHOWN_MS = 24 * HOUR_MS
"""How long feeds say that a search has ended."""
_PAGE = 200

_SEX = {"female": ("女", "female"), "male": ("男", "male"), "unknown": ("", "")}


# --- at this moment ---------------------------------------------------------------------------------------------------


def is_matching(known: DeskAlert, now_ms: int) -> bool:
    """Whether phones that come into the ring are told."""
    return known.is_open(now_ms) and now_ms <= known.alert.expires_at_ms


def ended_at_ms(known: DeskAlert, now_ms: int) -> int | None:
    """When the search ended; None: it has not."""
    if known.outcome is not None:
        return known.changed_at_ms
    return None if known.is_open(now_ms) else known.alert.expires_at_ms + AUTO_CLOSE_MS


def ring_now(known: DeskAlert, now_ms: int) -> Ring | None:
    """The ring, and when it grows; None once the alert is closed."""
    if not known.is_open(now_ms):
        return None
    alert = known.alert
    until_ms = alert.expires_at_ms
    growth = next(
        (step for step in growth_times_ms(alert.schedule, alert.missing_since_ms) if now_ms < step[0] <= until_ms), None
    )
    return Ring.model_construct(
        km=radius_km(alert.schedule, min(now_ms, until_ms) - alert.missing_since_ms),
        next_growth=growth[0] if growth else None,
        next_km=growth[1] if growth else None,
    )


# --- for officers -----------------------------------------------------------------------------------------------------


def summary(gateway: Gateway, known: DeskAlert, case: Case | None, now_ms: int) -> AlertSummary:
    """An alert as an officer of its jurisdiction sees it in a list."""
    return AlertSummary.model_construct(**_summary_fields(gateway, known, case, now_ms))


def details(gateway: Gateway, known: DeskAlert, case: Case | None, now_ms: int) -> AlertDetails:
    """As `summary`, and what became of it at each partner so far. Raises redis.RedisError."""
    is_erased = case is not None and case.erased_at_ms is not None
    partners = None if is_erased else partner_figures(gateway, known)
    return AlertDetails.model_construct(**_summary_fields(gateway, known, case, now_ms), partners=partners)


def _summary_fields(gateway: Gateway, known: DeskAlert, case: Case | None, now_ms: int) -> dict[str, Any]:
    alert = known.alert
    words = words_of(known, case)
    is_open = known.is_open(now_ms)
    state = "closed" if not is_open else "open" if is_matching(known, now_ms) else "expired"
    child = None if words is None else Child.model_construct(**msgspec.structs.asdict(words.child))
    return {
        "alert_id": alert.alert_id,
        "revision": alert.revision,
        "state": state,
        "status": alert.status,
        "division": None if case is None else case.division,
        "published_by": None if case is None else case.officer,
        "published_at": known.published_at_ms,
        "changed_at": known.changed_at_ms,
        "location": Location.model_construct(lat=alert.lat, lng=alert.lng),
        "missing_since": alert.missing_since_ms,
        "schedule": [list(step) for step in alert.schedule],
        "expires_at": alert.expires_at_ms,
        "audience": None if alert.audience is None else list(alert.audience),
        "ring": ring_now(known, now_ms),
        "outcome": cast("Outcome | None", known.outcome if is_open or known.outcome else "cancelled"),
        "category": cast("Category | None", None if case is None else case.category),
        "child": child,
        "headline": "" if words is None else words.headline,
        "place": "" if words is None else words.place,
        "text": "" if words is None else words.text,
        "contact": "" if words is None else words.contact,
        "photo_url": photo_url(gateway, case) if is_open else None,
        "url": page_url(gateway, alert.alert_id),
        "details_erased_at": None if case is None else case.erased_at_ms,
    }


def words_of(known: DeskAlert, case: Case | None) -> Words | None:
    """What people read of an alert; None: erased. Of one that was published at the terminal: the words given there."""
    if case is not None:
        return case.words
    content = known.content
    text = "\n".join(content[name] for name in ("description", "instruction") if content.get(name))
    return Words(headline=content.get("headline", ""), text=text, contact=content.get("contact", ""))


def partner_figures(gateway: Gateway, known: DeskAlert) -> list[PartnerFigures]:
    """What became of an alert at each partner that it is for. Raises redis.RedisError."""
    settings, alert = gateway.settings(), known.alert
    partners = [name for name in settings.partners if alert.audience is None or name in alert.audience]
    told = read_tallies(gateway.client, settings.shard_count, alert.alert_id)
    handed = handed_over(gateway.client, settings.shard_count, alert.alert_id, partners)
    figures = []
    for partner in partners:
        told_count, retracted_count = told.get(partner, (0, 0))
        delivered = acknowledged = None
        if not reads_by_itself(gateway.client, partner):
            delivered = shown_count(handed[partner].delivered.get("alert", 0))
            acknowledged = shown_count(handed[partner].acknowledged.get("alert", 0))
        figures.append(
            PartnerFigures.model_construct(
                partner=partner,
                told=shown_count(told_count),
                retracted=shown_count(retracted_count),
                delivered=delivered,
                acknowledged=acknowledged,
            )
        )
    return figures


def reads_by_itself(client: redis.Redis, partner: str) -> bool:
    """Whether a partner reads its queues directly, so that nobody here sees what it takes. Raises redis.RedisError."""
    try:
        groups = client.xinfo_groups(push_key(0, partner))
    except redis.ResponseError as error:
        if "no such key" in str(error):
            return False
        raise
    names = {group["name"] for group in groups}
    return bool(names) and GROUP.encode() not in names


def list_alerts(
    gateway: Gateway, prefix: str, state: Literal["open", "closed", "all"], before: str | None, limit: int
) -> tuple[list[tuple[DeskAlert, Case | None]], str | None]:
    """Alerts of the divisions that begin with `prefix`, the last published first, and where to go on.

    `before`: an alert's id; what was published before it. Raises redis.RedisError; LookupError: there is no such alert.
    """
    client, now_ms = gateway.client, gateway.desk.now_ms()
    start = 0
    if before is not None:
        rank = cast("int | None", client.zrevrank(ALERT_IDS_KEY, before))
        if rank is None:
            raise LookupError(before)
        start = rank + 1
    found: list[tuple[DeskAlert, Case | None]] = []
    while ids := [
        raw.decode() for raw in cast("list[bytes]", client.zrevrange(ALERT_IDS_KEY, start, start + _PAGE - 1))
    ]:
        for alert_id, case in zip(ids, read_cases(client, ids), strict=True):
            if not (case.division if case is not None else "000000").startswith(prefix):
                continue
            known = gateway.desk.show(alert_id)
            if known is None or (state != "all" and known.is_open(now_ms) != (state == "open")):
                continue
            if len(found) == limit:
                return found, found[-1][0].alert.alert_id
            found.append((known, case))
        start += len(ids)
    return found, None


# --- for the world ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PublicAlert:
    """An alert as anybody may see it."""

    known: DeskAlert
    division: str | None
    words: Words | None
    """None: the search has ended."""
    photo_url: str | None
    page_url: str
    ended_at_ms: int | None
    ring: Ring | None

    @property
    def is_exercise(self) -> bool:
        return self.known.alert.status == "exercise"

    @property
    def headline(self) -> str:
        """One line, in Chinese; of a search that has ended a neutral one."""
        if self.words is None:
            return "搜寻已结束 The search has ended"
        return self.words.headline or headline_of(self.words)


def public_alert(gateway: Gateway, known: DeskAlert, case: Case | None, now_ms: int) -> PublicAlert:
    """What anybody may see of an alert at this moment. Once it ended, nothing of the child."""
    ended_ms = ended_at_ms(known, now_ms)
    words = words_of(known, case) if ended_ms is None else None
    if words is None and ended_ms is None:
        ended_ms = now_ms  # it was closed, and erased, between two looks
    is_open = ended_ms is None
    return PublicAlert(
        known=known,
        division=None if case is None else case.division,
        words=words,
        photo_url=photo_url(gateway, case) if is_open else None,
        page_url=page_url(gateway, known.alert.alert_id),
        ended_at_ms=ended_ms,
        ring=ring_now(known, now_ms) if is_open else None,
    )


def find_public_alert(gateway: Gateway, alert_id: str) -> PublicAlert | None:
    """One alert, an exercise too; None: there never was one of this id. Raises redis.RedisError."""
    known = gateway.desk.show(alert_id)
    if known is None:
        return None
    return public_alert(gateway, known, read_case(gateway.client, alert_id), gateway.desk.now_ms())


def public_alerts(gateway: Gateway) -> list[PublicAlert]:
    """What feeds hold, the last published first: open alerts, and for a day the notices of those that ended.

    Neither exercises nor alerts for some partners alone: those are for whoever they were sent to.
    Raises redis.RedisError.
    """
    now_ms = gateway.desk.now_ms()
    alerts = [known for known in gateway.desk.list() if known.alert.status == "actual" and known.alert.audience is None]
    shown = [known for known in alerts if (ended_at_ms(known, now_ms) or now_ms) > now_ms - ENDED_SHOWN_MS]
    cases = read_cases(gateway.client, [known.alert.alert_id for known in shown])
    return [public_alert(gateway, known, case, now_ms) for known, case in zip(shown, cases, strict=True)]


def photo_url(gateway: Gateway, case: Case | None) -> str | None:
    """Where the picture of an open alert is; another one whenever the picture is."""
    if case is None or case.photo is None:
        return None
    return f"{page_url(gateway, case.alert_id)}/photo.jpg?v={case.photo[:12]}"


def child_line(child: ChildWords, language: Literal["zh", "en"]) -> str:
    """The child in one line: `王小明，男，6岁`; `王小明, male, 6 years old`."""
    chinese = language == "zh"
    age = "" if child.age is None else f"{child.age}岁" if chinese else f"{child.age} years old"
    parts: Sequence[str] = [part for part in (child.name, _SEX[child.sex][0 if chinese else 1], age) if part]
    return ("，" if chinese else ", ").join(parts)


def headline_of(words: Words) -> str:
    """A headline made of the child's details."""
    line = child_line(words.child, "zh")
    return f"寻找失踪儿童：{line}" if line else "寻找失踪儿童"
